"""What the machine can do, measured in the run that it judges: copying, reading, multiplying matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench import timing

_BUFFER_BYTES = 256 << 20
_GEMM_SIZE = 1024


def copy_of(source: Tensor) -> Callable[[], Any]:
    """Copies `source` into memory of its own: reads each byte once and writes it once."""
    destination = source.detach().clone()
    return lambda: destination.copy_(source.detach())


def read_of(source: Tensor) -> Callable[[], Any]:
    """Reads each byte of `source` once: whichever of PyTorch's reductions is the fastest here."""
    words = source.detach().reshape(-1).view(torch.float32)
    readers: dict[str, Callable[[], Any]] = {
        "sum": words.sum,
        "amax": words.view(torch.int32).amax,
        "dot": lambda: torch.dot(words, words),
        "norm": lambda: torch.linalg.vector_norm(words),
    }
    times = timing.in_turn(readers, lambda _: None, seconds=0.0)
    return readers[min(readers, key=lambda name: timing.summary(times[name]).median)]


def limits(seconds: float) -> dict[str, float]:
    """GB/s of a copy (bytes read and written) and of a read of 256 MiB; GFLOP/s of a square GEMM by dtype."""
    buffer = torch.zeros(_BUFFER_BYTES // 4)
    square = {dtype: torch.randn(_GEMM_SIZE, _GEMM_SIZE).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    products = {dtype: torch.empty_like(matrix) for dtype, matrix in square.items()}
    calls: Mapping[str, Callable[[], Any]] = {
        "copy": copy_of(buffer),
        "read": read_of(buffer),
        "gemm_float32": lambda: torch.mm(*(square[torch.float32],) * 2, out=products[torch.float32]),
        "gemm_bfloat16": lambda: torch.mm(*(square[torch.bfloat16],) * 2, out=products[torch.bfloat16]),
    }
    amount = {"copy": 2 * _BUFFER_BYTES, "read": _BUFFER_BYTES}
    times = timing.in_turn(calls, lambda _: None, seconds)
    return {
        name: amount.get(name, 2 * _GEMM_SIZE**3) / timing.summary(taken).median / 1e9 for name, taken in times.items()
    }
