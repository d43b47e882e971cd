"""What the mean of a loss divides by."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mean_denominator(
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    sample_weight: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """What torch's mean divides by, times the sample weights, in `dtype`: ``()``.

    Labels: the class weights of the rows that are kept (1 without); NaN where these sum to 0, since torch's mean is
    then 0 / 0, whatever label smoothing adds to the sum. Probabilities ``(B, K, ...)``: the number of rows.
    """
    if target.is_floating_point():
        if sample_weight is not None:
            return sample_weight.sum(dtype=dtype)
        # Not numel() // K: a traced shape keeps its factors.
        rows = target.shape[0] * math.prod(target.shape[2:])
        return torch.full((), rows, dtype=dtype, device=target.device)
    kept = target != ignore_index
    if class_weight is None and sample_weight is None:
        total = kept.sum().to(dtype)
    else:
        each = kept.to(dtype)
        if class_weight is not None:
            each = torch.where(kept, class_weight.to(dtype)[target.clamp(0, len(class_weight) - 1)], 0.0)
        if sample_weight is not None:
            each = each * sample_weight
        total = each.sum()
    return torch.where(total == 0, torch.full_like(total, math.nan), total)
