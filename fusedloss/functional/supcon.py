"""Supervised contrastive loss: every row against all others, without the matrix of similarities."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from fusedloss import backends, distributed, ops
from fusedloss.backends.reference import supcon as reference
from fusedloss.backends.reference.class_stats import check_labels
from fusedloss.functional.supcon_arguments import (
    Contrast,
    Extra,
    assembled,
    check_features,
    check_temperature,
    checked_labels,
    checked_mask,
)

REDUCTIONS = ("mean", "mean_all", "sum", "none")
MODES = ("all", "one")


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
    T and classes of one row give finite values. Similarities are float32 (float64 for float64 features).

    Args:
        features: ``(B, D)``, or ``(B, V, D)`` with V views of each sample; float32, float64, bfloat16 or float16.
        labels: ``(B,)`` any integers; None makes every sample a class of its own (SimCLR, NT-Xent).
        mask: ``(B, B)`` bool or 0 and 1, in place of labels: 1 where the column's sample is a positive of the row's.
        temperature: T, a positive number, or a tensor with one element, which gets a gradient.
        normalize: scale each row (prototypes and contrast rows too) to length 1 first.
        reduction: ``"mean"`` over the anchors that have a positive (0 with none), ``"mean_all"`` over all anchors,
            ``"sum"``, or ``"none"``: one value per anchor, view-major ``(V * B,)``, 0 without a positive.
        class_weight: ``(K,)``, labels in [0, K): multiplies an anchor's loss and its share of the mean's denominator.
        prototypes, prototype_labels: ``(P, D)``, ``(P,)``: learned rows that are contrasts and no anchors (class
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
        prototype_bias: ``(P,)``, added to the similarities of the prototypes (a log prior: logit adjustment); no
            gradient.
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
    _check_options(labels, mask, reduction, contrast_mode, focal_gamma, prototype_weight)
    check_features("features", features)
    check_temperature(temperature, features)
    samples = len(features)
    views = 1 if features.dim() == 2 else features.shape[1]
    rows = features if features.dim() == 2 else features.flatten(2).transpose(0, 1).reshape(views * samples, -1)
    labels = None if labels is None else checked_labels("labels", labels, samples, features)
    mask = None if mask is None else checked_mask(mask, samples, features)
    extra = _checked_extra(
        rows, labels, mask, prototypes, prototype_labels, prototype_weight, prototype_bias, contrast, contrast_labels
    )
    if mask is not None and (class_balance or group is not None):
        raise ValueError(f"{'class_balance' if class_balance else 'group'} needs labels, or none; got a mask")
    weight = _anchor_weight(class_weight, labels, ignore_index, features)
    anchors = samples if contrast_mode == "one" else len(rows)
    ignored = None if labels is None else ignore_index
    if mask is None:
        labels = torch.arange(samples, device=features.device) if labels is None else labels
        if group is not None:
            rows, labels, extra, temperature = _of_all_ranks(rows, labels, ignored, extra, temperature, group)
        else:
            labels = labels.repeat(views)
    problem = assembled(rows, labels, mask, extra, temperature, normalize, class_balance, ignored, anchors, views)
    loss = _row_loss(problem)
    if problem.offset is not None:
        loss = loss + problem.offset
    weight = None if weight is None else weight.repeat(views)[:anchors]
    if focal_gamma != 0:
        focus = _focus(problem, loss, focal_gamma)
        weight = focus if weight is None else weight * focus
    return _reduced(loss, weight, problem.per_positive > 0, reduction, group)


def _row_loss(problem: Contrast) -> Tensor:
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    inputs = (problem.features, problem.codes, problem.mask, problem.weights, problem.per_positive)
    if transformed or backends.resolve_backend(problem.features.device.type) == "reference":
        return reference.row_loss(*inputs, problem.temperature, problem.anchors)
    return ops.supcon(*inputs, problem.temperature, problem.anchors, problem.learned, problem.unit).loss


@torch.no_grad()
def _focus(problem: Contrast, loss: Tensor, gamma: float) -> Tensor:
    """(1 - mean over the positives of p_ij) ** gamma."""
    weights = problem.weights
    weights = problem.features.new_ones(3, len(problem.features)) if weights is None else weights.clone()
    weights[1] = 0
    inputs = (problem.features.detach(), problem.codes, None, weights, problem.per_positive)
    without = _row_loss(Contrast(*inputs, problem.temperature.detach(), problem.anchors, 0, problem.unit, None))
    if problem.offset is not None:
        without = without + problem.offset
    of_positives = -torch.expm1((without - loss.detach()).clamp(max=0))
    return (1 - of_positives * problem.per_positive).clamp(0, 1) ** gamma


def _reduced(
    loss: Tensor, weight: Tensor | None, counted: Tensor, reduction: str, group: dist.ProcessGroup | None
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
    if reduction == "mean_all":
        counted = torch.ones_like(counted)
    share = counted.to(loss.dtype) if weight is None else torch.where(counted, weight, 0.0)
    total = share.sum() if group is None else distributed.summed(share.sum(), group)
    return loss / torch.where(total == 0, torch.ones_like(total), total)


def _of_all_ranks(
    rows: Tensor,
    labels: Tensor,
    ignored: int | None,
    extra: Extra,
    temperature: float | Tensor,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, Extra, float | Tensor]:
    """This rank's rows and labels, then those of the others; samples without labels are numbered over all ranks."""
    counts = distributed.row_counts(labels, group)
    first = sum(counts[: dist.get_rank(group)])
    views = len(rows) // max(len(labels), 1)
    labels = (labels + first if ignored is None else labels).repeat(views)
    begin, end = views * first, views * first + len(rows)
    all_rows, all_labels = distributed.gathered_with_gradient(rows, group), distributed.gathered(labels, group)
    if extra.prototypes is not None:
        extra = replace(extra, prototypes=distributed.shared(extra.prototypes, group))
    if isinstance(temperature, Tensor):
        temperature = distributed.shared(temperature, group)
    own_first = [torch.cat([part[begin:end], part[:begin], part[end:]]) for part in (all_rows, all_labels)]
    return own_first[0], own_first[1], extra, temperature


def _check_options(labels, mask, reduction, contrast_mode, focal_gamma, prototype_weight) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}; allowed are {', '.join(REDUCTIONS)}")
    if contrast_mode not in MODES:
        raise ValueError(f"contrast_mode: got {contrast_mode!r}; allowed are {', '.join(MODES)}")
    if labels is not None and mask is not None:
        raise ValueError("labels and mask both say which rows are positives; give one of them")
    if not 0 <= focal_gamma < math.inf:
        raise ValueError(f"focal_gamma must be at least 0 and finite; got {focal_gamma}")
    if focal_gamma != 0 and mask is not None:
        raise ValueError("focal_gamma needs labels; got a mask")
    if not 0 <= prototype_weight < math.inf:
        raise ValueError(f"prototype_weight must be at least 0 and finite; got {prototype_weight}")


def _checked_extra(
    rows: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    prototypes: Tensor | None,
    prototype_labels: Tensor | None,
    prototype_weight: float,
    prototype_bias: Tensor | None,
    contrast: Tensor | None,
    contrast_labels: Tensor | None,
) -> Extra:
    width = rows.shape[1]
    for name, value in (("prototypes", prototypes), ("contrast", contrast)):
        if value is None:
            continue
        check_features(name, value, width, rows)
        if mask is not None:
            raise ValueError(f"{name} can't be joined with mask, which says nothing of them; give labels")
    if (prototypes is None) != (prototype_labels is None):
        raise ValueError("prototypes and prototype_labels go together; one of them is missing")
    if prototypes is not None:
        prototype_labels = checked_labels("prototype_labels", prototype_labels, len(prototypes), rows)
        if labels is None:
            raise ValueError("prototypes need labels: without them every sample is a class of its own")
    if prototype_bias is not None and (prototypes is None or tuple(prototype_bias.shape) != (len(prototypes),)):
        expected = "there are no prototypes" if prototypes is None else f"it must have shape ({len(prototypes)},)"
        raise ValueError(f"prototype_bias: got shape {tuple(prototype_bias.shape)}; {expected}")
    if contrast_labels is not None:
        if contrast is None or labels is None:
            missing = "contrast" if contrast is None else "labels"
            raise ValueError(f"contrast_labels need {missing}, which is missing")
        contrast_labels = checked_labels("contrast_labels", contrast_labels, len(contrast), rows)
    return Extra(prototypes, prototype_labels, prototype_weight, prototype_bias, contrast, contrast_labels)


def _anchor_weight(
    class_weight: Tensor | None, labels: Tensor | None, ignore_index: int, features: Tensor
) -> Tensor | None:
    """The class weight of each row's label, 0 for ignored rows."""
    if class_weight is None:
        return None
    if labels is None:
        raise ValueError("class_weight needs labels, which are missing")
    if not isinstance(class_weight, Tensor) or class_weight.dim() != 1 or not class_weight.is_floating_point():
        got = tuple(class_weight.shape) if isinstance(class_weight, Tensor) else type(class_weight).__name__
        raise ValueError(f"class_weight must be a floating-point tensor of shape (K,); got {got}")
    if class_weight.device != features.device:
        raise ValueError(
            f"class_weight must be on the device of features, {features.device}; got {class_weight.device}"
        )
    kept = labels != ignore_index
    if features.device.type == "cpu" and not torch.compiler.is_compiling():
        check_labels(labels, len(class_weight), ignore_index)
    picked = class_weight.to(ops.compute_dtype(features.dtype))[torch.where(kept, labels, 0)]
    return torch.where(kept, picked, 0.0)
