"""linear_ce and its statistics on the CPU: torch's products, csrc/softmax_ce.inl over them in place."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fusedloss.backends.chunked import linear_ce as chunked
from fusedloss.backends.cpp import extension, softmax_ce
from fusedloss.backends.cpp.views import address, check_labels, contiguous, contiguous_rows, rows_view
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


def linear_ce(
    inputs: LinearInputs, rows: RowInputs, options: RowOptions, mean: bool, mask: LinearMask
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return chunked.linear_ce(_KERNELS, _prepared_inputs(inputs), rows, options, mean, mask)


def linear_stats(inputs: LinearInputs, options: StatisticsOptions) -> SoftmaxStatistics:
    return chunked.linear_stats(_KERNELS, _prepared_inputs(inputs), options)


def linear_stats_backward(
    inputs: LinearInputs, saved: SavedStatistics, penalty_margin: float, grads: StatisticsGrads, mask: LinearMask
) -> list[Tensor]:
    inputs = _contiguous(inputs)
    return chunked.linear_stats_backward(_KERNELS, inputs, saved, penalty_margin, grads, mask)


def row_norms(rows: Tensor) -> Tensor:
    rows = contiguous_rows(rows)
    norm = rows.new_empty(len(rows), dtype=torch.float64)
    extension.row_norms(rows_view(rows), norm.data_ptr(), torch.get_num_threads())
    return norm


def target_products(inputs: LinearInputs) -> Tensor:
    product = inputs.input.new_empty(len(inputs.input), dtype=torch.float64)
    _kept, pairs = _pairs(_prepared_inputs(inputs)._replace(target_product=product))
    extension.target_products(pairs, torch.get_num_threads())
    return product


def _project_rows(rows: Tensor, norm: Tensor, grad: Tensor, divide: bool) -> None:
    is_double = grad.dtype == torch.float64
    rows, norm = contiguous_rows(rows.double() if is_double else rows), norm.contiguous()
    threads = torch.get_num_threads()
    extension.project_rows(rows_view(rows), norm.data_ptr(), grad.data_ptr(), is_double, divide, threads)


def _add_target_grads(inputs: LinearInputs, grad_product: Tensor, input: Tensor | None, weight: Tensor | None) -> None:
    _kept, pairs = _pairs(inputs)
    grad_product = grad_product.contiguous()
    is_double = inputs.compute_dtype == torch.float64
    places = grad_product.data_ptr(), address(input), address(weight)
    extension.add_target_grads(pairs, *places, is_double, torch.get_num_threads())


def _prepared(fresh: Tensor) -> Tensor:
    extension.use_huge_pages(rows_view(fresh))
    return fresh


# The labels of a chunk were checked with the others.
_SOFTMAX = SimpleNamespace(
    softmax_ce=partial(softmax_ce.softmax_ce, labels_checked=True),
    softmax_stats=partial(softmax_ce.softmax_stats, labels_checked=True),
    softmax_stats_backward=softmax_ce.softmax_stats_backward,
)
_KERNELS = chunked.Kernels(_SOFTMAX, _project_rows, _add_target_grads, _prepared)


def _prepared_inputs(inputs: LinearInputs) -> LinearInputs:
    """With contiguous tensors, and labels that are classes: whoever brings the products had them checked for these."""
    if inputs.target_product is None and not inputs.target.is_floating_point():
        inputs = inputs._replace(target=check_labels(inputs.target, len(inputs.weight), inputs.ignore_index))
    return _contiguous(inputs)


def _contiguous(inputs: LinearInputs) -> LinearInputs:
    """With contiguous tensors but for input, weight and probabilities, of which rows may lie anywhere."""
    tensors = inputs[3:11]
    kept = contiguous(tensors)
    return inputs if kept is tensors else LinearInputs(*inputs[:3], *kept, *inputs[11:])


def _pairs(inputs: LinearInputs) -> tuple[tuple[Tensor | None, ...], Any]:
    """Tensors to keep until the kernel is done, and input and weight with their labels as it takes them."""
    dtype = torch.promote_types(inputs.input.dtype, inputs.weight.dtype)
    input, weight = contiguous_rows(inputs.input.to(dtype)), contiguous_rows(inputs.weight.to(dtype))
    of_rows = contiguous((inputs.target, inputs.input_norm, inputs.class_norm, inputs.target_product))
    places = map(address, of_rows)
    pairs = extension.TargetPairs(rows_view(input), rows_view(weight), *places, inputs.ignore_index)
    return (input, weight, *of_rows), pairs
