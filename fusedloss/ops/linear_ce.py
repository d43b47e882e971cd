"""Softmax cross-entropy of a linear layer whose logits are never stored whole.

``linear_ce``        loss and its gradients in one walk over chunks or tiles of logits.
``linear_stats``     statistics of each row; ``linear_stats_backward`` carries their gradients back, logits formed anew.
``row_norms``        exact lengths, float64, infinite for a row of zeros.
``target_products``  each row's product with the row of its label, or their cosine, in float64.

All read ``core.operands.LinearInputs``; the gradient of norms and products is part of that of ``linear_ce``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedloss.core.operands import (
    LinearInputs,
    LinearMask,
    RowInputs,
    SavedStatistics,
    SoftmaxStatistics,
    StatisticsGrads,
    StatisticsOptions,
)
from fusedloss.core.row_loss import RowOptions
from fusedloss.ops.checks import check_linear_inputs, check_linear_row_tensors
from fusedloss.ops.library import (
    define,
    differentiable_once,
    is_batched,
    is_direct,
    kernel,
    refuse_second,
    register_autograd,
    requires_grad,
    scale_in_place,
)
from fusedloss.ops.softmax_ce import fake_statistics, not_differentiable, statistics_grads

_INPUTS = (
    "Tensor input, Tensor weight, Tensor target, Tensor? input_norm, Tensor? class_norm, Tensor? scale, Tensor? bias,"
    " Tensor? class_weight, Tensor? target_override, Tensor? target_override_grad, Tensor? target_product,"
    " float soft_cap, int ignore_index"
)
_NUM_INPUTS = len(LinearInputs._fields)
_NUM_TENSORS = _NUM_INPUTS - 2
_NO_MASK = LinearMask()


def _new_rows(inputs: LinearInputs) -> Tensor:
    return inputs.input.new_empty(inputs.input.shape[0], dtype=inputs.compute_dtype)


def _new_grads(inputs: LinearInputs, mask: LinearMask) -> list[Tensor]:
    grads = [torch.empty_like(tensor) for tensor, needed in zip(inputs[:2], mask[:2], strict=True) if needed]
    classes = inputs.weight.new_empty(inputs.weight.shape[0], dtype=inputs.compute_dtype)
    grads += [torch.empty_like(classes) for needed in mask[2:4] if needed]
    return grads + [_new_rows(inputs) for needed in mask[4:] if needed]


def _group_ce(*flat: Any) -> tuple[Any, ...]:
    inputs, rows = LinearInputs(*flat[:_NUM_INPUTS]), RowInputs(*flat[_NUM_INPUTS : _NUM_INPUTS + 3])
    options, mean, mask = flat[_NUM_INPUTS + 3 :]
    return inputs, rows, RowOptions(*options), mean, LinearMask(*mask)


def _check_ce(inputs: LinearInputs, rows: RowInputs, *_: Any) -> None:
    check_linear_inputs(inputs)
    check_linear_row_tensors(inputs, **{f"row {name}": value for name, value in rows._asdict().items()})


define(
    "linear_ce",
    f"linear_ce({_INPUTS}, Tensor? row_smoothing, Tensor? row_weight, Tensor? row_penalty_strength,"
    " float[] row_options, bool mean, bool[] output_mask) -> (Tensor, Tensor, Tensor[])",
    group=_group_ce,
    check=_check_ce,
    fake=lambda inputs, rows, options, mean, mask: (
        inputs.input.new_empty((), dtype=inputs.compute_dtype),
        _new_rows(inputs),
        _new_grads(inputs, mask),
    ),
)


def linear_ce(inputs: LinearInputs, rows: RowInputs, options: RowOptions, mean: bool) -> Tensor:
    """The scalar loss, with gradients computed beside it for the inputs that require them."""
    mask = _mask(inputs, rows)
    needs_grad = torch.is_grad_enabled() and (any(mask) or requires_grad(rows.sample_weight))
    if not needs_grad:
        mask = _NO_MASK
    if not is_direct(*_tensors(inputs), *rows):
        loss: Tensor = torch.ops.fusedloss.linear_ce.default(*inputs, *rows, list(options), mean, list(mask))[0]
    elif needs_grad:
        loss = _LinearCE.apply(*inputs, *rows, options, mean, mask)
    else:
        loss = _ce_kernel(inputs, rows, options, mean, mask)[0]
    return loss


def _tensors(inputs: LinearInputs) -> tuple[Tensor | None, ...]:
    # By name: torch.compile of torch 2.8 can't trace a slice of a named tuple.
    return (
        inputs.input,
        inputs.weight,
        inputs.target,
        inputs.input_norm,
        inputs.class_norm,
        inputs.scale,
        inputs.bias,
        inputs.class_weight,
        inputs.target_override,
        inputs.target_override_grad,
        inputs.target_product,
    )


def _ce_kernel(inputs: LinearInputs, *arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    result: tuple[Tensor, Tensor, list[Tensor]]
    result = kernel("linear_ce", "linear_ce", inputs.input.device.type)(inputs, *arguments)
    return result


class _LinearCE(torch.autograd.Function):
    """The gradients leave with the forward; the first backward hands them on, a later one computes them again."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> Tensor:
        inputs, rows, options, mean, mask = _group_ce(*flat)
        loss, ctx.row_loss, ctx.grads = _ce_kernel(inputs, rows, options, mean, mask)
        ctx.numbers = (inputs.soft_cap, inputs.ignore_index, options, mean, mask)
        ctx.save_for_backward(*inputs[:_NUM_TENSORS], *rows)
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> Any:
        tensors, (soft_cap, ignore_index, options, mean, mask) = ctx.saved_tensors, ctx.numbers
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            inputs = LinearInputs._make((*tensors[:_NUM_TENSORS], soft_cap, ignore_index))
            grads = _ce_kernel(inputs, RowInputs(*tensors[_NUM_TENSORS:]), options, mean, mask)[2]
        if is_batched(upstream):
            grads = [grad * upstream for grad in grads]
        else:
            scale_in_place(grads, upstream)
        row_weight = ctx.row_loss * upstream if ctx.needs_input_grad[_NUM_INPUTS + 1] else None
        return _by_argument(grads, mask, row_weight)


def _setup_ce(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    given, rows, options, mean, mask = _group_ce(*inputs)
    ctx.numbers = (given.soft_cap, given.ignore_index, options, mean, mask)
    _, row_loss, grads = output
    ctx.mark_non_differentiable(row_loss, *grads)
    ctx.save_for_backward(*given[:_NUM_TENSORS], *rows, row_loss, *grads)


@differentiable_once
def _backward_ce(ctx: Any, grad_loss: Tensor, *_: Any) -> Any:
    soft_cap, ignore_index, options, mean, mask = ctx.numbers
    saved, count = ctx.saved_tensors, _NUM_TENSORS + 3
    tensors, rows, row_loss, grads = saved[:_NUM_TENSORS], saved[_NUM_TENSORS:count], saved[count], saved[count + 1 :]
    need = ctx.needs_input_grad
    needed = _needed(need)
    if any(want and not made for want, made in zip(needed, mask, strict=True)):
        # Recorded where these inputs required no gradient.
        flat = (*tensors, soft_cap, ignore_index, *rows, list(options), mean, list(needed))
        grads, mask = torch.ops.fusedloss.linear_ce.default(*flat)[2], needed
    row_weight = row_loss * grad_loss if need[_NUM_INPUTS + 1] else None
    return _by_argument([grad * grad_loss for grad in grads], mask, row_weight)


register_autograd("linear_ce", _setup_ce, _backward_ce)


def _group_stats(*flat: Any) -> tuple[Any, ...]:
    return LinearInputs(*flat[:_NUM_INPUTS]), StatisticsOptions(*flat[_NUM_INPUTS:])


def _logits_placeholder(inputs: LinearInputs) -> Tensor:
    """Shape, type and device of the logits in one element of memory."""
    one = inputs.input.new_empty((), dtype=inputs.input.dtype)
    return one.expand(inputs.input.shape[0], inputs.weight.shape[0])


define(
    "linear_ce",
    f"linear_stats({_INPUTS}, float penalty_margin, bool smooth_loss, bool hinge, bool prediction)"
    f" -> ({', '.join(['Tensor'] * 10)})",
    group=_group_stats,
    check=lambda inputs, options: check_linear_inputs(inputs),
    fake=lambda inputs, options: tuple(fake_statistics(_logits_placeholder(inputs), options)),
)


def linear_stats(inputs: LinearInputs, options: StatisticsOptions) -> SoftmaxStatistics:
    """The statistics of each row, differentiable in the six that ``row_loss.Statistics`` names."""
    if not is_direct(*_tensors(inputs)):
        return SoftmaxStatistics(*torch.ops.fusedloss.linear_stats.default(*inputs, *options))
    if torch.is_grad_enabled() and any(_mask(inputs, RowInputs())):
        return SoftmaxStatistics(*_LinearStatistics.apply(*inputs, *options))
    return SoftmaxStatistics(*kernel("linear_ce", "linear_stats", inputs.input.device.type)(inputs, options))


class _LinearStatistics(torch.autograd.Function):
    """Saves three numbers per row; the backward forms the logits again."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> tuple[Tensor, ...]:
        inputs, options = _group_stats(*flat)
        output = tuple(kernel("linear_ce", "linear_stats", inputs.input.device.type)(inputs, options))
        _setup_stats(ctx, flat, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return _backward_stats(ctx, *grads)


def _setup_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, options = _group_stats(*inputs)
    statistics = SoftmaxStatistics(*output)
    ctx.mark_non_differentiable(*not_differentiable(statistics, options))
    ctx.set_materialize_grads(False)
    ctx.numbers = (given.soft_cap, given.ignore_index)
    ctx.penalty_margin = options.penalty_margin
    ctx.save_for_backward(*given[:_NUM_TENSORS], statistics.row_max, statistics.row_sum, statistics.one_minus_pt)


@differentiable_once
def _backward_stats(ctx: Any, *grads: Tensor | None) -> Any:
    mask = _needed((*ctx.needs_input_grad[:_NUM_INPUTS], *(False,) * 3))
    inputs = LinearInputs(*ctx.saved_tensors[:_NUM_TENSORS], *ctx.numbers)
    saved = SavedStatistics(*ctx.saved_tensors[_NUM_TENSORS:])
    result = linear_stats_backward(inputs, saved, ctx.penalty_margin, statistics_grads(grads), mask)
    of_inputs = _by_argument(result, mask, None)[:_NUM_INPUTS]
    return *of_inputs, *(None,) * (len(ctx.needs_input_grad) - _NUM_INPUTS)


register_autograd("linear_stats", _setup_stats, _backward_stats)


def _group_stats_backward(*flat: Any) -> tuple[Any, ...]:
    inputs, rest = LinearInputs(*flat[:_NUM_INPUTS]), flat[_NUM_INPUTS:]
    return inputs, SavedStatistics(*rest[:3]), rest[3], StatisticsGrads(*rest[4:10]), LinearMask(*rest[10])


def _check_stats_backward(
    inputs: LinearInputs, saved: SavedStatistics, _: float, grads: StatisticsGrads, *__: Any
) -> None:
    check_linear_inputs(inputs)
    of_grads = {f"grad_{name}": value for name, value in grads._asdict().items()}
    check_linear_row_tensors(inputs, **saved._asdict(), **of_grads)


define(
    "linear_ce",
    f"linear_stats_backward({_INPUTS}, Tensor row_max, Tensor row_sum, Tensor one_minus_pt, float penalty_margin,"
    f" {', '.join(f'Tensor? grad_{name}' for name in StatisticsGrads._fields)}, bool[] output_mask) -> Tensor[]",
    group=_group_stats_backward,
    check=_check_stats_backward,
    fake=lambda inputs, saved, penalty_margin, grads, mask: _new_grads(inputs, mask),
)
refuse_second("linear_stats_backward")


def linear_stats_backward(
    inputs: LinearInputs, saved: SavedStatistics, penalty_margin: float, grads: StatisticsGrads, mask: LinearMask
) -> list[Tensor]:
    """The gradients that `mask` names, from those of the statistics."""
    if not is_direct(*_tensors(inputs), *saved, *grads):
        flat = (*inputs, *saved, penalty_margin, *grads, list(mask))
        result: list[Tensor] = torch.ops.fusedloss.linear_stats_backward.default(*flat)
    else:
        run = kernel("linear_ce", "linear_stats_backward", inputs.input.device.type)
        result = run(inputs, saved, penalty_margin, grads, mask)
    return result


def _check_rows(rows: Tensor) -> None:
    if rows.dim() != 2:
        raise ValueError(f"rows must have shape (R, D); got {tuple(rows.shape)}")


define(
    "linear_ce",
    "row_norms(Tensor rows) -> Tensor",
    group=lambda rows: (rows,),
    check=_check_rows,
    fake=lambda rows: rows.new_empty(rows.shape[0], dtype=torch.float64),
)


def row_norms(rows: Tensor) -> Tensor:
    """Lengths of the rows ``(R, D)`` in float64, infinite for a row of zeros; detached."""
    rows = rows.detach()
    run = (
        kernel("linear_ce", "row_norms", rows.device.type) if is_direct(rows) else torch.ops.fusedloss.row_norms.default
    )
    norms: Tensor = run(rows)
    return norms


def _setup_norms(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _backward_norms(ctx: Any, grad: Tensor) -> Tensor:
    rows, norm = ctx.saved_tensors
    direction: Tensor = (grad / norm).unsqueeze(1).mul(rows)
    return direction.to(rows.dtype)


register_autograd("row_norms", _setup_norms, _backward_norms)


def _group_products(*flat: Any) -> tuple[Any, ...]:
    input, weight, target, input_norm, class_norm, ignore_index = flat
    return (LinearInputs(input, weight, target, input_norm, class_norm, ignore_index=ignore_index),)


define(
    "linear_ce",
    "target_products(Tensor input, Tensor weight, Tensor target, Tensor? input_norm, Tensor? class_norm,"
    " int ignore_index) -> Tensor",
    group=_group_products,
    check=check_linear_inputs,
    fake=lambda inputs: inputs.input.new_empty(inputs.input.shape[0], dtype=torch.float64),
)
# Called on detached tensors: the gradient of a target's product is part of linear_ce's.
refuse_second("target_products")


def target_products(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    input_norm: Tensor | None,
    class_norm: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """Each row's product with the row of its label (the cosine, with norms) in float64, 0 if ignored; detached."""
    tensors = (input.detach(), weight.detach(), target, input_norm, class_norm)
    if not is_direct(*tensors):
        products: Tensor = torch.ops.fusedloss.target_products.default(*tensors, ignore_index)
    else:
        inputs = LinearInputs(*tensors, ignore_index=ignore_index)
        products = kernel("linear_ce", "target_products", input.device.type)(inputs)
    return products


def _mask(inputs: LinearInputs, rows: RowInputs) -> LinearMask:
    return LinearMask(
        inputs.input.requires_grad,
        inputs.weight.requires_grad,
        requires_grad(inputs.scale),
        requires_grad(inputs.bias),
        requires_grad(inputs.target_override),
        requires_grad(rows.label_smoothing),
        requires_grad(rows.penalty_strength),
    )


def _needed(need: Sequence[bool]) -> LinearMask:
    """The mask of the schema's arguments that need a gradient: inputs, then the three of RowInputs."""
    of = dict(zip((*LinearInputs._fields, "label_smoothing", "sample_weight", "penalty_strength"), need, strict=False))
    return LinearMask(*(of[name] for name in LinearMask._fields))


def _by_argument(grads: Sequence[Tensor], mask: LinearMask, row_weight: Tensor | None) -> tuple[Tensor | None, ...]:
    """One gradient, or None, for each argument of linear_ce's schema."""
    made = iter(grads)
    grad = LinearMask(*(next(made) if needed else None for needed in mask))  # type: ignore[arg-type]
    of = {**grad._asdict(), "sample_weight": row_weight}
    names = (*LinearInputs._fields, *RowInputs._fields)
    return *(of.get(name) for name in names), None, None, None
