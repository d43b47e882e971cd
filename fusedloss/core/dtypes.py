"""The types that the package computes in."""

from __future__ import annotations

import torch

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LABELS = (torch.int64, torch.int32, torch.uint8)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What losses are computed and returned in: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
