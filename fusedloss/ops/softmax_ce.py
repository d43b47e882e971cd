"""Softmax cross-entropy with its gradients, row statistics, and the backward of the statistics.

``softmax_ce``              loss and its gradients in one read of the logits: what trainers run.
``softmax_stats``           statistics of each row; ``softmax_stats_backward`` carries any gradient of them back.

All read ``core.operands.LogitInputs``; an operation's schema names its fields one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedloss.core.dtypes import compute_dtype
from fusedloss.core.operands import (
    LogitInputs,
    RowInputs,
    SavedStatistics,
    SoftmaxMask,
    SoftmaxStatistics,
    StatisticsGrads,
    StatisticsOptions,
)
from fusedloss.core.row_loss import RowOptions
from fusedloss.ops.checks import check_logit_inputs, check_row_tensors
from fusedloss.ops.library import (
    define,
    differentiable_once,
    is_batched,
    is_direct,
    kernel,
    refuse_batched,
    refuse_second,
    register_autograd,
    requires_grad,
    scale_in_place,
)
from fusedloss.ops.upstream import expected_upstream, note_upstream

_INPUTS = (
    "Tensor logits, Tensor target, Tensor? scale, Tensor? bias, Tensor? class_weight, Tensor? target_override,"
    " Tensor? target_override_grad, float soft_cap, int ignore_index"
)
_NUM_INPUTS = len(LogitInputs._fields)
_NO_MASK = SoftmaxMask()
_LOGITS_ONLY = SoftmaxMask(logits=True)


def _new_rows(logits: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    shape = (logits.shape[0], *logits.shape[2:])
    return logits.new_empty(shape, dtype=dtype or compute_dtype(logits.dtype))


def _new_grads(logits: Tensor, mask: SoftmaxMask) -> list[Tensor]:
    grads = [torch.empty_like(logits)] if mask.logits else []
    if mask.affine:
        grads += [logits.new_empty(logits.shape[1], dtype=compute_dtype(logits.dtype)) for _ in range(2)]
    return grads + [_new_rows(logits) for needed in mask[2:] if needed]


def _group_ce(*flat: Any) -> tuple[Any, ...]:
    inputs, rows = LogitInputs(*flat[:_NUM_INPUTS]), RowInputs(*flat[_NUM_INPUTS : _NUM_INPUTS + 3])
    options, mean, mask, grad_scale = flat[_NUM_INPUTS + 3 :]
    return inputs, rows, RowOptions(*options), mean, SoftmaxMask(*mask), grad_scale


def _check_ce(inputs: LogitInputs, rows: RowInputs, *_: Any) -> None:
    check_logit_inputs(inputs)
    check_row_tensors(inputs.logits, **{f"row {name}": value for name, value in rows._asdict().items()})


define(
    "softmax_ce",
    f"softmax_ce({_INPUTS}, Tensor? row_smoothing, Tensor? row_weight, Tensor? row_penalty_strength,"
    " float[] row_options, bool mean, bool[] output_mask, float grad_scale) -> (Tensor, Tensor, Tensor[])",
    group=_group_ce,
    check=_check_ce,
    fake=lambda inputs, rows, options, mean, mask, grad_scale: (
        inputs.logits.new_empty((), dtype=compute_dtype(inputs.logits.dtype)),
        _new_rows(inputs.logits),
        _new_grads(inputs.logits, mask),
    ),
)


def softmax_ce(inputs: LogitInputs, rows: RowInputs, options: RowOptions, mean: bool) -> Tensor:
    """The scalar loss, with gradients computed beside it for the inputs that require them."""
    mask = _ce_mask(inputs, rows) if torch.is_grad_enabled() else _NO_MASK
    needs_grad = mask != _NO_MASK or (torch.is_grad_enabled() and requires_grad(rows.sample_weight))
    if not is_direct(*_tensors(inputs), *rows):
        flat = (*inputs, *rows, list(options), mean, list(mask), 1.0)
        loss: Tensor = torch.ops.fusedloss.softmax_ce.default(*flat)[0]
    elif needs_grad:
        loss = _SoftmaxCE.apply(*_tensors(inputs), *rows, (inputs, rows, options, mean, mask))
    else:
        loss = _ce_kernel(inputs, rows, options, mean, mask, 1.0)[0]
    return loss


def _tensors(inputs: LogitInputs) -> tuple[Tensor | None, ...]:
    # By name: torch.compile of torch 2.8 can't trace a slice of a named tuple.
    return (
        inputs.logits,
        inputs.target,
        inputs.scale,
        inputs.bias,
        inputs.class_weight,
        inputs.target_override,
        inputs.target_override_grad,
    )


def _ce_kernel(inputs: LogitInputs, *arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    result: tuple[Tensor, Tensor, list[Tensor]]
    result = kernel("softmax_ce", "softmax_ce", "cuda" if inputs.logits.is_cuda else "cpu")(inputs, *arguments)
    return result


class _SoftmaxCE(torch.autograd.Function):
    """The gradients leave with the forward; the first backward hands them on, a later one computes them again.

    Tensors come one by one, for autograd, and then once more as the kernel takes them, with the options.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, (inputs, rows, options, mean, mask) = arguments
        logits = inputs.logits
        ctx.loss_key = (logits.shape[1], logits.dtype, options)
        ctx.written = 1.0 if logits.is_cuda else expected_upstream(ctx.loss_key)
        ctx.numbers = (inputs.soft_cap, inputs.ignore_index, options, mean, mask)
        loss, ctx.row_loss, ctx.grads = _ce_kernel(inputs, rows, options, mean, mask, ctx.written)
        ctx.save_for_backward(*tensors)
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> Any:
        grads, mask = ctx.grads, ctx.numbers[4]
        ctx.grads = None
        if is_batched(upstream):
            grads = _again(ctx, 1.0) if grads is None or ctx.written != 1.0 else grads
            grads = [grad * upstream for grad in grads]
        else:
            grads = _again(ctx, ctx.written) if grads is None else grads
            factor = scale_in_place(grads, upstream, ctx.written)
            if factor is not None:
                note_upstream(ctx.loss_key, factor)
        need = ctx.needs_input_grad
        row_weight = ctx.row_loss * upstream if need[8] else None
        if mask == _LOGITS_ONLY:
            return grads[0], None, None, None, None, None, None, None, row_weight, None, None
        logits, scale, bias, override, smoothing, strength = _by_name(grads, mask)
        scale, bias = scale if need[2] else None, bias if need[3] else None
        return logits, None, scale, bias, None, override, None, smoothing, row_weight, strength, None


def _again(ctx: Any, grad_scale: float) -> list[Tensor]:
    tensors, (soft_cap, ignore_index, options, mean, mask) = ctx.saved_tensors, ctx.numbers
    inputs = LogitInputs._make((*tensors[:7], soft_cap, ignore_index))
    return _ce_kernel(inputs, RowInputs(*tensors[7:]), options, mean, mask, grad_scale)[2]


def _setup_ce(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    given, rows, options, mean, mask, grad_scale = _group_ce(*inputs)
    ctx.numbers = (given.soft_cap, given.ignore_index, options, mean, mask, grad_scale)
    _, row_loss, grads = output
    ctx.mark_non_differentiable(row_loss, *grads)
    ctx.save_for_backward(*given[:7], *rows, row_loss, *grads)


@differentiable_once
def _backward_ce(ctx: Any, grad_loss: Tensor, *_: Any) -> Any:
    soft_cap, ignore_index, options, mean, mask, grad_scale = ctx.numbers
    tensors, row_loss, grads = ctx.saved_tensors[:10], ctx.saved_tensors[10], ctx.saved_tensors[11:]
    need = ctx.needs_input_grad
    needed = SoftmaxMask(need[0], need[2] or need[3], need[5], need[9], need[11])
    if any(want and not made for want, made in zip(needed, mask, strict=True)):
        # Recorded where these inputs required no gradient.
        flat = (*tensors[:7], soft_cap, ignore_index, *tensors[7:], list(options), mean, list(needed), grad_scale)
        grads, mask = torch.ops.fusedloss.softmax_ce.default(*flat)[2], needed
    factor = grad_loss if grad_scale == 1.0 else grad_loss / grad_scale
    row_weight = row_loss * grad_loss if need[10] else None
    logits, scale, bias, override, smoothing, strength = _by_name([grad * factor for grad in grads], mask)
    of_rows = (smoothing if need[9] else None, row_weight, strength if need[11] else None)
    return *_of_inputs(logits, scale, bias, override, need), *of_rows, None, None, None, None


register_autograd("softmax_ce", _setup_ce, _backward_ce)


def _group_stats(*flat: Any) -> tuple[Any, ...]:
    return LogitInputs(*flat[:_NUM_INPUTS]), StatisticsOptions(*flat[_NUM_INPUTS:])


def fake_statistics(logits: Tensor, options: StatisticsOptions) -> SoftmaxStatistics:
    """Tensors of the statistics' shapes; those that were not asked for are empty."""

    def rows(needed: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or compute_dtype(logits.dtype)
        return _new_rows(logits, dtype) if needed else logits.new_empty(0, dtype=dtype)

    return SoftmaxStatistics(
        row_max=rows(),
        row_sum=rows(),
        log_sum_exp=rows(),
        target_logit=rows(),
        cross_entropy=rows(),
        smooth_loss=rows(options.smooth_loss),
        one_minus_pt=rows(),
        hinge=rows(options.hinge),
        prediction=rows(options.prediction, torch.int64),
        confidence=rows(options.prediction),
    )


define(
    "softmax_ce",
    f"softmax_stats({_INPUTS}, float penalty_margin, bool smooth_loss, bool hinge, bool prediction)"
    f" -> ({', '.join(['Tensor'] * 10)})",
    group=_group_stats,
    check=lambda inputs, options: check_logit_inputs(inputs),
    fake=lambda inputs, options: tuple(fake_statistics(inputs.logits, options)),
)


def softmax_stats(inputs: LogitInputs, options: StatisticsOptions) -> SoftmaxStatistics:
    """The statistics of each row, differentiable in the six that ``row_loss.Statistics`` names."""
    tensors = _tensors(inputs)
    if not is_direct(*tensors):
        return SoftmaxStatistics(*torch.ops.fusedloss.softmax_stats.default(*inputs, *options))
    if torch.is_grad_enabled() and any(map(requires_grad, tensors)):
        return SoftmaxStatistics(*_SoftmaxStatistics.apply(*inputs, *options))
    return SoftmaxStatistics(*kernel("softmax_ce", "softmax_stats", inputs.logits.device.type)(inputs, options))


class _SoftmaxStatistics(torch.autograd.Function):
    """Saves three numbers per row; the backward reads the saved logits once."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> tuple[Tensor, ...]:
        inputs, options = _group_stats(*flat)
        output = tuple(kernel("softmax_ce", "softmax_stats", inputs.logits.device.type)(inputs, options))
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
    ctx.save_for_backward(*given[:7], statistics.row_max, statistics.row_sum, statistics.one_minus_pt)


def not_differentiable(statistics: SoftmaxStatistics, options: StatisticsOptions) -> list[Tensor]:
    """The statistics that have no gradient, or were not asked for."""
    names = ["row_max", "row_sum", "prediction", "confidence"]
    names += [name for name in ("smooth_loss", "hinge") if not getattr(options, name)]
    return [getattr(statistics, name) for name in names]


def statistics_grads(grads: Sequence[Tensor | None]) -> StatisticsGrads:
    """The gradients of ``SoftmaxStatistics`` that reach the inputs, contiguous."""
    refuse_batched(*grads)
    fields = SoftmaxStatistics(*grads)  # type: ignore[arg-type]
    names = StatisticsGrads._fields
    return StatisticsGrads(
        *(grad if grad is None else grad.contiguous() for grad in map(fields.__getattribute__, names))
    )


@differentiable_once
def _backward_stats(ctx: Any, *grads: Tensor | None) -> Any:
    need = ctx.needs_input_grad
    mask = SoftmaxMask(need[0], need[2] or need[3], need[5])
    inputs = LogitInputs(*ctx.saved_tensors[:7], *ctx.numbers)
    saved = SavedStatistics(*ctx.saved_tensors[7:])
    result = softmax_stats_backward(inputs, saved, ctx.penalty_margin, statistics_grads(grads), mask)
    logits, scale, bias, override, _, _ = _by_name(result, mask)
    return *_of_inputs(logits, scale, bias, override, need), *(None,) * (len(need) - _NUM_INPUTS)


register_autograd("softmax_stats", _setup_stats, _backward_stats)


def _group_stats_backward(*flat: Any) -> tuple[Any, ...]:
    inputs, rest = LogitInputs(*flat[:_NUM_INPUTS]), flat[_NUM_INPUTS:]
    return inputs, SavedStatistics(*rest[:3]), rest[3], StatisticsGrads(*rest[4:10]), SoftmaxMask(*rest[10])


def _check_stats_backward(
    inputs: LogitInputs, saved: SavedStatistics, _: float, grads: StatisticsGrads, *__: Any
) -> None:
    check_logit_inputs(inputs)
    check_row_tensors(inputs.logits, **saved._asdict(), **{f"grad_{k}": v for k, v in grads._asdict().items()})


define(
    "softmax_ce",
    f"softmax_stats_backward({_INPUTS}, Tensor row_max, Tensor row_sum, Tensor one_minus_pt, float penalty_margin,"
    f" {', '.join(f'Tensor? grad_{name}' for name in StatisticsGrads._fields)}, bool[] output_mask) -> Tensor[]",
    group=_group_stats_backward,
    check=_check_stats_backward,
    fake=lambda inputs, saved, penalty_margin, grads, mask: _new_grads(inputs.logits, mask),
)
refuse_second("softmax_stats_backward")


def softmax_stats_backward(
    inputs: LogitInputs, saved: SavedStatistics, penalty_margin: float, grads: StatisticsGrads, mask: SoftmaxMask
) -> list[Tensor]:
    """The gradients that `mask` names, from those of the statistics."""
    if not is_direct(*_tensors(inputs), *saved, *grads):
        flat = (*inputs, *saved, penalty_margin, *grads, list(mask))
        result: list[Tensor] = torch.ops.fusedloss.softmax_stats_backward.default(*flat)
    else:
        run = kernel("softmax_ce", "softmax_stats_backward", inputs.logits.device.type)
        result = run(inputs, saved, penalty_margin, grads, mask)
    return result


def _ce_mask(inputs: LogitInputs, rows: RowInputs) -> SoftmaxMask:
    return SoftmaxMask(
        inputs.logits.requires_grad,
        requires_grad(inputs.scale) or requires_grad(inputs.bias),
        requires_grad(inputs.target_override),
        requires_grad(rows.label_smoothing),
        requires_grad(rows.penalty_strength),
    )


def _by_name(grads: Sequence[Tensor], mask: SoftmaxMask) -> tuple[Tensor | None, ...]:
    """The gradients of logits, scale, bias, target_override, label_smoothing and penalty_strength, or None each."""
    made: Iterator[Tensor] = iter(grads)
    logits = next(made) if mask.logits else None
    scale, bias = (next(made), next(made)) if mask.affine else (None, None)
    override, smoothing, strength = (next(made) if each else None for each in mask[2:])
    return logits, scale, bias, override, smoothing, strength


def _of_inputs(
    logits: Tensor | None, scale: Tensor | None, bias: Tensor | None, override: Tensor | None, need: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """One gradient, or None, for each field of LogitInputs."""
    of_classes = (scale if need[2] else None, bias if need[3] else None, None)
    return logits if need[0] else None, None, *of_classes, override if need[5] else None, None, None, None
