"""Products of 16-bit matrices that add up in float32."""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

# Elements of a product at a time where PyTorch can't write the wider type itself.
_ADDED_AT_ONCE = 1 << 22


def multiply(left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
    """``out = left @ right``, or with `add` ``out += left @ right``; `out` may be float32 where these are 16 bits."""
    same = out.dtype == left.dtype
    if same and add:
        torch.addmm(out, left, right, out=out)
    elif same:
        torch.mm(left, right, out=out)
    elif not writes_float32(out.device.type):
        _multiply_rounded(left, right, out, add)
    elif add:
        torch.ops.aten.addmm.dtype_out(out, left, right, out.dtype, out=out)
    else:
        torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)


@functools.cache
def writes_float32(device_type: str) -> bool:
    """Whether PyTorch's products of 16-bit matrices add to a float32 one in place.

    ``aten::addmm.dtype_out`` is there from 2.8 on, for CUDA and ROCm, and takes a float32 addend from 2.10 on.
    """
    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    return device_type == "cuda" and version >= (2, 10)


def _multiply_rounded(left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
    """Each product is rounded once to 16 bits; sums are float32."""
    rows = max(1, _ADDED_AT_ONCE // max(1, out.shape[1]))
    for start in range(0, len(out), rows):
        product = torch.mm(left[start : start + rows], right)
        part = out[start : start + rows]
        if add:
            part += product
        else:
            part.copy_(product)
