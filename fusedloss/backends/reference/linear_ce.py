"""Logits of a linear layer in plain PyTorch, plain or as cosines. Autograd derives every gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_logits(input: Tensor, weight: Tensor, bias: Tensor | None, normalize: bool) -> Tensor:
    """``x . w + bias`` for rows of `input` (B, D) and of `weight` (K, D); with `normalize` of their directions.

    Sums are kept in float32 at least, products are exact in it: 16-bit operands lose nothing here.
    """
    dtype = torch.promote_types(torch.promote_types(input.dtype, weight.dtype), torch.float32)
    x, w = input.to(dtype), weight.to(dtype)
    if normalize:
        x, w = unit_rows(x), unit_rows(w)
    with torch.autocast(input.device.type, enabled=False):
        return torch.nn.functional.linear(x, w, None if bias is None else bias.to(dtype))


def unit_rows(rows: Tensor) -> Tensor:
    """Rows ``(R, D)`` over their lengths, whatever their size; a row of zeros stays, and its gradient is 0."""
    square = rows.double().square().sum(1, keepdim=True)
    empty = square == 0
    norm = torch.where(empty, 1.0, square).sqrt()
    return torch.where(empty, 0.0, rows / norm).to(rows.dtype)
