"""linear_ce and its statistics on the CPU: torch's products, csrc/softmax_ce.inl over them in place."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedloss.backends.chunked import linear_ce as chunked
from fusedloss.backends.cpp import extension, softmax_ce
from fusedloss.backends.cpp.views import address, adjacent, rows_view
from fusedloss.core.checks import check_labels
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
    _check_labels(inputs)
    return chunked.linear_ce(_KERNELS, inputs, rows, options, mean, mask)


def linear_stats(inputs: LinearInputs, options: StatisticsOptions) -> SoftmaxStatistics:
    _check_labels(inputs)
    return chunked.linear_stats(_KERNELS, inputs, options)


def linear_stats_backward(
    inputs: LinearInputs, saved: SavedStatistics, penalty_margin: float, grads: StatisticsGrads, mask: LinearMask
) -> list[Tensor]:
    return chunked.linear_stats_backward(_KERNELS, inputs, saved, penalty_margin, grads, mask)


def row_norms(rows: Tensor) -> Tensor:
    rows = adjacent(rows)
    norm = rows.new_empty(len(rows), dtype=torch.float64)
    extension.row_norms(rows_view(rows), norm.data_ptr(), torch.get_num_threads())
    return norm


def target_products(inputs: LinearInputs) -> Tensor:
    _check_labels(inputs)
    product = inputs.input.new_empty(len(inputs.input), dtype=torch.float64)
    _kept, pairs = _pairs(inputs, product)
    extension.target_products(pairs, torch.get_num_threads())
    return product


def _project_rows(rows: Tensor, norm: Tensor, grad: Tensor, divide: bool) -> None:
    is_double = grad.dtype == torch.float64
    rows = adjacent(rows.double() if is_double else rows)
    place = (grad.data_ptr(), is_double)
    extension.project_rows(rows_view(rows), norm.data_ptr(), place, divide, torch.get_num_threads())


def _add_target_grads(inputs: LinearInputs, grad_product: Tensor, input: Tensor | None, weight: Tensor | None) -> None:
    _kept, pairs = _pairs(inputs, inputs.target_product)
    is_double = inputs.compute_dtype == torch.float64
    places = (address(input), address(weight))
    extension.label_gradients(pairs, grad_product.data_ptr(), places, is_double, torch.get_num_threads())


def _prepared(fresh: Tensor) -> Tensor:
    extension.use_huge_pages(rows_view(fresh))
    return fresh


_KERNELS = chunked.Kernels(softmax_ce, _project_rows, _add_target_grads, _prepared)


def _check_labels(inputs: LinearInputs) -> None:
    if not inputs.target.is_floating_point():
        check_labels(inputs.target, len(inputs.weight), inputs.ignore_index, "target")


def _pairs(inputs: LinearInputs, product: Tensor | None) -> tuple[tuple[Tensor, ...], tuple]:
    """Tensors to keep alive, and the tuple that bind_linear_ce.cpp unpacks."""
    dtype = torch.promote_types(inputs.input.dtype, inputs.weight.dtype)
    input, weight = adjacent(inputs.input.to(dtype)), adjacent(inputs.weight.to(dtype))
    target = inputs.target.contiguous()
    return (input, weight, target), (
        rows_view(input), rows_view(weight), target.data_ptr(), inputs.ignore_index, address(inputs.input_norm),
        address(inputs.class_norm), address(product),
    )  # fmt: skip
