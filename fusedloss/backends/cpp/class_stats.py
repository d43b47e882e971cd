"""Statistics of features on the CPU: outputs allocated here, filled by csrc/class_stats.inl."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedloss.backends.cpp import extension
from fusedloss.backends.cpp.views import address, adjacent, compute_dtype, rows_view
from fusedloss.backends.reference import class_stats as reference


def class_stats(
    features: Tensor, labels: Tensor, shift: Tensor, seen: Tensor, ignore_index: int, per_feature: bool
) -> tuple[Tensor, Tensor, Tensor]:
    features, labels = adjacent(features), labels.contiguous()
    num_classes = len(shift)
    count = torch.empty_like(seen)
    total = torch.empty_like(shift)
    square = torch.empty_like(shift) if per_feature else shift.new_empty(num_classes)
    extension.class_stats(
        rows_view(features),
        (labels.data_ptr(), ignore_index),
        num_classes,
        per_feature,
        (shift.data_ptr(), seen.data_ptr()),
        (count.data_ptr(), total.data_ptr(), square.data_ptr()),
        torch.get_num_threads(),
    )
    return count, total, square


def advance(
    state: tuple[Tensor, Tensor, Tensor, Tensor | None], rows: Tensor, shift: Tensor, sums: Tensor, squares: Tensor,
    momentum: float | None,
) -> None:  # fmt: skip
    count, mean, scatter, variance = state
    if not sums.dtype == mean.dtype == shift.dtype or not all(part.is_contiguous() for part in (sums, mean, shift)):
        return reference.advance(state, rows, shift, sums, squares, momentum)
    extension.advance(
        mean.dtype == torch.float64,
        (count.data_ptr(), mean.data_ptr(), scatter.data_ptr(), address(variance)),
        (rows.data_ptr(), shift.data_ptr(), sums.data_ptr(), squares.data_ptr()),
        *mean.shape,
        -1.0 if momentum is None else momentum,
        torch.get_num_threads(),
    )


def row_magnitudes(rows: Tensor) -> Tensor:
    rows = adjacent(rows)
    found = torch.empty(len(rows), dtype=compute_dtype(rows))
    extension.row_magnitudes(rows_view(rows), found.data_ptr(), torch.get_num_threads())
    return found


def moments(values: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor:
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()
    values = values.contiguous()
    if labels is not None:
        labels = labels.to(torch.int64).contiguous()
    found = torch.empty(3, dtype=torch.float64)
    extension.moments(
        values.data_ptr(),
        values.dtype == torch.float64,
        (address(labels), len(values), ignore_index),
        found.data_ptr(),
    )
    return found
