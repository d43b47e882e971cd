"""GPU kernels in Triton; with ``TRITON_INTERPRET=1`` its interpreter runs them on CPU tensors too.

A kernel is compiled and loaded at its first launch: call a loss and its backward once before a CUDA graph of them is
captured.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch


def unavailable_reason(device_type: str) -> str | None:
    """Why these kernels can't serve `device_type`, or None when they can; Triton is not imported."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
    if interpreted:
        return None if device_type in ("cpu", "cuda") else f"Triton's interpreter takes no '{device_type}' tensors"
    if device_type == "cpu":
        return "Triton takes CPU tensors only in its interpreter: set TRITON_INTERPRET=1 before starting Python"
    if device_type != "cuda":
        return f"no kernels for '{device_type}' tensors: they are for 'cuda', NVIDIA's GPUs and (under ROCm) AMD's"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    return None


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of this backend that goes on with smaller tiles where a device hasn't the resources of a kernel."""
    from .tiles import fitted

    return fitted(function)
