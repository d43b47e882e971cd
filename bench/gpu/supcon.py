"""Supervised contrast of bfloat16 features with themselves, forward and backward; similarities in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bench.cases import compiled
from bench.gpu import Case, Contest, agree, installed, values_of
from bench.supcon import NUM_CLASSES, eager, fused, metric_learning, truth

Loss = Callable[[Tensor, Tensor], Tensor]
PARTS = ("128", "256")
_ROWS = (4096, 16384, 65536, 262144)
_TOLERANCE = 1e-2


def eager_float32(features: Tensor, labels: Tensor) -> Tensor:
    return eager(features.float(), labels)


def prepare(device: torch.device, rows: int, width: int) -> Contest:
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(rows, width, generator=generator, device=device, dtype=torch.bfloat16).requires_grad_()
    y = torch.randint(NUM_CLASSES, (rows,), generator=generator, device=device)
    losses: dict[str, Loss] = {"fused": fused, "eager": eager_float32}
    if device.type == "cuda":
        losses["compiled"] = compiled(eager_float32)
    if installed("pytorch_metric_learning"):
        pml = metric_learning()
        losses["pml"] = lambda features, labels: pml(features.float(), labels)

    def step(loss: Loss) -> Tensor:
        x.grad = None
        value = loss(x, y)
        value.backward()
        return value

    def values(loss: Loss) -> tuple[Tensor, ...]:
        value = step(loss).detach()
        assert x.grad is not None
        return value, x.grad.clone()

    def check() -> list[str]:
        found = values_of({name: functools.partial(values, loss) for name, loss in losses.items()})
        return agree(found, truth(x.detach(), y), _TOLERANCE)

    return Contest({name: functools.partial(step, loss) for name, loss in losses.items()}, check)


def cases(small: bool) -> list[Case]:
    found = []
    for part in PARTS:
        for rows in (40, 70) if small else _ROWS:
            width = int(part) // 8 if small else int(part)
            # Three products: similarities, and the gradient's two.
            found.append(Case("supcon", f"bfloat16 {rows} x {width}", 6.0 * rows * rows * width, "gemm",
                              functools.partial(prepare, rows=rows, width=width), part))  # fmt: skip
    return found
