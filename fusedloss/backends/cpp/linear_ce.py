"""linear_ce and its statistics on the CPU: torch's products, csrc/softmax_ce.inl's sweeps over them in place."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedloss.backends.chunked import linear_ce as chunked
from fusedloss.backends.chunked.head import LinearInputs
from fusedloss.backends.chunked.linear_ce import LinearWanted
from fusedloss.backends.cpp import extension, softmax_ce
from fusedloss.backends.cpp.views import address, adjacent, rows_view
from fusedloss.backends.reference.class_stats import check_labels


def linear_ce(*arguments) -> tuple[Tensor, Tensor, list[Tensor]]:
    inputs, (*rest, wanted) = LinearInputs.first_of(arguments)
    _check_labels(inputs, rest[-2])
    return chunked.linear_ce(_KERNELS, inputs, tuple(rest[:3]), tuple(rest[3:]), LinearWanted(*wanted))


def linear_stats(*arguments) -> tuple[Tensor, ...]:
    inputs, options = LinearInputs.first_of(arguments)
    _check_labels(inputs, options[1])
    return chunked.linear_stats(_KERNELS, inputs, options)


def linear_stats_backward(*arguments) -> list[Tensor]:
    inputs, rest = LinearInputs.first_of(arguments)
    saved, numbers, upstream, wanted = rest[:3], rest[3:5], rest[5:11], rest[11]
    return chunked.linear_stats_backward(_KERNELS, inputs, saved, numbers, upstream, LinearWanted(*wanted))


def row_norms(rows: Tensor) -> Tensor:
    rows = adjacent(rows)
    norm = torch.empty(len(rows), dtype=torch.float64)
    extension.row_norms(rows_view(rows), norm.data_ptr(), torch.get_num_threads())
    return norm


def target_products(
    input: Tensor, weight: Tensor, target: Tensor, input_norm: Tensor | None, class_norm: Tensor | None,
    ignore_index: int,
) -> Tensor:  # fmt: skip
    check_labels(target, len(weight), ignore_index, "target")
    product = torch.empty(len(input), dtype=torch.float64)
    _, pairs = _pairs(input, weight, target, ignore_index, input_norm, class_norm, product)
    extension.target_products(pairs, torch.get_num_threads())
    return product


def _project_rows(rows: Tensor, norm: Tensor, gradient: Tensor, divide: bool) -> None:
    is_double = gradient.dtype == torch.float64
    rows = adjacent(rows.double() if is_double else rows)
    place = (gradient.data_ptr(), is_double)
    extension.project_rows(rows_view(rows), norm.data_ptr(), place, divide, torch.get_num_threads())


def _label_gradients(
    inputs: LinearInputs, ignore_index: int, slope: Tensor, input: Tensor | None, weight: Tensor | None
) -> None:
    norms = (inputs.input_norm, inputs.class_norm)
    _kept, pairs = _pairs(inputs.input, inputs.weight, inputs.target, ignore_index, *norms, inputs.target_product)
    is_double = inputs.compute_dtype == torch.float64
    places = (address(input), address(weight))
    extension.label_gradients(pairs, slope.data_ptr(), places, is_double, torch.get_num_threads())


def _prepared(fresh: Tensor) -> Tensor:
    extension.use_huge_pages(rows_view(fresh))
    return fresh


_KERNELS = chunked.Kernels(softmax_ce, _project_rows, _label_gradients, _prepared)


def _check_labels(inputs: LinearInputs, ignore_index: int) -> None:
    if not inputs.target.is_floating_point():
        check_labels(inputs.target, len(inputs.weight), ignore_index, "target")


def _pairs(
    input: Tensor, weight: Tensor, target: Tensor, ignore_index: int, input_norm: Tensor | None,
    class_norm: Tensor | None, product: Tensor | None,
) -> tuple[tuple[Tensor, ...], tuple]:  # fmt: skip
    """Tensors to keep alive, and the tuple that bind_linear_ce.cpp unpacks."""
    dtype = torch.promote_types(input.dtype, weight.dtype)
    input, weight, target = adjacent(input.to(dtype)), adjacent(weight.to(dtype)), target.contiguous()
    return (input, weight, target), (
        rows_view(input), rows_view(weight), target.data_ptr(), ignore_index, address(input_norm),
        address(class_norm), address(product),
    )  # fmt: skip
