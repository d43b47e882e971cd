"""Cross-entropy with a temperature for each class and plain, forward and backward, about 1 GB of logits."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import compiled
from bench.gpu import Case, Contest, agree, installed, values_of
from bench.softmax_ce import plain_eager, plain_fused, vace_eager, vace_fused

_CLASSES = (100, 1000, 10000, 32000, 128256)
_BYTES = 2**30
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
_CHECKED = 64  # rows whose gradient is compared
_VALUES_AT_A_TIME = 1 << 26  # in float64


def vace_liger(logits: Tensor, target: Tensor, tau: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits / tau, target)


def plain_liger(logits: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits, target)


def vace_quack(logits: Tensor, target: Tensor, tau: Tensor) -> Tensor:
    from quack import cross_entropy

    return cross_entropy(logits / tau, target, reduction="mean")


def plain_quack(logits: Tensor, target: Tensor) -> Tensor:
    from quack import cross_entropy

    return cross_entropy(logits, target, reduction="mean")


def prepare(device: torch.device, rows: int, num_classes: int, dtype: torch.dtype, vace: bool) -> Contest:
    generator = torch.Generator(device=device).manual_seed(0)
    logits = torch.randn(rows, num_classes, generator=generator, device=device, dtype=dtype).requires_grad_()
    target = torch.randint(num_classes, (rows,), generator=generator, device=device)
    # The same numbers in every type.
    tau = (torch.rand(num_classes, generator=generator, device=device) * 1.5 + 0.5).bfloat16().float()
    if vace:
        contestants: dict[str, Callable] = {"fused": vace_fused, "eager": vace_eager}
        contestants |= {"liger": vace_liger} if installed("liger_kernel") else {}
        contestants |= {"quack": vace_quack} if installed("quack") else {}
        losses = {name: functools.partial(loss, tau=tau.to(dtype)) for name, loss in contestants.items()}
        losses["fused"] = functools.partial(vace_fused, tau=tau)
        eager = functools.partial(vace_eager, tau=tau.to(dtype))
    else:
        losses = {"fused": plain_fused, "eager": plain_eager}
        losses |= {"liger": plain_liger} if installed("liger_kernel") else {}
        losses |= {"quack": plain_quack} if installed("quack") else {}
        eager = plain_eager
    if device.type == "cuda":
        losses["compiled"] = compiled(eager)

    # Liger writes the gradient over its input: it has one of its own, which only its first step finds as it was.
    overwritten = logits.detach().clone().requires_grad_() if "liger" in losses and not vace else logits

    def step(name: str) -> Tensor:
        x = overwritten if name == "liger" else logits
        x.grad = None
        value = losses[name](x, target)
        value.backward()
        return value.detach()

    def values(name: str) -> tuple[Tensor, ...]:
        value = step(name)
        grad = (overwritten if name == "liger" else logits).grad
        assert grad is not None
        return value, grad[:_CHECKED].clone()

    def check() -> list[str]:
        found = values_of({name: functools.partial(values, name) for name in losses})
        total = torch.zeros((), dtype=torch.float64, device=device)
        at_a_time = max(1, _VALUES_AT_A_TIME // num_classes)
        for start in range(0, rows, at_a_time):
            part = logits.detach()[start : start + at_a_time].double() / (tau.double() if vace else 1.0)
            total += F.cross_entropy(part, target[start : start + at_a_time], reduction="sum")
        first = logits.detach()[:_CHECKED].double().requires_grad_()
        (gradient,) = torch.autograd.grad(
            F.cross_entropy(first / (tau.double() if vace else 1.0), target[:_CHECKED], reduction="sum") / rows, first
        )
        return agree(found, (total / rows, gradient), _TOLERANCE[dtype])

    return Contest({name: functools.partial(step, name) for name in losses}, check)


def cases(small: bool) -> list[Case]:
    found = []
    for vace in (True, False):
        for dtype in (torch.bfloat16, torch.float32):
            for num_classes in (20, 70) if small else _CLASSES:
                rows = 5 if small else _BYTES // (num_classes * dtype.itemsize)
                # The logits are read once and their gradient is written once.
                work = 2.0 * rows * num_classes * dtype.itemsize
                kind = "class temperature" if vace else "plain"
                label = f"{kind} {str(dtype).removeprefix('torch.')} {rows} x {num_classes}"
                found.append(Case("softmax_ce", label, work, "copy", functools.partial(
                    prepare, rows=rows, num_classes=num_classes, dtype=dtype, vace=vace)))  # fmt: skip
    return found
