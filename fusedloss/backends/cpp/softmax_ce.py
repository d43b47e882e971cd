"""softmax_ce, softmax_stats and softmax_stats_backward on the CPU: outputs made here, filled by csrc/softmax_ce.inl."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedloss.backends.cpp import extension
from fusedloss.backends.cpp.views import address, compute_dtype, rows_view
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


def softmax_ce(
    inputs: LogitInputs,
    rows: RowInputs,
    options: RowOptions,
    mean: bool,
    mask: SoftmaxMask,
    grad_scale: float = 1.0,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    logits = inputs.logits
    dtype = compute_dtype(logits)
    _kept, packed = _packed(inputs)
    loss = logits.new_empty((), dtype=dtype)
    row_loss = logits.new_empty(_rows_shape(logits), dtype=dtype)
    grads, places = _new_grads(logits, mask, dtype, in_place)
    of_rows = [torch.empty_like(row_loss) if needed else None for needed in mask[2:]]
    grad_override, grad_smoothing, grad_strength = of_rows
    extension.softmax_ce(
        packed,
        (
            options.label_smoothing, address(rows.label_smoothing), options.focal_gamma, options.z_loss,
            address(rows.sample_weight), mean, address(rows.penalty_strength), options.penalty_strength,
            options.penalty_margin, options.penalty_scale, options.penalty_mix != 0, grad_scale,
        ),
        (
            loss.data_ptr(), row_loss.data_ptr(), address(grad_smoothing), address(grad_override),
            address(grad_strength),
        ),
        places,
        torch.get_num_threads(),
    )  # fmt: skip
    return loss, row_loss, grads + [grad for grad in of_rows if grad is not None]


def softmax_stats(inputs: LogitInputs, options: StatisticsOptions) -> SoftmaxStatistics:
    logits = inputs.logits
    _kept, packed = _packed(inputs)
    shape, dtype = _rows_shape(logits), compute_dtype(logits)
    needed = (True, True, True, True, True, options.smooth_loss, True, options.hinge, options.prediction)
    rows = [logits.new_empty(shape if need else 0, dtype=dtype) for need in needed]
    prediction = logits.new_empty(shape if options.prediction else 0, dtype=torch.int64)
    places = [address(tensor) if need else 0 for tensor, need in zip(rows, needed, strict=True)]
    places.append(prediction.data_ptr() if options.prediction else 0)
    extension.softmax_stats(packed, options.penalty_margin, tuple(places), torch.get_num_threads())
    *statistics, confidence = rows
    return SoftmaxStatistics(*statistics, prediction, confidence)


def softmax_stats_backward(
    inputs: LogitInputs,
    saved: SavedStatistics,
    penalty_margin: float,
    grads: StatisticsGrads,
    mask: SoftmaxMask,
    in_place: bool = False,
) -> list[Tensor]:
    logits = inputs.logits
    _kept, packed = _packed(inputs)
    result, places = _new_grads(logits, mask, compute_dtype(logits), in_place)
    grad_override = torch.empty_like(saved.row_max) if mask.target_override else None
    extension.softmax_stats_backward(
        packed,
        penalty_margin,
        tuple(map(address, saved)),
        tuple(map(address, grads)),
        (*places, address(grad_override)),
        torch.get_num_threads(),
    )
    return result if grad_override is None else [*result, grad_override]


def _rows_shape(logits: Tensor) -> tuple[int, ...]:
    return (logits.shape[0],) if logits.dim() == 2 else (logits.shape[0], logits.shape[2])


def _packed(inputs: LogitInputs) -> tuple[Tensor, tuple]:
    """The target as the kernels take it (keep it alive), and the tuple that bind_softmax_ce.cpp unpacks."""
    logits, target = inputs.logits, inputs.target
    if target.is_floating_point():
        if target.dtype != logits.dtype and torch.float64 in (target.dtype, logits.dtype):
            target = target.to(logits.dtype)
        where: tuple | int | None = rows_view(target)
    else:
        target = target.contiguous()
        where = target.data_ptr()
    return target, (
        rows_view(logits), where, address(inputs.scale), address(inputs.bias), address(inputs.class_weight),
        inputs.ignore_index, inputs.soft_cap, address(inputs.target_override), address(inputs.target_override_grad),
    )  # fmt: skip


def _new_grads(logits: Tensor, mask: SoftmaxMask, dtype: torch.dtype, in_place: bool) -> tuple[list[Tensor], tuple]:
    """Where gradients are written, `in_place` over the logits, and what bind_softmax_ce.cpp unpacks."""
    grads: list[Tensor] = []
    grad = scale = bias = None
    if mask.logits:
        grad = logits if in_place else torch.empty_like(logits)
        grads.append(grad)
    if mask.affine:
        scale, bias = (logits.new_empty(logits.shape[1], dtype=dtype) for _ in range(2))
        grads += [scale, bias]
    return grads, (rows_view(grad), address(scale), address(bias))
