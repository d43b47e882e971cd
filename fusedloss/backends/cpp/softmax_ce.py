"""softmax_ce, softmax_stats and softmax_stats_backward on the CPU: outputs made here, filled by csrc/softmax_ce.inl.

The kernels take a label that is no class for an ignored row, and read nothing there. An operation raises for one, once;
``labels_checked`` says that the caller has done so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from fusedloss.backends.cpp import extension
from fusedloss.backends.cpp.views import address, contiguous, rows_view
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


def softmax_ce(
    inputs: LogitInputs,
    rows: RowInputs,
    options: RowOptions,
    mean: bool,
    mask: SoftmaxMask,
    grad_scale: float = 1.0,
    in_place: bool = False,
    labels_checked: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    kept, of_inputs, of_logits = _arguments(inputs, labels_checked)
    _kept_rows, of_rows = _row_arguments(rows)
    row_loss = _new_rows(inputs.logits, kept[0])
    loss = torch.empty_like(_SCALARS[row_loss.dtype])
    grads, of_grads = _new_grads(inputs.logits, of_logits, mask, in_place, row_loss)
    extension.softmax_ce(
        of_inputs,
        of_rows,
        _compiled_options(options),
        mean,
        grad_scale,
        loss.data_ptr(),
        row_loss.data_ptr(),
        of_grads,
        torch.get_num_threads(),
    )
    return loss, row_loss, grads


def softmax_stats(inputs: LogitInputs, options: StatisticsOptions, labels_checked: bool = False) -> SoftmaxStatistics:
    kept, of_inputs, _ = _arguments(inputs, labels_checked)
    row_max = _new_rows(inputs.logits, kept[0])

    def rows(needed: bool = True, dtype: torch.dtype = row_max.dtype) -> Tensor:
        return torch.empty_like(row_max, dtype=dtype) if needed else row_max.new_empty(0, dtype=dtype)

    statistics = SoftmaxStatistics(
        row_max=row_max,
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
    # An empty tensor's address is 0, which stands for what is not needed.
    places = extension.SoftmaxStatistics(*map(address, statistics))
    extension.softmax_stats(of_inputs, options.penalty_margin, places, torch.get_num_threads())
    return statistics


def softmax_stats_backward(
    inputs: LogitInputs,
    saved: SavedStatistics,
    penalty_margin: float,
    grads: StatisticsGrads,
    mask: SoftmaxMask,
    in_place: bool = False,
) -> list[Tensor]:
    # The forward has checked the labels; where there was none, rows whose label is no class are ignored.
    _kept, of_inputs, of_logits = _arguments(inputs, labels_checked=True)
    kept_saved, kept_upstream = contiguous(saved), contiguous(grads)
    result, of_result = _new_grads(inputs.logits, of_logits, mask, in_place, saved.row_max)
    extension.softmax_stats_backward(
        of_inputs,
        extension.SavedStatistics(*map(address, kept_saved)),
        penalty_margin,
        extension.StatisticsGrads(*map(address, kept_upstream)),
        of_result,
        torch.get_num_threads(),
    )
    return result


# A like tensor is half the time of one made from a shape.
_SCALARS = {dtype: torch.empty((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}


@lru_cache(maxsize=256)
def _compiled_options(options: RowOptions) -> Any:
    return extension.RowOptions(*options)


def _new_rows(logits: Tensor, target: Tensor) -> Tensor:
    """One value per row, in the compute dtype."""
    dtype = compute_dtype(logits.dtype)
    if target.is_floating_point():
        return logits.new_empty((logits.shape[0], *logits.shape[2:]), dtype=dtype)
    return torch.empty_like(target, dtype=dtype)


def _arguments(inputs: LogitInputs, labels_checked: bool) -> tuple[tuple[Any, ...], Any, tuple[int, ...]]:
    """Tensors to keep until the kernel is done (the target first), the inputs as it takes them, the logits' view."""
    logits, target, scale, bias, class_weight, override, override_grad, soft_cap, ignore_index = inputs
    if target.is_floating_point():
        if target.dtype != logits.dtype and torch.float64 in (target.dtype, logits.dtype):
            target = target.to(logits.dtype)
        place: tuple[int, ...] | int = rows_view(target)
    else:
        target = target.contiguous()
        place = target.data_ptr()
    view = rows_view(logits)
    if scale is None and bias is None and class_weight is None and override is None:
        places: Sequence[int] = _NOWHERE
        kept: Sequence[Tensor | None] = ()
    else:
        kept = contiguous((scale, bias, class_weight, override, override_grad))
        places = [0 if tensor is None else tensor.data_ptr() for tensor in kept]
    arguments = extension.LogitInputs(view, place, *places, soft_cap, ignore_index, labels_checked)
    return (target, kept), arguments, view


_NOWHERE = (0, 0, 0, 0, 0)


def _row_arguments(rows: RowInputs) -> tuple[Any, Any]:
    """Tensors to keep until the kernel is done, and the rows' own values as it takes them."""
    if rows.label_smoothing is None and rows.sample_weight is None and rows.penalty_strength is None:
        return None, _no_rows()
    kept = contiguous(rows)
    return kept, extension.RowInputs(*map(address, kept))


@cache
def _no_rows() -> Any:
    return extension.RowInputs()


def _new_grads(
    logits: Tensor, view: tuple[int, ...], mask: SoftmaxMask, in_place: bool, row: Tensor
) -> tuple[list[Tensor], Any]:
    """Fresh tensors for what the mask names, in its order, and as a kernel takes them; `in_place` over the logits.

    `view` is that of the logits, and `row` a contiguous tensor with one value per row in the compute dtype.
    """
    if not any(mask):
        return [], extension.SoftmaxGrads()
    grads: list[Tensor] = []
    grad_view = None
    if mask.logits:
        grad = logits if in_place else torch.empty_like(logits)
        grads.append(grad)
        grad_view = (grad.data_ptr(), *view[1:]) if logits.is_contiguous() else rows_view(grad)
        if mask == _LOGITS_ONLY:
            return grads, extension.SoftmaxGrads(grad_view)
    scale = logits.new_empty(logits.shape[1], dtype=row.dtype) if mask.affine else None
    bias = None if scale is None else torch.empty_like(scale)
    made = [scale, bias, *(torch.empty_like(row) if needed else None for needed in mask[2:])]
    grads += [tensor for tensor in made if tensor is not None]
    return grads, extension.SoftmaxGrads(grad_view, *map(address, made))


_LOGITS_ONLY = SoftmaxMask(logits=True)
