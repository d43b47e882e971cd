"""Tensors as the C++ kernels take them: addresses, shapes and strides in plain tuples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedloss.backends.cpp import extension

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def rows_view(tensor: Tensor) -> tuple[int, ...]:
    """A ``(B, K)`` or ``(B, K, d)`` tensor, whatever its strides."""
    code = DTYPE_CODES[tensor.dtype]
    if tensor.dim() == 2:
        rows, classes = tensor.shape
        row_stride, class_stride = tensor.stride()
        return tensor.data_ptr(), code, rows, classes, 1, row_stride, class_stride, 0
    outer, classes, inner = tensor.shape
    outer_stride, class_stride, inner_stride = tensor.stride()
    return tensor.data_ptr(), code, outer, classes, inner, outer_stride, class_stride, inner_stride


def address(tensor: Tensor | None) -> int:
    """Where a contiguous tensor's data start; 0 where there is none."""
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The tensors as ``address`` takes them, copied where they are not contiguous: keep these while a kernel runs."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]
    return tensors


def contiguous_rows(rows: Tensor) -> Tensor:
    """The rows ``(B, D)`` with the numbers of each contiguous: a copy only where they are not."""
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def check_labels(target: Tensor, num_classes: int, ignore_index: int, name: str = "target") -> Tensor:
    """The labels, contiguous; as ``core.checks.check_labels`` in one pass, and probabilities as they are."""
    if target.is_floating_point():
        return target
    target = target.contiguous()
    extension.check_labels(target.data_ptr(), target.numel(), num_classes, ignore_index, name)
    return target


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What the kernels compute in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


# What class_stats and supcon call it.
adjacent = contiguous_rows
