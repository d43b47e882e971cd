"""Supervised contrast of a batch with itself, forward and backward; 100 classes, T = 0.1."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedloss
from bench.cases import Case, Contest, Mismatch, compiled

Loss = Callable[[Tensor, Tensor], Tensor]
NUM_CLASSES, TEMPERATURE = 100, 0.1
# Beyond eager's own distance from float64, relative to the norm of the gradient.
_TOLERANCE = 1e-6
# From here on the N x N matrices of the usual code take gigabytes: they are not run.
_MOST_ROWS_OF_RIVALS = 8192
_CHUNK = 512


def eager(features: Tensor, labels: Tensor) -> Tensor:
    """The usual code: the mask, the similarities and their softmax, each N x N."""
    x = F.normalize(features, dim=1)
    similarity = x @ x.t() / TEMPERATURE
    logits = similarity - similarity.max(1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(x), device=x.device)
    positive = torch.eq(labels.unsqueeze(1), labels).float() * others
    log_p = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    count = positive.sum(1)
    mean = (positive * log_p).sum(1) / count.clamp(min=1)
    return -mean.sum() / (count > 0).sum()


def fused(features: Tensor, labels: Tensor) -> Tensor:
    return fusedloss.supcon(features, labels, temperature=TEMPERATURE)


def metric_learning() -> Loss:
    """pytorch-metric-learning's SupConLoss."""
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature=TEMPERATURE)


def prepare(shape: tuple[int, int], rivals: bool = True) -> Contest:
    """Two batches, which repetitions alternate between, and the contestants on one leaf tensor."""
    generator = torch.Generator().manual_seed(0)
    rows, width = shape
    sources = [torch.randn(rows, width, generator=generator) for _ in range(2)]
    labels = [torch.randint(NUM_CLASSES, (rows,), generator=generator) for _ in range(2)]
    x, y = sources[0].clone().requires_grad_(), labels[0].clone()
    losses: dict[str, Loss] = {"fused": fused}
    if rivals and rows <= _MOST_ROWS_OF_RIVALS:
        losses |= {"eager": eager, "compiled": compiled(eager)}
        if importlib.util.find_spec("pytorch_metric_learning") is not None:
            losses["pml"] = metric_learning()

    def step(loss: Loss) -> Callable[[], None]:
        return lambda: loss(x, y).backward()

    def refill(repetition: int) -> None:
        x.grad = None
        x.detach().copy_(sources[repetition % 2])
        y.copy_(labels[repetition % 2])

    return Contest(
        calls={name: step(loss) for name, loss in losses.items()},
        limit=products(x.detach()),
        refill=refill,
        check=lambda: _check(losses, x, y),
    )


def products(x: Tensor) -> Callable[[], None]:
    """The three products of the usual code, in chunks of rows that stay in the cache."""
    similarity, gradient = x.new_empty(_CHUNK, len(x)), torch.empty_like(x)

    def run() -> None:
        gradient.zero_()
        for first in range(0, len(x), _CHUNK):
            rows = x[first : first + _CHUNK]
            torch.mm(rows, x.t(), out=similarity[: len(rows)])
            gradient[first : first + _CHUNK].addmm_(similarity[: len(rows)], x)
            gradient.addmm_(similarity[: len(rows)].t(), rows)

    return run


def _check(losses: dict[str, Loss], x: Tensor, y: Tensor) -> None:
    """Loss and gradient against float64, by which eager is judged too."""
    exact = truth(x.detach(), y)
    errors = {}
    for name, loss in losses.items():
        value = loss(x, y)
        found = (value.detach(), *torch.autograd.grad(value, x))
        errors[name] = [
            float((ours.double() - theirs).norm() / theirs.norm()) for ours, theirs in zip(found, exact, strict=True)
        ]
    least = errors.get("eager", [0.0, 0.0])
    for name, got in errors.items():
        if not all(error <= best + _TOLERANCE for error, best in zip(got, least, strict=True)):
            raise Mismatch(f"{name} is {got} from float64 (loss, features), eager {least}")


def truth(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64, some anchors at a time."""
    double = x.double().requires_grad_()
    unit = F.normalize(double, dim=1)
    leaf, columns = unit.detach().requires_grad_(), torch.arange(len(x), device=x.device)
    anchors = int((torch.bincount(y)[y] > 1).sum())
    value = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows in columns.split(_CHUNK):
        similarity = leaf[rows] @ leaf.t() / TEMPERATURE
        own = rows.unsqueeze(1) == columns
        positive = (y[rows].unsqueeze(1) == y) & ~own
        count = positive.sum(1)
        lse = similarity.masked_fill(own, -torch.inf).logsumexp(1)
        mean = (similarity * positive).sum(1) / count.clamp(min=1)
        part = torch.where(count > 0, lse - mean, 0.0).sum() / anchors
        part.backward()
        value += part.detach()
    unit.backward(leaf.grad)
    assert double.grad is not None
    return value, double.grad


def _case(shape: tuple[int, int], targets: dict[str, float], quick: bool = False) -> Case:
    rows, width = shape
    return Case(
        operation="supcon",
        title="supervised contrast",
        shape=shape,
        dtype=torch.float32,
        # Features are read once, their gradient is written once.
        moved=2 * 4 * rows * width,
        limit="products",
        prepare=functools.partial(prepare, shape),
        targets=targets,
        quick=quick,
    )


_SHARE = {"share": 0.9}
CASES = (
    _case((1024, 128), {}, quick=True),
    _case((4096, 128), {"eager": 5.5, "compiled": 1.8, "pml": 6.0, **_SHARE}),
    _case((8192, 128), {"eager": 8.0, **_SHARE}),
    _case((4096, 512), {"eager": 1.7, "compiled": 1.05, **_SHARE}),
    _case((16384, 128), _SHARE),
)
