"""A linear head's arguments, checked and brought into one type; its logits where they are wanted whole."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusedloss.backends.reference.linear_ce import linear_logits
from fusedloss.core.checks import check_bool
from fusedloss.core.dtypes import FLOATING


@dataclass(frozen=True)
class LinearHead:
    """``input`` (B, D) in the type that products are formed in, ``weight`` (K, D), ``bias`` (K,) or None."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    normalize: bool
    one_row: bool  # whether the caller gave one row, (D,)

    def logits(self) -> Tensor:
        """All of them, ``(B, K)``."""
        return linear_logits(self.input, self.weight, self.bias, self.normalize)

    def logits_placeholder(self) -> Tensor:
        """Shape, type and device of the logits in one element of memory."""
        shape = self.weight.shape[:1] if self.one_row else (self.input.shape[0], self.weight.shape[0])
        return self.input.new_zeros(()).expand(shape)

    def of_classes(self, kept: Tensor) -> LinearHead:
        """The head of some classes."""
        bias = None if self.bias is None else self.bias[kept]
        return replace(self, weight=self.weight.index_select(0, kept), bias=bias)


def checked_head(input: Tensor, weight: Tensor, bias: Tensor | None, normalize: bool) -> LinearHead:
    """The arguments of linear_cross_entropy that F.linear takes; see there for what is raised."""
    for name, tensor in (("input", input), ("linear_weight", weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16; got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor; got layout {tensor.layout}")
    if input.dim() not in (1, 2):
        raise ValueError(f"input must have shape (B, D) or (D,), other dimensions flattened; got {tuple(input.shape)}")
    if weight.dim() != 2:
        raise ValueError(f"linear_weight must have shape (K, D); got {tuple(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(f"linear_weight must have at least one class; got shape {tuple(weight.shape)}")
    if input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear_weight must have as many columns as input, {input.shape[-1]}; got shape {tuple(weight.shape)}"
        )
    if weight.device != input.device:
        raise ValueError(f"linear_weight must be on the device of input, {input.device}; got {weight.device}")
    if bias is not None:
        bias = _checked_bias(bias, weight)
    check_bool("normalize", normalize)
    dtype = _product_dtype(input, weight)
    one_row = input.dim() == 1
    return LinearHead((input.unsqueeze(0) if one_row else input).to(dtype), weight, bias, bool(normalize), one_row)


def _checked_bias(bias: Tensor, weight: Tensor) -> Tensor:
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"linear_bias must be a floating-point tensor; got {got}")
    if tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"linear_bias must have shape ({weight.shape[0]},), one per class; got {tuple(bias.shape)}")
    if bias.device != weight.device:
        raise ValueError(f"linear_bias must be on the device of linear_weight, {weight.device}; got {bias.device}")
    return bias


def _product_dtype(input: Tensor, weight: Tensor) -> torch.dtype:
    """What F.linear would multiply in under autocast, else the wider of the two."""
    device = input.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (input.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(input.dtype, weight.dtype)
