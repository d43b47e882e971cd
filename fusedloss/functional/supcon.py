"""Supervised contrastive loss: every row against all others, without the matrix of similarities."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fusedloss import backends, distributed, ops
from fusedloss.backends.reference import supcon as reference
from fusedloss.core.operands import SupConInputs
from fusedloss.functional.engine import transformed
from fusedloss.functional.supcon_checks import (
    ExtraRows,
    SupConOptions,
    anchor_weight,
    check_features,
    check_temperature,
    checked_extra,
    checked_labels,
    checked_mask,
)
from fusedloss.functional.supcon_rows import BatchRows, Contrast, contrast_of, kept_anchors


def supcon(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
    class_weight: Tensor | None = None,
    prototypes: Tensor | None = None,
    prototype_labels: Tensor | None = None,
    class_balance: bool = False,
    ignore_index: int = -100,
    contrast: Tensor | None = None,
    contrast_labels: Tensor | None = None,
    contrast_mode: str = "all",
    group: dist.ProcessGroup | None = None,
    prototype_weight: float = 1.0,
    prototype_bias: Tensor | None = None,
    focal_gamma: float = 0.0,
) -> Tensor:
    """Supervised contrastive loss (L_out): pulls rows of one class together and pushes the others away.

    ``l_i = log sum_{j != i} exp(s_ij) - mean_{j in P_i} s_ij`` with ``s_ij = <x_i, x_j> / T`` and P_i the other rows
    of i's class. The N x N similarities (N = B * V) are never stored: memory is O(N * D), and rows of any length, any
    T and classes of one row give finite values. Similarities are float32 (float64 for float64 features). A row with NaN
    or infinity makes the loss of every anchor that is contrasted with it NaN, unless the row is ignored; with
    ``FUSEDLOSS_CHECK=1`` it is an error that names the row.

    Args:
        features: ``(B, D)``, or ``(B, V, D)`` with V views of each sample; float32, float64, bfloat16 or float16.
        labels: ``(B,)`` any integers; None makes every sample a class of its own (SimCLR, NT-Xent).
        mask: ``(B, B)`` bool or 0 and 1, in place of labels: 1 where the column's sample is a positive of the row's.
        temperature: T, a positive number, or a tensor with one element, which gets a gradient.
        normalize: scale each row (prototypes and contrast rows too) to length 1 first.
        reduction: ``"mean"`` over the anchors that have a positive (0 with none), ``"mean_all"`` over all anchors that
            are not ignored, ``"sum"``, or ``"none"``: one value per anchor, view-major ``(V * B,)``, 0 without a
            positive.
        class_weight: ``(K,)``, labels in [0, K): multiplies an anchor's loss and its share of the mean's denominator.
        prototypes, prototype_labels: ``(P, D)``, ``(P,)``: rows with gradients that are contrasts and no anchors (class
            centres, class complement).
        class_balance: each class counts as one contrast in the sum over j (balanced contrastive loss, BCL): class c
            with m_c rows weighs 1 / m_c, and 1 / (m_c - 1) in the sums of its own anchors.
        ignore_index: rows with this label are neither anchors nor contrasts.
        contrast, contrast_labels: ``(Q, D)``, ``(Q,)``: more contrasts, without gradient (a memory bank); without
            labels they are nobody's positives.
        contrast_mode: ``"all"`` views are anchors, or ``"one"``: the first.
        group: a ``torch.distributed`` process group: the rows of all ranks are contrasts, and value and gradients are
            those of one process that holds all rows (under DDP, which averages gradients, multiply by its ranks).
            ``"none"`` gives this rank's anchors; host and device are synchronised.
        prototype_weight: how much a prototype counts in the mean over positives, where a row counts 1.
        prototype_bias: ``(P,)``, at most 80, added to the similarities of the prototypes (a log prior: logit
            adjustment), without gradient; -inf leaves a prototype out, as if it were not given.
        focal_gamma: weighs an anchor by ``(1 - mean_{j in P_i} p_ij) ** focal_gamma``, without gradient through it, as
            ``class_weight`` does. With inverse frequencies as `class_weight` it is this package's "Reb-style" variant.

    Returns:
        The loss in float32 (float64 for float64 features).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that don't fit; the message names the argument.
        IndexError: a label outside [0, K) with `class_weight`, on the CPU.

    Khosla et al., "Supervised Contrastive Learning" (2020), eq. 2; BCL: Zhu et al. (2022); PaCo: Cui et al. (2021).

    >>> import torch, fusedloss
    >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]], requires_grad=True)
    >>> fusedloss.supcon(features, torch.tensor([0, 1, 0]), temperature=1.0)
    tensor(0.3285, grad_fn=<...>)
    """
    options = SupConOptions(
        normalize, reduction, class_balance, ignore_index, contrast_mode, prototype_weight, focal_gamma
    )
    options.check()
    check_features("features", features)
    check_temperature(temperature, features)
    _check_positives(labels, mask, options, group)
    samples, views = features.shape[0], 1 if features.dim() == 2 else features.shape[1]
    rows = features if features.dim() == 2 else features.flatten(2).transpose(0, 1).flatten(0, 1)
    labels = None if labels is None else checked_labels("labels", labels, samples, features)
    mask = None if mask is None else checked_mask(mask, samples, features)
    extra = ExtraRows(prototypes, prototype_labels, prototype_bias, contrast, contrast_labels)
    extra = checked_extra(extra, rows, labels, mask)
    anchor_views = 1 if contrast_mode == "one" else views
    weight = anchor_weight(class_weight, labels, ignore_index, features)
    ignored = None if labels is None else ignore_index
    if mask is None:
        labels = torch.arange(samples, device=features.device) if labels is None else labels
        if group is not None:
            rows, labels, extra, temperature = _of_all_ranks(rows, labels, ignored, extra, temperature, group)
        else:
            labels = labels.repeat(views) if views > 1 else labels
    batch = BatchRows(rows, labels, mask, samples * anchor_views, ignored)
    whole = contrast_of(batch, extra, options, temperature)
    loss = _anchor_loss(whole)
    weight = None if weight is None else weight.repeat(anchor_views)
    if focal_gamma != 0:
        focus = _focus(whole, loss, focal_gamma)
        weight = focus if weight is None else weight * focus
    return _reduced(loss, weight, whole, reduction, group)


def _anchor_loss(contrast: Contrast) -> Tensor:
    """The loss of each anchor, ``(A,)``."""
    inputs = contrast.inputs
    # torch.func transforms see through plain PyTorch only.
    if transformed() or backends.resolve_backend(inputs.features.device.type) == "reference":
        loss = reference.anchor_sums(inputs).loss
    else:
        loss = ops.supcon_stats(inputs).loss
    return loss if contrast.offset is None else loss + contrast.offset


@torch.no_grad()
def _focus(contrast: Contrast, loss: Tensor, gamma: float) -> Tensor:
    """(1 - mean over the positives of p_ij) ** gamma."""
    inputs = contrast.inputs
    features = inputs.features.detach()
    weights = inputs.per_positive.new_ones(3, features.shape[0]) if inputs.weights is None else inputs.weights.clone()
    weights[1] = 0
    # By name: torch.compile of torch 2.8 can't trace _replace.
    without = SupConInputs(
        features, inputs.codes, inputs.mask, weights, inputs.per_positive, inputs.temperature.detach(),
        inputs.num_grad_rows, inputs.normalized, inputs.norms,
    )  # fmt: skip
    of_negatives = _anchor_loss(Contrast(without, contrast.offset))
    of_positives = -torch.expm1((of_negatives - loss.detach()).clamp(max=0))
    return (1 - of_positives * inputs.per_positive).clamp(0, 1) ** gamma


def _reduced(
    loss: Tensor, weight: Tensor | None, contrast: Contrast, reduction: str, group: dist.ProcessGroup | None
) -> Tensor:
    if weight is not None:
        loss = loss * weight
    if reduction == "none":
        return loss
    loss = loss.sum()
    if group is not None:
        loss = distributed.summed(loss, group)
    if reduction == "sum":
        return loss
    averaged = kept_anchors(contrast.inputs) if reduction == "mean_all" else contrast.inputs.per_positive > 0
    share = averaged.to(loss.dtype) if weight is None else torch.where(averaged, weight, 0.0)
    total = share.sum() if group is None else distributed.summed(share.sum(), group)
    return loss / torch.where(total == 0, torch.ones_like(total), total)


def _of_all_ranks(
    rows: Tensor,
    labels: Tensor,
    ignored: int | None,
    extra: ExtraRows,
    temperature: float | Tensor,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, ExtraRows, float | Tensor]:
    """This rank's rows and labels, then those of the others; samples without labels are numbered over all ranks."""
    counts = distributed.row_counts(labels, group)
    first = sum(counts[: dist.get_rank(group)])
    views = len(rows) // max(len(labels), 1)
    labels = (labels + first if ignored is None else labels).repeat(views)
    begin, end = views * first, views * first + len(rows)
    all_rows, all_labels = distributed.gathered_with_gradient(rows, group), distributed.gathered(labels, group)
    if extra.prototypes is not None:
        extra = extra._replace(prototypes=distributed.shared(extra.prototypes, group))
    if isinstance(temperature, Tensor):
        temperature = distributed.shared(temperature, group)
    own_first = [torch.cat([part[begin:end], part[:begin], part[end:]]) for part in (all_rows, all_labels)]
    return own_first[0], own_first[1], extra, temperature


def _check_positives(labels: object, mask: object, options: SupConOptions, group: dist.ProcessGroup | None) -> None:
    """What can't be joined with a mask."""
    if mask is None:
        return
    if labels is not None:
        raise ValueError("mask must be None where there are labels, which say the same; got both")
    for name, given in (
        ("class_balance", options.class_balance),
        ("focal_gamma", options.focal_gamma != 0),
        ("group", group is not None),
    ):
        if given:
            raise ValueError(f"{name} must be left out with a mask, it goes by labels; got both")
