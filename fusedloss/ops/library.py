"""What every operation shares: the library that schemas are defined in, how a kernel is called, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fusedloss import backends

library = torch.library.Library("fusedloss", "DEF")
_PLAIN = (Tensor, torch.nn.Parameter)


def answer(operation: str, function: str) -> None:
    """Registers `function` for each device: the kernel of the backend that answers there."""

    def run(first: Tensor, *arguments: Any) -> Any:
        return backends.kernel(operation, function, first.device.type)(first, *arguments)

    for device in ("CPU", "CUDA"):
        library.impl(function, run, device)


def call(operation: str, function: str, first: Tensor, *arguments: Any) -> Any:
    """The operation; straight to its kernel where the dispatcher would only pass plain tensors on (9 of 35 us)."""
    device = "cpu" if first.is_cpu else "cuda" if first.is_cuda else None
    if (
        device is None
        or type(first) not in _PLAIN
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return getattr(torch.ops.fusedloss, function).default(first, *arguments)
    return backends.kernel(operation, function, device)(first, *arguments)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What losses are computed and returned in: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Refusal(torch.autograd.Function):
    """Passes a gradient on, and says so when it is differentiated in its turn."""

    @staticmethod
    def forward(ctx, gradient, *inputs):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, upstream):
        raise RuntimeError(
            "the kernels are differentiable once; for second derivatives use fusedloss.backend('reference')"
        )


def differentiable_once(backward: Callable) -> Callable:
    """once_differentiable forgets a graph that needs no upstream gradient: a gradient penalty would count nothing."""
    once = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def run(ctx, *upstream):
        if torch.compiler.is_compiling():
            return once(ctx, *upstream)
        if not torch.is_grad_enabled():
            return backward(ctx, *upstream)
        learned = [tensor for tensor in ctx.saved_tensors if tensor is not None and tensor.requires_grad]
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        return tuple(None if found is None else _Refusal.apply(found, *learned) for found in gradients)

    return run


def scale_in_place(gradients: list[Tensor], upstream: Tensor, written: float = 1.0) -> float | None:
    """Multiplies by the upstream gradient, but for the factor already `written`, and returns it.

    On a GPU the host is not asked, and nothing returned.
    """
    if upstream.is_cuda:
        from fusedloss.backends.triton.softmax_ce import scale_in_place as scale_on_device

        for gradient in gradients:
            scale_on_device(gradient, upstream)
        return None
    factor = upstream.item()
    if factor != written:
        for gradient in gradients:
            gradient.mul_(factor / written)
    return factor
