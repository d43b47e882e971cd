"""Cross-entropy of a linear layer in plain PyTorch, logits stored, plain or as cosines. Autograd derives gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedloss.backends.reference import softmax_ce as softmax
from fusedloss.core.checks import check_labels
from fusedloss.core.normalize import unit_rows
from fusedloss.core.operands import (
    LinearInputs,
    LinearMask,
    LogitInputs,
    RowInputs,
    SavedStatistics,
    SoftmaxStatistics,
    StatisticsGrads,
    StatisticsOptions,
)
from fusedloss.core.reduce import mean_denominator
from fusedloss.core.row_loss import RowOptions, needs_hinge, row_loss


def linear_ce(
    inputs: LinearInputs, rows: RowInputs, options: RowOptions, mean: bool, mask: LinearMask
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The scalar loss, the loss of each row, and the gradients of the scalar one that `mask` names."""
    _check(inputs)
    leaves, of_rows = _leaves(inputs, mask), _row_leaves(rows, mask)
    with torch.enable_grad():
        logits = _logit_inputs(leaves)
        margin = options.penalty_margin if needs_hinge(options, rows) else None
        values = row_loss(softmax.statistics_of(logits, margin), options, of_rows, len(inputs.weight))
        values = softmax.kept_rows(values, logits)
        total = values if rows.sample_weight is None else values * rows.sample_weight
        loss = total.sum()
        if mean:
            loss = loss / mean_denominator(inputs.target, inputs.class_weight, inputs.ignore_index, dtype=loss.dtype)
    return loss.detach(), values.detach(), _grads(loss, leaves, of_rows, mask, inputs)


def linear_stats(inputs: LinearInputs, options: StatisticsOptions) -> SoftmaxStatistics:
    """The statistics of each row; those that were not asked for are empty."""
    _check(inputs)
    with torch.no_grad():
        return softmax.softmax_stats(_logit_inputs(inputs), options)


def linear_stats_backward(
    inputs: LinearInputs, saved: SavedStatistics, penalty_margin: float, grads: StatisticsGrads, mask: LinearMask
) -> list[Tensor]:
    """The gradients that `mask` names, from those of the statistics, which are computed again."""
    leaves = _leaves(inputs, mask)
    with torch.enable_grad():
        statistics = softmax.statistics_of(_logit_inputs(leaves), None if grads.hinge is None else penalty_margin)
        total = softmax.weighted_total(statistics, grads)
    return _grads(total, leaves, RowInputs(), mask, inputs)


def row_norms(rows: Tensor) -> Tensor:
    """Lengths in float64, infinite for a row of zeros."""
    norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return torch.where(norm == 0, torch.inf, norm)


def target_products(inputs: LinearInputs) -> Tensor:
    """Each row's product with the row of its label, over both norms where given, in float64; 0 if ignored."""
    _check(inputs)
    kept = inputs.target != inputs.ignore_index
    label = torch.where(kept, inputs.target, 0).clamp(0, len(inputs.weight) - 1)
    product = (inputs.input.double() * inputs.weight[label].double()).sum(1)
    if inputs.input_norm is not None and inputs.class_norm is not None:
        product = product / inputs.input_norm / inputs.class_norm[label]
    return torch.where(kept, product, 0.0)


def linear_logits(input: Tensor, weight: Tensor, bias: Tensor | None, normalize: bool) -> Tensor:
    """``x . w + bias`` for rows of `input` (B, D) and of `weight` (K, D); with `normalize` of their directions.

    Sums are kept in float32 at least, products are exact in it: 16-bit operands lose nothing here.
    """
    dtype = torch.promote_types(torch.promote_types(input.dtype, weight.dtype), torch.float32)
    x, w = input.to(dtype), weight.to(dtype)
    if normalize:
        x, w = unit_rows(x), unit_rows(w)
    with torch.autocast(input.device.type, enabled=False):
        return torch.nn.functional.linear(x, w, None if bias is None else bias.to(dtype))


def _check(inputs: LinearInputs) -> None:
    if inputs.input.device.type == "cpu" and not inputs.target.is_floating_point():
        check_labels(inputs.target, len(inputs.weight), inputs.ignore_index, "target")


def _leaf(tensor: Tensor | None, needed: bool) -> Tensor | None:
    return tensor if tensor is None else tensor.detach().requires_grad_(needed)


def _leaves(inputs: LinearInputs, mask: LinearMask) -> LinearInputs:
    classes = inputs.weight.new_ones(len(inputs.weight), dtype=inputs.compute_dtype)
    scale = classes if inputs.scale is None and mask.scale else inputs.scale
    bias = torch.zeros_like(classes) if inputs.bias is None and mask.bias else inputs.bias
    dtype = torch.promote_types(inputs.compute_dtype, inputs.weight.dtype)
    return inputs._replace(
        input=inputs.input.detach().to(dtype).requires_grad_(mask.input),
        weight=inputs.weight.detach().to(dtype).requires_grad_(mask.weight),
        scale=_leaf(scale, mask.scale),
        bias=_leaf(bias, mask.bias),
        target_override=_leaf(inputs.target_override, mask.target_override),
    )


def _row_leaves(rows: RowInputs, mask: LinearMask) -> RowInputs:
    smoothing, strength = mask.label_smoothing, mask.penalty_strength
    tensors = (rows.label_smoothing, rows.sample_weight, rows.penalty_strength)
    return RowInputs(*map(_leaf, tensors, (smoothing, False, strength)))


def _logit_inputs(inputs: LinearInputs) -> LogitInputs:
    """The logits, and at the labels what replaces them: a function of the label's product in float64."""
    normalize = inputs.input_norm is not None
    dtype = inputs.compute_dtype
    logits = linear_logits(inputs.input, inputs.weight, None, normalize).to(dtype)
    override = inputs.target_override
    if override is not None and inputs.target_override_grad is not None:
        kept = inputs.target != inputs.ignore_index
        label = torch.where(kept, inputs.target, 0).clamp(0, len(inputs.weight) - 1)
        x, w = inputs.input.double(), inputs.weight[label].double()
        product = (unit_rows(x) * unit_rows(w) if normalize else x * w).sum(1)
        change = inputs.target_override_grad * (product - product.detach())
        # Adding nothing but a gradient: 0 * inf of a masked label would be NaN.
        override = override + torch.where(kept, change, 0.0).to(dtype)
    return LogitInputs(
        logits,
        inputs.target,
        inputs.scale,
        inputs.bias,
        inputs.class_weight,
        override,
        None,
        inputs.soft_cap,
        inputs.ignore_index,
    )


def _grads(
    total: Tensor, leaves: LinearInputs, rows: RowInputs, mask: LinearMask, inputs: LinearInputs
) -> list[Tensor]:
    names = [name for name, needed in mask._asdict().items() if needed]
    if not names:
        return []
    of = {**leaves._asdict(), **rows._asdict()}
    tensors = [of[name] for name in names]
    if not total.requires_grad:
        grads: tuple[Tensor, ...] = tuple(torch.zeros_like(tensor) for tensor in tensors)
    else:
        grads = torch.autograd.grad(total, tensors, allow_unused=True, materialize_grads=True)
    stored = {"input": inputs.input.dtype, "weight": inputs.weight.dtype}
    return [grad.to(stored.get(name, grad.dtype)) for name, grad in zip(names, grads, strict=True)]
