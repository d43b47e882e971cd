"""softmax_ce, softmax_stats and softmax_stats_backward on the CPU: outputs made here, filled by csrc/softmax_ce.inl.

The kernels take a label that is no class for an ignored row, and read nothing there. An operation raises for one, once;
``labels_checked`` says that the caller has done so.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fusedloss.backends.cpp import extension
from fusedloss.backends.cpp.views import address, check_labels, contiguous, rows_view
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
    logits = inputs.logits
    _kept_inputs, of_inputs = _arguments(inputs, labels_checked)
    kept_rows = contiguous(rows)
    grads = _Grads(logits, mask, in_place)
    loss, row_loss = logits.new_empty((), dtype=grads.dtype), grads.new_rows()
    extension.softmax_ce(
        of_inputs,
        extension.RowInputs(*map(address, kept_rows)),
        _compiled_options(options),
        mean,
        grad_scale,
        loss.data_ptr(),
        row_loss.data_ptr(),
        grads.arguments,
        torch.get_num_threads(),
    )
    return loss, row_loss, grads.tensors


def softmax_stats(inputs: LogitInputs, options: StatisticsOptions, labels_checked: bool = False) -> SoftmaxStatistics:
    logits = inputs.logits
    _kept, of_inputs = _arguments(inputs, labels_checked)
    shape, dtype = _rows_shape(logits), compute_dtype(logits.dtype)

    def rows(needed: bool = True, dtype: torch.dtype = dtype) -> Tensor:
        return logits.new_empty(shape if needed else 0, dtype=dtype)

    statistics = SoftmaxStatistics(
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
    # Labels that the forward refused can't come here; those of a call of its own are ignored where they are no class.
    _kept, of_inputs = _arguments(inputs, labels_checked=True)
    kept_saved, kept_grads = contiguous(saved), contiguous(grads)
    result = _Grads(inputs.logits, mask, in_place)
    extension.softmax_stats_backward(
        of_inputs,
        extension.SavedStatistics(*map(address, kept_saved)),
        penalty_margin,
        extension.StatisticsGrads(*map(address, kept_grads)),
        result.arguments,
        torch.get_num_threads(),
    )
    return result.tensors


@lru_cache(maxsize=256)
def _compiled_options(options: RowOptions) -> Any:
    return extension.RowOptions(*options)


def _rows_shape(logits: Tensor) -> tuple[int, ...]:
    return (logits.shape[0],) if logits.dim() == 2 else (logits.shape[0], logits.shape[2])


def _arguments(inputs: LogitInputs, labels_checked: bool) -> tuple[tuple[Any, ...], Any]:
    """Tensors to keep until the kernel is done, and the inputs as it takes them."""
    logits, target = inputs.logits, inputs.target
    if target.is_floating_point():
        if target.dtype != logits.dtype and torch.float64 in (target.dtype, logits.dtype):
            target = target.to(logits.dtype)
        place: tuple[int, ...] | int = rows_view(target)
    else:
        target = target.contiguous() if labels_checked else check_labels(target, logits.shape[1], inputs.ignore_index)
        place = target.data_ptr()
    tensors = contiguous(inputs[2:7])
    places = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    arguments = extension.LogitInputs(rows_view(logits), place, *places, inputs.soft_cap, inputs.ignore_index)
    return (target, tensors), arguments


class _Grads:
    """Fresh tensors for the gradients of a mask, in its order, that of the logits `in_place` over them."""

    def __init__(self, logits: Tensor, mask: SoftmaxMask, in_place: bool) -> None:
        self.logits, self.dtype = logits, compute_dtype(logits.dtype)
        self.tensors: list[Tensor] = []
        view, places = None, [0, 0, 0, 0, 0]
        if mask.logits:
            grad = logits if in_place else torch.empty_like(logits)
            self.tensors.append(grad)
            view = rows_view(grad)
        if mask.affine:
            places[:2] = (self._new(logits.new_empty(logits.shape[1], dtype=self.dtype)) for _ in range(2))
        if mask.target_override or mask.label_smoothing or mask.penalty_strength:
            places[2:] = (self._new(self.new_rows()) if needed else 0 for needed in mask[2:])
        self.arguments = extension.SoftmaxGrads(view, *places)

    def new_rows(self) -> Tensor:
        return self.logits.new_empty(_rows_shape(self.logits), dtype=self.dtype)

    def _new(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return tensor.data_ptr()
