"""Cross-entropy, forward and backward: plain, and with a temperature for each class (VACE)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedloss
from bench import roofline
from bench.cases import Case, Contest, Mismatch, compiled
from fusedloss import ClassTemperature

Loss = Callable[[Tensor, Tensor], Tensor]
# Beyond eager's own distance from float64, relative to the gradient's norm.
_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-3}
# The float64 copies of so many logits stay in cache.
_CHECKED_AT_A_TIME = 1 << 18


class _Deviation(NamedTuple):
    """Distance from float64: of the loss, of the gradient on average and at most, each relative."""

    loss: float
    mean: float
    most: float


def plain_eager(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def plain_fused(logits: Tensor, target: Tensor) -> Tensor:
    return fusedloss.cross_entropy(logits, target)


def vace_eager(logits: Tensor, target: Tensor, tau: Tensor) -> Tensor:
    return F.cross_entropy(logits / tau, target)


def vace_fused(logits: Tensor, target: Tensor, tau: Tensor) -> Tensor:
    return fusedloss.cross_entropy(logits, target, terms=[ClassTemperature(tau)])


def prepare(shape: tuple[int, int], dtype: torch.dtype, divisor: int, vace: bool) -> Contest:
    """Two sets of inputs, which repetitions alternate between, and the contestants on one leaf tensor."""
    generator = torch.Generator().manual_seed(0)
    rows, num_classes = shape
    sources = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
    labels = [torch.randint(num_classes, (rows,), generator=generator) for _ in range(2)]
    logits, target = sources[0].clone().requires_grad_(), labels[0].clone()
    losses: dict[str, Loss]
    tau = torch.ones(num_classes)
    if vace:
        tau = torch.rand(num_classes, generator=generator) * 1.5 + 0.5
        functions = {"fused": vace_fused, "eager": vace_eager, "compiled": compiled(vace_eager)}
        losses = {name: functools.partial(function, tau=tau) for name, function in functions.items()}
    else:
        losses = {"fused": plain_fused, "eager": plain_eager, "compiled": compiled(plain_eager)}

    def step(loss: Loss) -> Callable[[], None]:
        if divisor == 1:
            return lambda: loss(logits, target).backward()
        return lambda: (loss(logits, target) / divisor).backward()

    def refill(repetition: int) -> None:
        logits.grad = None
        logits.detach().copy_(sources[repetition % 2])
        target.copy_(labels[repetition % 2])

    return Contest(
        calls={name: step(loss) for name, loss in losses.items()},
        limit=roofline.copy_of(logits),
        refill=refill,
        check=lambda: _check(losses, sources, labels, tau, divisor),
        peak_baseline=step(plain_eager) if vace else None,
    )


def _check(losses: dict[str, Loss], sources: list[Tensor], labels: list[Tensor], tau: Tensor, divisor: int) -> None:
    """Two losses alive at once, with different upstream gradients: each must be right in every contestant."""
    divisors = (divisor, 3)
    found: list[dict[str, tuple[float, Tensor]]] = [{}, {}]
    for name, loss in losses.items():
        leaves = [source.detach().requires_grad_() for source in sources]
        values = [loss(leaf, target) for leaf, target in zip(leaves, labels, strict=True)]
        for value, by in zip(reversed(values), reversed(divisors), strict=True):
            (value / by).backward()
        for results, leaf, value in zip(found, leaves, values, strict=True):
            if leaf.grad is None or leaf.grad.dtype != leaf.dtype:
                raise Mismatch(f"{name}: no gradient in {leaf.dtype}")
            results[name] = (float(value.detach()), leaf.grad)
    for results, source, target, by in zip(found, sources, labels, divisors, strict=True):
        deviations = _deviations(results, source, target, tau, by)
        allowed = deviations["eager"]
        for name, deviation in deviations.items():
            if not all(got <= least + _TOLERANCE[source.dtype] for got, least in zip(deviation, allowed, strict=True)):
                raise Mismatch(f"{name} is {deviation} from float64, eager {allowed}")


def _deviations(
    results: dict[str, tuple[float, Tensor]], logits: Tensor, target: Tensor, tau: Tensor, divisor: int
) -> dict[str, _Deviation]:
    """Of each contestant; the truth is computed in float64, some rows at a time."""
    rows, num_classes = logits.shape
    value, norm, most = 0.0, 0.0, 0.0
    errors = {name: [0.0, 0.0] for name in results}
    for part in torch.arange(rows).split(max(1, _CHECKED_AT_A_TIME // num_classes)):
        span = slice(int(part[0]), int(part[-1]) + 1)
        leaf = logits[span].double().requires_grad_()
        loss = F.cross_entropy(leaf / tau.double(), target[span], reduction="sum") / rows
        (truth,) = torch.autograd.grad(loss / divisor, leaf)
        value += float(loss.detach())
        norm += float(truth.abs().sum())
        most = max(most, float(truth.abs().max()))
        for name, (_, gradient) in results.items():
            error = gradient[span].double().sub_(truth).abs_()
            errors[name][0] += float(error.sum())
            errors[name][1] = max(errors[name][1], float(error.max()))
    return {
        name: _Deviation(abs(results[name][0] - value) / max(1.0, abs(value)), total / norm, worst / most)
        for name, (total, worst) in errors.items()
    }


def _case(
    title: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    targets: dict[str, float],
    divisor: int = 1,
    quick: bool = False,
) -> Case:
    if (shape, dtype, divisor) == ((4096, 1000), torch.float32, 1):
        targets = targets | {"share": 0.8}
    return Case(
        operation="softmax_ce",
        title=title,
        shape=shape,
        dtype=dtype,
        # The logits are read once and their gradient is written once.
        moved=2 * shape[0] * shape[1] * dtype.itemsize,
        limit="copy",
        prepare=functools.partial(prepare, shape, dtype, divisor, title == VACE),
        divisor=divisor,
        targets=targets,
        quick=quick,
    )


VACE, PLAIN = "VACE cross-entropy", "cross-entropy"
_VACE_TARGETS = {
    (4096, 1000): {"eager": 3.0, "compiled": 4.0},
    (1024, 10000): {"eager": 3.5, "compiled": 5.0},
    (256, 100000): {"eager": 3.5, "compiled": 4.5},
    (8192, 100): {"eager": 2.0, "compiled": 2.0},
}
_PLAIN_TARGETS: dict[tuple[int, int], dict[str, float]] = {
    (1, 2): {"overhead_us": 40.0},
    (64, 10): {"overhead_us": 40.0},
    (512, 1000): {"fastest": 1.0},
    (8192, 100): {"fastest": 1.0},
    (4096, 1000): {"fastest": 1.0},
    (1024, 10000): {"fastest": 1.0},
    (256, 100000): {"fastest": 1.0},
    (32, 1000000): {"fastest": 1.0},
}
_QUICK = {(1, 2), (512, 1000), (8192, 100)}

CASES = (
    *(
        _case(VACE, shape, torch.float32, targets | {"peak": 1.0}, divisor, quick=shape == (8192, 100))
        for shape, targets in _VACE_TARGETS.items()
        for divisor in (1, 4)
    ),
    *(_case(VACE, shape, torch.bfloat16, {"peak": 1.0}) for shape in _VACE_TARGETS),
    *(
        _case(PLAIN, shape, dtype, targets, quick=shape in _QUICK and dtype == torch.float32)
        for dtype in (torch.float32, torch.bfloat16)
        for shape, targets in _PLAIN_TARGETS.items()
    ),
)
