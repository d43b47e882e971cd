"""Rows of length 1."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_rows(rows: Tensor) -> Tensor:
    """Rows ``(R, D)`` over their lengths, whatever their size; a row of zeros stays, and its gradient is 0."""
    square = rows.double().square().sum(1, keepdim=True)
    empty = square == 0
    norm = torch.where(empty, 1.0, square).sqrt()
    return torch.where(empty, 0.0, rows / norm).to(rows.dtype)
