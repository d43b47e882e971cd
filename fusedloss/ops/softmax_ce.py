"""Softmax cross-entropy with its gradients, row statistics, and the sweep that carries their gradients back.

``softmax_ce``     loss and its gradients in one read of the logits: what trainers run.
``softmax_stats``  statistics of each row; ``softmax_sweep`` carries any upstream gradient of them back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedloss.ops.library import answer, call, compute_dtype, differentiable_once, library, scale_in_place

library.define(
    "softmax_ce(Tensor logits, Tensor target, Tensor? scale, Tensor? bias, Tensor? class_weight,"
    " Tensor? row_smoothing, Tensor? row_scale, float smoothing, float focal_gamma, float z_loss,"
    " int ignore_index, bool mean, bool[] wanted) -> (Tensor, Tensor, Tensor[])"
)
library.define(
    "softmax_stats(Tensor logits, Tensor target, Tensor? scale, Tensor? bias, Tensor? class_weight,"
    " int ignore_index, bool want_uniform, bool want_prediction)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "softmax_sweep(Tensor logits, Tensor target, Tensor? scale, Tensor? bias, Tensor? class_weight,"
    " Tensor row_max, Tensor row_sum, Tensor rest, int ignore_index, Tensor? grad_log_sum_exp,"
    " Tensor? grad_target_logit, Tensor? grad_cross_entropy, Tensor? grad_uniform, Tensor? grad_rest,"
    " bool[] wanted) -> Tensor[]"
)
for _function in ("softmax_ce", "softmax_stats", "softmax_sweep"):
    answer("softmax_ce", _function)


def _rows(logits: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    shape = (logits.shape[0], *logits.shape[2:])
    return logits.new_empty(shape, dtype=dtype or compute_dtype(logits.dtype))


def _gradient_shapes(logits: Tensor, wanted: list[bool]) -> list[Tensor]:
    gradients = [torch.empty_like(logits)] if wanted[0] else []
    if wanted[1]:
        gradients += [logits.new_empty(logits.shape[1], dtype=compute_dtype(logits.dtype)) for _ in range(2)]
    return gradients


@torch.library.register_fake("fusedloss::softmax_ce", lib=library)
def _(logits, target, scale, bias, class_weight, row_smoothing, row_scale, smoothing, focal_gamma, z_loss,
      ignore_index, mean, wanted):  # fmt: skip
    gradients = _gradient_shapes(logits, wanted)
    if wanted[2]:
        gradients.append(_rows(logits))
    return logits.new_empty((), dtype=compute_dtype(logits.dtype)), _rows(logits), gradients


@torch.library.register_fake("fusedloss::softmax_stats", lib=library)
def _(logits, target, scale, bias, class_weight, ignore_index, want_uniform, want_prediction):
    empty = logits.new_empty(0, dtype=compute_dtype(logits.dtype))
    uniform = _rows(logits) if want_uniform else empty
    prediction = _rows(logits, torch.int64) if want_prediction else empty.to(torch.int64)
    return *(_rows(logits) for _ in range(5)), uniform, _rows(logits), prediction


@torch.library.register_fake("fusedloss::softmax_sweep", lib=library)
def _(logits, target, scale, bias, class_weight, row_max, row_sum, rest, ignore_index, grad_log_sum_exp,
      grad_target_logit, grad_cross_entropy, grad_uniform, grad_rest, wanted):  # fmt: skip
    return _gradient_shapes(logits, wanted)


class SoftmaxOptions(NamedTuple):
    """The plain numbers of a softmax_ce call."""

    smoothing: float
    focal_gamma: float
    z_loss: float
    ignore_index: int
    mean: bool


def softmax_ce(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    class_weight: Tensor | None,
    row_smoothing: Tensor | None,
    row_scale: Tensor | None,
    options: SoftmaxOptions,
) -> Tensor:
    """The scalar loss, with gradients computed beside it for the inputs that require them."""
    inputs = (logits, target, scale, bias, class_weight, row_smoothing, row_scale)
    learnable = (logits, scale, bias, row_smoothing, row_scale)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in learnable):
        return _SoftmaxCE.apply(*inputs, options)
    return call("softmax_ce", "softmax_ce", *inputs, *options, [False, False, False])[0]


class _SoftmaxCE(torch.autograd.Function):
    """The gradients leave with the forward; the first backward hands them on, a later one computes them again."""

    @staticmethod
    def forward(ctx, logits, target, scale, bias, class_weight, row_smoothing, row_scale, options):
        inputs = (logits, target, scale, bias, class_weight, row_smoothing, row_scale)
        wanted = _wanted(logits, scale, bias, row_smoothing)
        loss, row_loss, gradients = call("softmax_ce", "softmax_ce", *inputs, *options, wanted)
        ctx.options = options
        ctx.compiling = torch.compiler.is_compiling()
        if ctx.compiling:
            ctx.save_for_backward(*inputs, row_loss, *gradients)
        else:
            ctx.save_for_backward(*inputs)
            ctx.row_loss, ctx.gradients = row_loss, gradients
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx, upstream):
        inputs, rest = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
        logits, _, scale, bias, _, row_smoothing, _ = inputs
        wanted = _wanted(logits, scale, bias, row_smoothing)
        if ctx.compiling:
            row_loss, *gradients = rest
            gradients = [gradient * upstream for gradient in gradients]
        else:
            row_loss, gradients = ctx.row_loss, ctx.gradients
            ctx.gradients = None
            if gradients is None:
                gradients = call("softmax_ce", "softmax_ce", *inputs, *ctx.options, wanted)[2]
            scale_in_place(gradients, upstream)
        found = iter(gradients)
        grad_logits = next(found) if wanted[0] else None
        grad_scale, grad_bias = (next(found), next(found)) if wanted[1] else (None, None)
        grad_smoothing = next(found) if wanted[2] else None
        grad_row_scale = row_loss * upstream if ctx.needs_input_grad[6] else None
        need = ctx.needs_input_grad
        return (
            grad_logits if need[0] else None,
            None,
            grad_scale if need[2] else None,
            grad_bias if need[3] else None,
            None,
            grad_smoothing,
            grad_row_scale,
            None,
        )


class RowTensors(NamedTuple):
    """What softmax_stats returns; see ``rows.Statistics`` for the differentiable ones."""

    row_max: Tensor
    row_sum: Tensor
    log_sum_exp: Tensor
    target_logit: Tensor
    cross_entropy: Tensor
    uniform: Tensor
    rest: Tensor
    prediction: Tensor


def softmax_stats(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    want_uniform: bool,
    want_prediction: bool,
) -> RowTensors:
    """The statistics of each row, differentiable in the five that ``rows.Statistics`` names."""
    arguments = (logits, target, scale, bias, class_weight, ignore_index, want_uniform, want_prediction)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (logits, scale, bias)):
        return RowTensors(*_SoftmaxStatistics.apply(*arguments))
    return RowTensors(*call("softmax_ce", "softmax_stats", *arguments))


class _SoftmaxStatistics(torch.autograd.Function):
    """Saves two numbers per row; the backward sweeps the saved logits once."""

    @staticmethod
    def forward(ctx, logits, target, scale, bias, class_weight, ignore_index, want_uniform, want_prediction):
        found = RowTensors(
            *call(
                "softmax_ce",
                "softmax_stats",
                logits,
                target,
                scale,
                bias,
                class_weight,
                ignore_index,
                want_uniform,
                want_prediction,
            )
        )
        ctx.mark_non_differentiable(found.row_max, found.row_sum, found.prediction)
        ctx.set_materialize_grads(False)
        ctx.ignore_index = ignore_index
        ctx.save_for_backward(logits, target, scale, bias, class_weight, found.row_max, found.row_sum, found.rest)
        return tuple(found)

    @staticmethod
    @differentiable_once
    def backward(ctx, _max, _sum, log_sum_exp, target_logit, cross_entropy, uniform, rest, _prediction):
        logits, target, scale, bias, class_weight, row_max, row_sum, rest_of_row = ctx.saved_tensors
        upstream = [
            None if gradient is None else gradient.contiguous()
            for gradient in (log_sum_exp, target_logit, cross_entropy, uniform, rest)
        ]
        wanted = _wanted(logits, scale, bias, None)[:2]
        found = iter(
            call(
                "softmax_ce",
                "softmax_sweep",
                logits,
                target,
                scale,
                bias,
                class_weight,
                row_max,
                row_sum,
                rest_of_row,
                ctx.ignore_index,
                *upstream,
                wanted,
            )
        )
        grad_logits = next(found) if wanted[0] else None
        grad_scale, grad_bias = (next(found), next(found)) if wanted[1] else (None, None)
        need = ctx.needs_input_grad
        return (
            grad_logits if need[0] else None,
            None,
            grad_scale if need[2] else None,
            grad_bias if need[3] else None,
            *(None,) * 4,
        )


def _wanted(logits: Tensor, scale: Tensor | None, bias: Tensor | None, row_smoothing: Tensor | None) -> list[bool]:
    """Which gradients to compute: of the logits, of scale and bias together, of per-row smoothing."""
    affine = (scale is not None and scale.requires_grad) or (bias is not None and bias.requires_grad)
    return [logits.requires_grad, affine, row_smoothing is not None and row_smoothing.requires_grad]
