"""What every operation shares: where schemas are defined, how a kernel is reached, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fusedloss import backends

library = torch.library.Library("fusedloss", "DEF")
kernel = backends.kernel

_profiler_enabled = torch.autograd._profiler_enabled  # type: ignore[attr-defined]
_is_batched, _is_legacy_batched = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor
_PLAIN = (Tensor, torch.nn.Parameter)
_ONCE = "fusedloss's kernels are differentiable once; for second derivatives use fusedloss.backend('reference')"


def define(
    stem: str,
    schema: str,
    *,
    group: Callable[..., tuple[Any, ...]],
    check: Callable[..., None],
    fake: Callable[..., Any],
) -> None:
    """Defines an operation on every device, by the kernel of the backend that serves the device of its first tensor.

    Args:
        stem: the file of the backends that holds the kernel.
        schema: torch's schema; its name is also the kernel's function.
        group: the flat arguments of the schema as the kernel takes them: named tuples.
        check: raises where grouped arguments do not fit each other: a kernel trusts shapes and types.
        fake: grouped arguments -> tensors of the results' shapes, for tracing.
    """
    name = schema.split("(")[0]

    def run(*flat: Any) -> Any:
        arguments = group(*flat)
        check(*arguments)
        with _autograd_keys_included():
            return backends.kernel(stem, name, flat[0].device.type)(*arguments)

    def traced(*flat: Any) -> Any:
        arguments = group(*flat)
        check(*arguments)
        return fake(*arguments)

    library.define(schema)
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusedloss::{name}", traced, lib=library)


def register_autograd(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """The operation's derivative wherever the dispatcher is asked: export, AOT, subclasses and modes."""
    torch.library.register_autograd(f"fusedloss::{name}", backward, setup_context=setup_context, lib=library)


def refuse_second(name: str) -> None:
    """Registers an operation that is itself a backward: it has no derivative, and says so."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(_ONCE)

    torch.library.register_autograd(f"fusedloss::{name}", backward, lib=library)


def is_direct(*tensors: Tensor | None) -> bool:
    """Whether the dispatcher would only pass plain tensors on to the kernel: 9 of 35 us of a small call.

    Anything else, in any argument, goes to the dispatcher: subclasses, modes, tracing, negative views, other devices;
    and everything while a profiler is on, so that its ranges carry the operation's name.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or _profiler_enabled():
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or not (tensor.is_cpu or tensor.is_cuda) or tensor.is_neg():
            return False
    refuse_jit_trace()
    return True


def refuse_jit_trace() -> None:
    """torch.jit.trace sees the allocation of a result and not the kernel that fills it."""
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "torch.jit.trace can't record fusedloss's kernels; use torch.export or torch.compile, or trace inside "
            "fusedloss.backend('reference')"
        )


@contextmanager
def _autograd_keys_included() -> Iterator[None]:
    """Below the dispatcher's autograd keys, lets a reference formula derive its gradient by autograd."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


class _Refusal(torch.autograd.Function):
    """Passes a gradient on, and says so when it is differentiated in its turn."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        raise RuntimeError(_ONCE)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """once_differentiable forgets a graph that needs no upstream gradient: a gradient penalty would count nothing."""

    @wraps(backward)
    def run(ctx: Any, *upstream: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *upstream)
        inputs = [tensor for tensor in ctx.saved_tensors if tensor is not None and tensor.requires_grad]
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        return tuple(None if grad is None else _Refusal.apply(grad, *inputs) for grad in grads)

    return run


def requires_grad(tensor: Tensor | None) -> bool:
    """Whether there is a tensor, and it requires a gradient."""
    return tensor is not None and tensor.requires_grad


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor stands for many, as in ``torch.autograd.grad(..., is_grads_batched=True)``."""
    return _is_batched(tensor) or _is_legacy_batched(tensor)


def refuse_batched(*tensors: Tensor | None) -> None:
    """Raises where a backward kernel is asked for many upstream gradients at once."""
    if any(tensor is not None and is_batched(tensor) for tensor in tensors):
        raise RuntimeError(
            "fusedloss's kernels take one upstream gradient at a time, not is_grads_batched=True or torch.func.vmap; "
            "call torch.autograd.grad for each, or use fusedloss.backend('reference')"
        )


def scale_in_place(grads: list[Tensor], upstream: Tensor, written: float = 1.0) -> float | None:
    """Multiplies by the upstream gradient, but for the factor already `written`, and returns it.

    On a GPU the host is not asked, and nothing returned.
    """
    if upstream.is_cuda:
        scale = backends.kernel("softmax_ce", "scale_in_place", "cuda")
        for grad in grads:
            scale(grad, upstream)
        return None
    factor = upstream.item()
    if factor != written:
        for grad in grads:
            grad.mul_(factor / written)
    return factor
