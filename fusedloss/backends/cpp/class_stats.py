"""Statistics of features on the CPU: outputs allocated here, filled by csrc/class_stats.inl."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedloss.backends.cpp import extension
from fusedloss.backends.cpp.views import address, contiguous_rows, rows_view
from fusedloss.backends.reference import class_stats as reference
from fusedloss.core.dtypes import compute_dtype


def class_stats(
    features: Tensor, labels: Tensor, shift: Tensor, seen: Tensor, ignore_index: int, per_feature: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Named, so that copies live as long as their addresses are in use.
    features, labels, seen, own_shift = (
        contiguous_rows(features),
        labels.contiguous(),
        seen.contiguous(),
        shift.contiguous(),
    )
    num_classes = shift.shape[0]
    count, skipped = seen.new_empty(num_classes), seen.new_empty(())
    total = shift.new_empty(shift.shape)
    square = shift.new_empty(shift.shape if per_feature else num_classes)
    extension.class_stats(
        features=rows_view(features),
        labels=labels.data_ptr(),
        ignore_index=ignore_index,
        num_classes=num_classes,
        per_feature=per_feature,
        shift=own_shift.data_ptr(),
        seen=seen.data_ptr(),
        count=count.data_ptr(),
        sum=total.data_ptr(),
        square=square.data_ptr(),
        skipped=skipped.data_ptr(),
        threads=torch.get_num_threads(),
    )
    if own_shift is not shift:
        shift.copy_(own_shift)
    return count, total, square, skipped


def update_class_stats(
    count: Tensor, mean: Tensor, scatter: Tensor, variance: Tensor | None, rows: Tensor, shift: Tensor | None,
    sums: Tensor, squares: Tensor, momentum: float | None,
) -> None:  # fmt: skip
    dtype = mean.dtype
    same_type = sums.dtype == squares.dtype == dtype and (shift is None or shift.dtype == dtype)
    tensors = (count, mean, scatter, variance, rows, shift, sums, squares)
    if not same_type or not all(part is None or part.is_contiguous() for part in tensors):
        reference.update_class_stats(count, mean, scatter, variance, rows, shift, sums, squares, momentum)
        return
    extension.update_class_stats(
        count=count.data_ptr(),
        mean=rows_view(mean),
        scatter=scatter.data_ptr(),
        variance=address(variance),
        rows=rows.data_ptr(),
        shift=(mean if shift is None else shift).data_ptr(),
        sum=sums.data_ptr(),
        square=squares.data_ptr(),
        momentum=-1.0 if momentum is None else momentum,
        threads=torch.get_num_threads(),
    )


def update_from_rows(
    features: Tensor, labels: Tensor, count: Tensor, mean: Tensor, scatter: Tensor, variance: Tensor | None,
    ignore_index: int, momentum: float | None,
) -> Tensor:  # fmt: skip
    arguments = (features, labels, count, mean, scatter, variance, ignore_index, momentum)
    return reference.update_by_sums(class_stats, update_class_stats, *arguments)


def row_magnitudes(rows: Tensor) -> Tensor:
    rows = contiguous_rows(rows)
    magnitudes = rows.new_empty(len(rows), dtype=compute_dtype(rows.dtype))
    extension.row_magnitudes(rows=rows_view(rows), sum=magnitudes.data_ptr(), threads=torch.get_num_threads())
    return magnitudes


def moments(values: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor:
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()
    values = values.contiguous()
    if labels is not None:
        labels = labels.to(torch.int64).contiguous()
    result = values.new_empty(4, dtype=torch.float64)
    extension.moments(
        values=values.data_ptr(),
        is_double=values.dtype == torch.float64,
        num_values=len(values),
        labels=address(labels),
        ignore_index=ignore_index,
        moments=result.data_ptr(),
    )
    return result
