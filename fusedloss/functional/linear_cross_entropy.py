"""Softmax cross-entropy of a linear layer: the logits are formed, used and forgotten chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, overload

import torch
from torch import Tensor

from fusedloss import ops
from fusedloss.core.operands import LinearInputs
from fusedloss.core.row_loss import MarginPenalty, RowSettings
from fusedloss.functional import sharded_classes
from fusedloss.functional.arguments import LossArguments, checked
from fusedloss.functional.engine import (
    RowStatistics,
    backend_of,
    in_one_operation,
    loss_of,
    one_denominator,
    reduced,
    row_values,
    statistics_options,
)
from fusedloss.functional.linear_head import LinearHead, checked_head
from fusedloss.functional.partial_fc import sampled
from fusedloss.terms import AffineTerm, SoftCap, Term, fold_affine, label_chain


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    normalize: bool = False,
    sample_rate: float | None = None,
    group: object = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float | Tensor = 0.0,
    terms: Sequence[Term] = (),
    focal_gamma: float = 0.0,
    poly_epsilon: float = 0.0,
    z_loss: float = 0.0,
    margin_penalty: MarginPenalty | None = None,
    sample_weight: Tensor | None = None,
    return_stats: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    normalize: bool = False,
    sample_rate: float | None = None,
    group: object = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float | Tensor = 0.0,
    terms: Sequence[Term] = (),
    focal_gamma: float = 0.0,
    poly_epsilon: float = 0.0,
    z_loss: float = 0.0,
    margin_penalty: MarginPenalty | None = None,
    sample_weight: Tensor | None = None,
    return_stats: Literal[True],
) -> tuple[Tensor, RowStatistics]: ...


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    normalize: bool = False,
    sample_rate: float | None = None,
    group: object = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float | Tensor = 0.0,
    terms: Sequence[Term] = (),
    focal_gamma: float = 0.0,
    poly_epsilon: float = 0.0,
    z_loss: float = 0.0,
    margin_penalty: MarginPenalty | None = None,
    sample_weight: Tensor | None = None,
    return_stats: bool,
) -> Tensor | tuple[Tensor, RowStatistics]: ...


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    normalize: bool = False,
    sample_rate: float | None = None,
    group: object = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float | Tensor = 0.0,
    terms: Sequence[Term] = (),
    focal_gamma: float = 0.0,
    poly_epsilon: float = 0.0,
    z_loss: float = 0.0,
    margin_penalty: MarginPenalty | None = None,
    sample_weight: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, RowStatistics]:
    """Softmax cross-entropy of a linear layer's logits, ``x . w_k + b_k``, which are never stored whole.

    Equals ``fusedloss.cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)``; with `normalize` rows
    of `input` and of `linear_weight` are divided by their lengths first, so that logits are cosines (ArcFace: add
    ``terms=[AngularMargin(0.5), Scale(30.0)]``). Memory beyond gradients is a chunk of logits, some 60 MB at most.

    Args:
        input: features ``(B, D)`` or ``(D,)``; float32, float64, bfloat16 or float16.
        linear_weight: ``(K, D)``. Products are formed in the wider type of the two, under autocast in its type.
        target: labels ``(B,)`` or ``()``, or probabilities ``(B, K)`` or ``(K,)``.
        linear_bias: ``(K,)``.
        normalize: cosine logits; a row of zeros has cosine 0 with everything, and gradient 0.
        sample_rate: the share of classes kept in the softmax, drawn at each call: the batch's own always are, and no
            fewer than there are rows (PartialFC). Rows of other classes get gradient 0.
        group: a ``torch.distributed`` process group over whose ranks the classes are spread: `linear_weight`, `weight`
            and terms are those of this rank's contiguous share, `input` and `target` the same on all ranks, labels
            global. Value and gradients are those of one process; without smoothing, penalty, sampling and statistics.
        weight, ignore_index, reduction, label_smoothing, terms, focal_gamma, poly_epsilon, z_loss, margin_penalty,
            sample_weight, return_stats: as in ``fusedloss.cross_entropy``.

    With ``reduction="none"``, `return_stats` or float16 the logits are formed once more in the backward. A soft cap
    that follows another term, a bias or a normalisation has the logits stored.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that don't fit; the message names the argument.
        IndexError: a label outside ``[0, K)`` on the CPU (a device assertion on a GPU).

    >>> import torch, fusedloss
    >>> features, classes = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    >>> fusedloss.linear_cross_entropy(features, classes, torch.tensor([0, 1]))
    tensor(0.0725)
    >>> fusedloss.linear_cross_entropy(features, classes, torch.tensor([0, 1]), normalize=True)
    tensor(0.3133)
    """
    head = checked_head(input, linear_weight, linear_bias, normalize)
    settings = RowSettings(label_smoothing, focal_gamma, poly_epsilon, z_loss, margin_penalty)
    arguments = checked(
        head.logits_placeholder(),
        target,
        weight,
        ignore_index,
        reduction,
        terms,
        settings,
        sample_weight,
        labels_may_be_remote=group is not None,
    )
    if group is not None:
        return _sharded(arguments, head, reduction, group, sample_rate is not None or return_stats)
    kept = None
    if sample_rate is not None:
        arguments, head, kept = sampled(arguments, head, sample_rate)
    result = _loss(arguments, head, reduction, return_stats)
    if kept is None or not isinstance(result, tuple):
        return result
    loss, statistics = result
    return loss, statistics._replace(prediction=kept[statistics.prediction])


def _sharded(arguments: LossArguments, head: LinearHead, reduction: str, group: object, more: bool) -> Tensor:
    if more:
        raise ValueError("group must be None with sample_rate or return_stats; got a process group")
    if backend_of(arguments, False) == "reference":
        raise ValueError("group must be None with the reference backend; got a process group")
    local, head, shard = sharded_classes.localized(arguments, head, group)
    if not _capped_first(local, head):
        raise ValueError("group must be None where a soft cap follows a term, a bias or normalize; got a process group")
    found = ops.linear_stats(_inputs(local, head), statistics_options(local, False))
    row_loss, weight = sharded_classes.joined(found, arguments, local, shard)
    return sharded_classes.reduced(row_loss, weight, arguments, reduction)


def _loss(
    arguments: LossArguments, head: LinearHead, reduction: str, return_stats: bool
) -> Tensor | tuple[Tensor, RowStatistics]:
    if backend_of(arguments, return_stats) == "reference" or not _capped_first(arguments, head):
        return loss_of(replace(arguments, logits=head.logits()), reduction, return_stats)
    inputs = _inputs(arguments, head)
    requires_grad = torch.is_grad_enabled() and (head.input.requires_grad or head.weight.requires_grad)
    if in_one_operation(arguments, reduction, return_stats, head.input.dtype, requires_grad):
        rows, mean = one_denominator(arguments, reduction == "mean")
        return ops.linear_ce(inputs, rows, arguments.options, mean)
    found = ops.linear_stats(inputs, statistics_options(arguments, return_stats))
    return reduced(arguments, row_values(found, arguments, return_stats), reduction)


def _capped_first(arguments: LossArguments, head: LinearHead) -> bool:
    """Whether a soft cap, if there is one, sees the products themselves."""
    caps = [index for index, term in enumerate(arguments.terms) if isinstance(term, SoftCap)]
    if not caps:
        return True
    cap = arguments.terms[0]
    return caps == [0] and not isinstance(cap.cap, Tensor) and head.bias is None and not head.normalize  # type: ignore[attr-defined]


def _inputs(arguments: LossArguments, head: LinearHead) -> LinearInputs:
    """What the operations read: norms, terms folded, the label's logit after margins."""
    terms, soft_cap = arguments.terms, 0.0
    affine = [term for term in terms if isinstance(term, AffineTerm)]
    if terms and isinstance(terms[0], SoftCap):
        soft_cap = float(terms[0].cap)
    scale, bias = fold_affine(affine, arguments.num_classes, arguments.dtype, head.input.device)
    if head.bias is not None:
        offset = head.bias.to(arguments.dtype).contiguous()
        offset = offset if scale is None else offset * scale
        bias = offset if bias is None else bias + offset
    x, w = head.input, head.weight
    input_norm, class_norm = (ops.row_norms(x), ops.row_norms(w)) if head.normalize else (None, None)
    override = override_grad = product = None
    if arguments.has_margin:
        product = ops.target_products(x, w, arguments.target, input_norm, class_norm, arguments.ignore_index)
        override, override_grad = _after_margin(product, arguments, head)
    return LinearInputs(
        x,
        w,
        arguments.target,
        input_norm,
        class_norm,
        scale,
        bias,
        arguments.class_weight,
        override,
        override_grad,
        product,
        soft_cap,
        arguments.ignore_index,
    )


def _after_margin(product: Tensor, arguments: LossArguments, head: LinearHead) -> tuple[Tensor, Tensor]:
    """The label's logit through all terms, and its derivative in the product.

    In double: an angular margin is steep where rows are nearly parallel.
    """
    classes = arguments.label_columns()
    z = product if head.bias is None else product + head.bias.double()[classes]
    value, grad = label_chain(z, classes, arguments.terms)
    return value.to(arguments.dtype).contiguous(), grad.contiguous()
