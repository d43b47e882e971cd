"""The operations: schema, shapes for tracing, and the autograd glue. A kernel is chosen in ``backends``.

``softmax_ce``     loss and its gradients in one read of the logits: what trainers run.
``softmax_stats``  statistics of each row; ``softmax_sweep`` carries any upstream gradient of them back.
``class_stats``    count, sum and square of the features of each class; no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedloss import backends

_library = torch.library.Library("fusedloss", "DEF")

_library.define(
    "softmax_ce(Tensor logits, Tensor target, Tensor? scale, Tensor? bias, Tensor? class_weight,"
    " Tensor? row_smoothing, Tensor? row_scale, float smoothing, float focal_gamma, float z_loss,"
    " int ignore_index, bool mean, bool[] wanted) -> (Tensor, Tensor, Tensor[])"
)
_library.define(
    "softmax_stats(Tensor logits, Tensor target, Tensor? scale, Tensor? bias, Tensor? class_weight,"
    " int ignore_index, bool want_uniform, bool want_prediction)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "softmax_sweep(Tensor logits, Tensor target, Tensor? scale, Tensor? bias, Tensor? class_weight,"
    " Tensor row_max, Tensor row_sum, Tensor rest, int ignore_index, Tensor? grad_log_sum_exp,"
    " Tensor? grad_target_logit, Tensor? grad_cross_entropy, Tensor? grad_uniform, Tensor? grad_rest,"
    " bool[] wanted) -> Tensor[]"
)
_library.define(
    "class_stats(Tensor features, Tensor labels, Tensor(a!) shift, Tensor seen, int ignore_index,"
    " bool per_feature) -> (Tensor, Tensor, Tensor)"
)


def _answer(operation: str, function: str) -> None:
    def run(logits: Tensor, *arguments: Any) -> Any:
        return backends.kernel(operation, function, logits.device.type)(logits, *arguments)

    for device in ("CPU", "CUDA"):
        _library.impl(function, run, device)


def _call(operation: str, function: str, logits: Tensor, *arguments: Any) -> Any:
    """The operation; straight to its kernel where the dispatcher would only pass plain tensors on (9 of 35 us)."""
    if (
        torch.compiler.is_compiling()
        or type(logits) not in (Tensor, torch.nn.Parameter)
        or logits.device.type not in ("cpu", "cuda")
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return getattr(torch.ops.fusedloss, function).default(logits, *arguments)
    return backends.kernel(operation, function, logits.device.type)(logits, *arguments)


for _function in ("softmax_ce", "softmax_stats", "softmax_sweep"):
    _answer("softmax_ce", _function)
_answer("class_stats", "class_stats")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What losses are computed and returned in: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(logits: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    shape = (logits.shape[0], *logits.shape[2:])
    return logits.new_empty(shape, dtype=dtype or compute_dtype(logits.dtype))


def _gradient_shapes(logits: Tensor, wanted: list[bool]) -> list[Tensor]:
    gradients = [torch.empty_like(logits)] if wanted[0] else []
    if wanted[1]:
        gradients += [logits.new_empty(logits.shape[1], dtype=compute_dtype(logits.dtype)) for _ in range(2)]
    return gradients


@torch.library.register_fake("fusedloss::softmax_ce", lib=_library)
def _(logits, target, scale, bias, class_weight, row_smoothing, row_scale, smoothing, focal_gamma, z_loss,
      ignore_index, mean, wanted):  # fmt: skip
    gradients = _gradient_shapes(logits, wanted)
    if wanted[2]:
        gradients.append(_rows(logits))
    return logits.new_empty((), dtype=compute_dtype(logits.dtype)), _rows(logits), gradients


@torch.library.register_fake("fusedloss::softmax_stats", lib=_library)
def _(logits, target, scale, bias, class_weight, ignore_index, want_uniform, want_prediction):
    empty = logits.new_empty(0, dtype=compute_dtype(logits.dtype))
    uniform = _rows(logits) if want_uniform else empty
    prediction = _rows(logits, torch.int64) if want_prediction else empty.to(torch.int64)
    return *(_rows(logits) for _ in range(5)), uniform, _rows(logits), prediction


@torch.library.register_fake("fusedloss::softmax_sweep", lib=_library)
def _(logits, target, scale, bias, class_weight, row_max, row_sum, rest, ignore_index, grad_log_sum_exp,
      grad_target_logit, grad_cross_entropy, grad_uniform, grad_rest, wanted):  # fmt: skip
    return _gradient_shapes(logits, wanted)


@torch.library.register_fake("fusedloss::class_stats", lib=_library)
def _(features, labels, shift, seen, ignore_index, per_feature):
    square = torch.empty_like(shift) if per_feature else shift.new_empty(shift.shape[0])
    return torch.empty_like(seen), torch.empty_like(shift), square


class ClassTensors(NamedTuple):
    """What class_stats returns; see the reference for the formulas."""

    count: Tensor  # type: ignore[assignment]  # tuple has a method of this name
    sum: Tensor
    square: Tensor


def class_stats(
    features: Tensor, labels: Tensor, shift: Tensor, seen: Tensor, ignore_index: int, per_feature: bool
) -> ClassTensors:
    """Sums by class about `shift`; that of a class never seen before is first set to a row of the class."""
    return ClassTensors(
        *torch.ops.fusedloss.class_stats.default(features, labels, shift, seen, ignore_index, per_feature)
    )


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
    return _call("softmax_ce", "softmax_ce", *inputs, *options, [False, False, False])[0]


class _Refusal(torch.autograd.Function):
    """Passes a gradient on, and says so when it is differentiated in its turn."""

    @staticmethod
    def forward(ctx, gradient, *inputs):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, upstream):
        raise RuntimeError(
            "cross_entropy's kernels are differentiable once; for second derivatives use fusedloss.backend('reference')"
        )


def _differentiable_once(backward: Callable) -> Callable:
    """once_differentiable forgets a graph that needs no upstream gradient: a gradient penalty would count nothing."""
    once = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def run(ctx, *upstream):
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return once(ctx, *upstream)
        learned = [tensor for tensor in ctx.saved_tensors if tensor is not None and tensor.requires_grad]
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        return tuple(None if found is None else _Refusal.apply(found, *learned) for found in gradients)

    return run


class _SoftmaxCE(torch.autograd.Function):
    """The gradients leave with the forward; the first backward hands them on, a later one computes them again."""

    @staticmethod
    def forward(ctx, logits, target, scale, bias, class_weight, row_smoothing, row_scale, options):
        inputs = (logits, target, scale, bias, class_weight, row_smoothing, row_scale)
        wanted = _wanted(logits, scale, bias, row_smoothing)
        loss, row_loss, gradients = _call("softmax_ce", "softmax_ce", *inputs, *options, wanted)
        ctx.options = options
        ctx.compiling = torch.compiler.is_compiling()
        if ctx.compiling:
            ctx.save_for_backward(*inputs, row_loss, *gradients)
        else:
            ctx.save_for_backward(*inputs)
            ctx.row_loss, ctx.gradients = row_loss, gradients
        return loss

    @staticmethod
    @_differentiable_once
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
                gradients = _call("softmax_ce", "softmax_ce", *inputs, *ctx.options, wanted)[2]
            _scale_in_place(gradients, upstream)
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
    return RowTensors(*_call("softmax_ce", "softmax_stats", *arguments))


class _SoftmaxStatistics(torch.autograd.Function):
    """Saves two numbers per row; the backward sweeps the saved logits once."""

    @staticmethod
    def forward(ctx, logits, target, scale, bias, class_weight, ignore_index, want_uniform, want_prediction):
        found = RowTensors(
            *_call(
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
    @_differentiable_once
    def backward(ctx, _max, _sum, log_sum_exp, target_logit, cross_entropy, uniform, rest, _prediction):
        logits, target, scale, bias, class_weight, row_max, row_sum, rest_of_row = ctx.saved_tensors
        upstream = [
            None if gradient is None else gradient.contiguous()
            for gradient in (log_sum_exp, target_logit, cross_entropy, uniform, rest)
        ]
        wanted = _wanted(logits, scale, bias, None)[:2]
        found = iter(
            _call(
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


def _scale_in_place(gradients: list[Tensor], upstream: Tensor) -> None:
    """Multiplies by the upstream gradient; on a CPU not at all when it is 1, on a GPU without asking the host."""
    if upstream.device.type == "cuda":
        from fusedloss.backends.triton.softmax_ce import scale_in_place

        for gradient in gradients:
            scale_in_place(gradient, upstream)
        return
    factor = upstream.item()
    if factor != 1.0:
        for gradient in gradients:
            gradient.mul_(factor)
