"""Tensors as the C++ kernels take them: addresses, shapes and strides in plain tuples."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def rows_view(tensor: Tensor | None) -> tuple | None:
    """A ``(B, K)`` or ``(B, K, d)`` tensor; None where there is none."""
    if tensor is None:
        return None
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


def adjacent(rows: Tensor) -> Tensor:
    """The rows ``(B, D)`` with the numbers of each next to each other: a copy only where they are not."""
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What the kernels compute in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
