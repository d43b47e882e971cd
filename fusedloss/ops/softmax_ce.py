"""Softmax cross-entropy with its gradients, row statistics, and the sweep that carries their gradients back.

``softmax_ce``     loss and its gradients in one read of the logits: what trainers run.
``softmax_stats``  statistics of each row; ``softmax_stats_backward`` carries any upstream gradient of them back.

All work on ``z = scale * c(x) + bias``, where c(x) is x or ``soft_cap * tanh(x / soft_cap)``; ``target_override`` stands in
for z at the label, and ``target_override_grad`` is its slope in x.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedloss.ops.library import answer, call, compute_dtype, differentiable_once, library, scale_in_place
from fusedloss.ops.upstream import expected_upstream, note_upstream

library.define(
    "softmax_ce(Tensor logits, Tensor target, Tensor? scale, Tensor? bias, Tensor? class_weight,"
    " Tensor? target_override, Tensor? target_override_grad, Tensor? row_smoothing, Tensor? row_scale, Tensor? row_penalty,"
    " float soft_cap, float smoothing, float focal_gamma, float z_loss, float penalty_margin, float penalty,"
    " float penalty_share, bool penalty_mix, int ignore_index, bool mean, bool[] wanted, float gradient_scale=1.0)"
    " -> (Tensor, Tensor, Tensor[])"
)
library.define(
    "softmax_stats(Tensor logits, Tensor target, Tensor? scale, Tensor? bias, Tensor? class_weight,"
    " Tensor? target_override, float soft_cap, float penalty_margin, int ignore_index, bool want_uniform,"
    " bool want_hinge, bool want_prediction)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "softmax_stats_backward(Tensor logits, Tensor target, Tensor? scale, Tensor? bias, Tensor? class_weight,"
    " Tensor? target_override, Tensor? target_override_grad, Tensor row_max, Tensor row_sum, Tensor rest, float soft_cap,"
    " float penalty_margin, int ignore_index, Tensor? grad_log_sum_exp, Tensor? grad_target_logit,"
    " Tensor? grad_cross_entropy, Tensor? grad_uniform, Tensor? grad_rest, Tensor? grad_hinge, bool[] wanted)"
    " -> Tensor[]"
)
for _function in ("softmax_ce", "softmax_stats", "softmax_stats_backward"):
    answer("softmax_ce", _function)


class LogitInputs(NamedTuple):
    """What every softmax operation reads; tensors that require a gradient get one, class_weight and target_override_grad not."""

    logits: Tensor
    target: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    class_weight: Tensor | None = None
    target_override: Tensor | None = None
    target_override_grad: Tensor | None = None
    soft_cap: float = 0.0


def _tensors(inputs: LogitInputs) -> tuple[Tensor | None, ...]:
    """All but the soft cap, by name: torch.compile of torch 2.8 can trace neither a slice nor a property of it."""
    return (
        inputs.logits,
        inputs.target,
        inputs.scale,
        inputs.bias,
        inputs.class_weight,
        inputs.target_override,
        inputs.target_override_grad,
    )


class RowInputs(NamedTuple):
    """Tensors with one value per row, in place of the plain number of the same name in SoftmaxOptions."""

    smoothing: Tensor | None = None
    scale: Tensor | None = None
    penalty: Tensor | None = None


class SoftmaxOptions(NamedTuple):
    """The plain numbers of a softmax_ce call."""

    smoothing: float = 0.0
    focal_gamma: float = 0.0
    z_loss: float = 0.0
    penalty_margin: float = 0.0
    penalty: float = 0.0
    penalty_share: float = 1.0
    penalty_mix: bool = False
    ignore_index: int = -100
    mean: bool = True


def _rows(logits: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    shape = (logits.shape[0], *logits.shape[2:])
    return logits.new_empty(shape, dtype=dtype or compute_dtype(logits.dtype))


def _gradient_shapes(logits: Tensor, wanted: Sequence[bool]) -> list[Tensor]:
    gradients = [torch.empty_like(logits)] if wanted[0] else []
    if wanted[1]:
        gradients += [logits.new_empty(logits.shape[1], dtype=compute_dtype(logits.dtype)) for _ in range(2)]
    return gradients + [_rows(logits) for want in wanted[2:] if want]


@torch.library.register_fake("fusedloss::softmax_ce", lib=library)
def _(logits, target, scale, bias, class_weight, target_override, target_override_grad, row_smoothing, row_scale, row_penalty,
      soft_cap, smoothing, focal_gamma, z_loss, penalty_margin, penalty, penalty_share, penalty_mix, ignore_index,
      mean, wanted, gradient_scale=1.0):  # fmt: skip
    loss = logits.new_empty((), dtype=compute_dtype(logits.dtype))
    return loss, _rows(logits), _gradient_shapes(logits, wanted)


@torch.library.register_fake("fusedloss::softmax_stats", lib=library)
def _(logits, target, scale, bias, class_weight, target_override, soft_cap, penalty_margin, ignore_index, want_uniform,
      want_hinge, want_prediction):  # fmt: skip
    empty = logits.new_empty(0, dtype=compute_dtype(logits.dtype))
    prediction = _rows(logits, torch.int64) if want_prediction else empty.to(torch.int64)
    wanted = (True, True, True, True, True, want_uniform, True, want_hinge, want_prediction)
    *statistics, confidence = (_rows(logits) if want else empty.clone() for want in wanted)
    return *statistics, prediction, confidence


@torch.library.register_fake("fusedloss::softmax_stats_backward", lib=library)
def _(logits, target, scale, bias, class_weight, target_override, target_override_grad, row_max, row_sum, rest, soft_cap,
      penalty_margin, ignore_index, grad_log_sum_exp, grad_target_logit, grad_cross_entropy, grad_uniform, grad_rest,
      grad_hinge, wanted):  # fmt: skip
    return _gradient_shapes(logits, wanted)


def softmax_ce(inputs: LogitInputs, rows: RowInputs, options: SoftmaxOptions) -> Tensor:
    """The scalar loss, with gradients computed beside it for the inputs that require them."""
    tensors = _tensors(inputs)
    if torch.is_grad_enabled() and _any_requires_grad(*tensors, *rows):
        return _SoftmaxCE.apply(*tensors, *rows, inputs.soft_cap, options)
    rest = (*tensors[1:], *rows, inputs.soft_cap, *options, [False] * 5)
    return call("softmax_ce", "softmax_ce", inputs.logits, *rest)[0]


_LOGITS_ALONE = [True, False, False, False, False]


class _SoftmaxCE(torch.autograd.Function):
    """The gradients leave with the forward; the first backward hands them on, a later one computes them again."""

    @staticmethod
    def forward(ctx, logits, target, scale, bias, class_weight, target_override, target_override_grad, row_smoothing, row_scale,
                row_penalty, soft_cap, options):  # fmt: skip
        tensors = (logits, target, scale, bias, class_weight, target_override, target_override_grad, row_smoothing, row_scale,
                   row_penalty)  # fmt: skip
        wanted = _wanted(logits, scale, bias, row_smoothing, target_override, row_penalty)
        ctx.compiling = compiling = torch.compiler.is_compiling()
        written = 1.0 if compiling or logits.is_cuda else expected_upstream()
        ctx.numbers = numbers = (soft_cap, *options, wanted, written)
        loss, row_loss, gradients = call("softmax_ce", "softmax_ce", *tensors, *numbers)
        if compiling:
            ctx.save_for_backward(*tensors, row_loss, *gradients)
        else:
            ctx.save_for_backward(*tensors)
            ctx.row_loss, ctx.gradients = row_loss, gradients
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx, upstream):
        *_, wanted, written = ctx.numbers
        if ctx.compiling:
            row_loss, *gradients = ctx.saved_tensors[10:]
            gradients = [gradient * upstream for gradient in gradients]
        else:
            row_loss, gradients = ctx.row_loss, ctx.gradients
            ctx.gradients = None
            if gradients is None:
                gradients = call("softmax_ce", "softmax_ce", *ctx.saved_tensors, *ctx.numbers)[2]
            factor = scale_in_place(gradients, upstream, written)
            if factor is not None:
                note_upstream(factor)
        need = ctx.needs_input_grad
        row_scale = row_loss * upstream if need[8] else None
        if wanted == _LOGITS_ALONE:
            return gradients[0], None, None, None, None, None, None, None, row_scale, None, None, None
        found = iter(gradients)
        logits, scale, bias = _of_logits(found, wanted, need)
        smoothing, target_override, penalty = [next(found) if want else None for want in wanted[2:]]
        return logits, None, scale, bias, None, target_override, None, smoothing, row_scale, penalty, None, None


class RowTensors(NamedTuple):
    """What softmax_stats returns; see ``rows.Statistics`` for the differentiable ones."""

    row_max: Tensor
    row_sum: Tensor
    log_sum_exp: Tensor
    target_logit: Tensor
    cross_entropy: Tensor
    uniform: Tensor
    rest: Tensor
    hinge: Tensor
    prediction: Tensor
    confidence: Tensor


class StatisticsOptions(NamedTuple):
    """The plain numbers of a softmax_stats call."""

    penalty_margin: float = 0.0
    ignore_index: int = -100
    want_uniform: bool = False
    want_hinge: bool = False
    want_prediction: bool = False


def softmax_stats(inputs: LogitInputs, options: StatisticsOptions) -> RowTensors:
    """The statistics of each row, differentiable in the six that ``rows.Statistics`` names."""
    if torch.is_grad_enabled() and _any_requires_grad(*_tensors(inputs)):
        return RowTensors(*_SoftmaxStatistics.apply(*inputs, options))
    return _statistics(inputs, options)


def _statistics(inputs: LogitInputs, options: StatisticsOptions) -> RowTensors:
    return RowTensors(
        *call("softmax_ce", "softmax_stats", inputs.logits, *_tensors(inputs)[1:6], inputs.soft_cap, *options)
    )


class _SoftmaxStatistics(torch.autograd.Function):
    """Saves two numbers per row; the backward sweeps the saved logits once."""

    @staticmethod
    def forward(
        ctx, logits, target, scale, bias, class_weight, target_override, target_override_grad, soft_cap, options
    ):
        inputs = LogitInputs(logits, target, scale, bias, class_weight, target_override, target_override_grad, soft_cap)
        found = _statistics(inputs, options)
        ctx.mark_non_differentiable(found.row_max, found.row_sum, found.prediction, found.confidence)
        ctx.set_materialize_grads(False)
        ctx.soft_cap, ctx.options = soft_cap, options
        ctx.wanted = _wanted(logits, scale, bias, target_override)
        ctx.save_for_backward(*_tensors(inputs), found.row_max, found.row_sum, found.rest)
        return tuple(found)

    @staticmethod
    @differentiable_once
    def backward(ctx, _max, _sum, log_sum_exp, target_logit, cross_entropy, uniform, rest, hinge, _prediction,
                 _confidence):  # fmt: skip
        saved = ctx.saved_tensors
        statistics = (log_sum_exp, target_logit, cross_entropy, uniform, rest, hinge)
        upstream = [None if gradient is None else gradient.contiguous() for gradient in statistics]
        numbers = (ctx.soft_cap, ctx.options.penalty_margin, ctx.options.ignore_index)
        found = iter(call("softmax_ce", "softmax_stats_backward", *saved, *numbers, *upstream, ctx.wanted))
        grad_logits, grad_scale, grad_bias = _of_logits(found, ctx.wanted, ctx.needs_input_grad)
        grad_label = next(found) if ctx.wanted[2] else None
        return grad_logits, None, grad_scale, grad_bias, None, grad_label, None, None, None


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    for tensor in tensors:  # noqa: SIM110  any() over a generator takes three times as long
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _wanted(logits: Tensor, scale: Tensor | None, bias: Tensor | None, *rows: Tensor | None) -> list[bool]:
    """Which gradients to compute: of the logits, of scale and bias together, of each tensor in `rows`."""
    wanted = [logits.requires_grad, _any_requires_grad(scale, bias)]
    for tensor in rows:
        wanted.append(tensor is not None and tensor.requires_grad)
    return wanted


def _of_logits(found: Iterator[Tensor], wanted: list[bool], need: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients of logits, scale and bias, each None unless needed."""
    logits = next(found) if wanted[0] else None
    scale, bias = (next(found), next(found)) if wanted[1] else (None, None)
    return logits if need[0] else None, scale if need[2] else None, bias if need[3] else None
