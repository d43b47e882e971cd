"""A linear head and its loss, forward and backward: plain, weighted, smoothed, with temperatures, and ArcFace."""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedloss
from bench.cases import Case, Contest, Mismatch, compiled
from fusedloss import AngularMargin, ClassTemperature, Scale

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
MARGIN, SCALE, SMOOTHING = 0.5, 30.0, 0.1
# Beyond eager's own distance from float64, relative to the norm of the gradient.
_TOLERANCE = 1e-6
# Logits of the truth at a time.
_CHECKED_AT_A_TIME = 1 << 24


class _Kind(NamedTuple):
    """What is added to a linear head's cross-entropy."""

    class_weight: Tensor | None = None
    smoothing: float = 0.0
    temperature: Tensor | None = None
    cosine: bool = False


def eager(x: Tensor, w: Tensor, y: Tensor, kind: _Kind) -> Tensor:
    logits = arcface_logits(x, w, y) if kind.cosine else F.linear(x, w)
    if kind.temperature is not None:
        logits = logits / kind.temperature
    return F.cross_entropy(logits, y, kind.class_weight, label_smoothing=kind.smoothing)


def arcface_logits(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The label's cosine gathered, turned by the margin without an arc cosine, and scattered back."""
    cosine = F.linear(F.normalize(x), F.normalize(w))
    label = cosine.gather(1, y.unsqueeze(1))
    sine = (1 - label.square()).clamp_min(1e-7).sqrt()
    turned = label * math.cos(MARGIN) - sine * math.sin(MARGIN)
    turned = torch.where(label > math.cos(math.pi - MARGIN), turned, label - MARGIN * math.sin(MARGIN))
    return cosine.scatter(1, y.unsqueeze(1), turned) * SCALE


def fused(x: Tensor, w: Tensor, y: Tensor, kind: _Kind) -> Tensor:
    terms: list[fusedloss.terms.Term] = [AngularMargin(MARGIN), Scale(SCALE)] if kind.cosine else []
    if kind.temperature is not None:
        terms.append(ClassTemperature(kind.temperature))
    loss = fusedloss.linear_cross_entropy(
        x, w, y, normalize=kind.cosine, terms=terms, weight=kind.class_weight, label_smoothing=kind.smoothing
    )
    assert isinstance(loss, Tensor)
    return loss


def chunked(x: Tensor, w: Tensor, y: Tensor, kind: _Kind) -> Tensor:
    """PyTorch's own, chunked where it can: it stores the logits of a smoothed loss, and says so."""
    if kind.temperature is not None:
        w = w / kind.temperature.unsqueeze(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return F.linear_cross_entropy(
            x,
            w,
            y,
            weight=kind.class_weight,
            label_smoothing=kind.smoothing,
            options=torch.nn.LinearCrossEntropyOptions(),
        )


def metric_learning(shape: tuple[int, int, int]) -> Loss:
    """pytorch-metric-learning's ArcFaceLoss over the same class rows."""
    from pytorch_metric_learning.losses import ArcFaceLoss

    module = ArcFaceLoss(2, shape[1], margin=math.degrees(MARGIN), scale=SCALE)
    module.num_classes = shape[2]
    del module.W

    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        module.W = w.t()
        return module(x, y)

    return loss


def prepare(shape: tuple[int, int, int], kind_name: str) -> Contest:
    """Two batches, which repetitions alternate between, and the contestants on the same leaf tensors."""
    rows, width, num_classes = shape
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randn(rows, width, generator=generator) for _ in range(2)]
    labels = [torch.randint(num_classes, (rows,), generator=generator) for _ in range(2)]
    x, y = sources[0].clone().requires_grad_(), labels[0].clone()
    w = (torch.randn(num_classes, width, generator=generator) / math.sqrt(width)).requires_grad_()
    kind = _kind(kind_name, num_classes, generator)
    losses: dict[str, Loss] = {
        "fused": functools.partial(fused, kind=kind),
        "eager": functools.partial(eager, kind=kind),
        "compiled": functools.partial(compiled(eager), kind=kind),
    }
    if not kind.cosine:
        losses["torch chunked"] = functools.partial(chunked, kind=kind)
    elif importlib.util.find_spec("pytorch_metric_learning") is not None:
        losses["pml"] = metric_learning(shape)

    def step(loss: Loss) -> Callable[[], None]:
        return lambda: loss(x, w, y).backward()

    def refill(repetition: int) -> None:
        x.grad = w.grad = None
        x.detach().copy_(sources[repetition % 2])
        y.copy_(labels[repetition % 2])

    baseline = losses.get("torch chunked", losses["eager"])
    return Contest(
        calls={name: step(loss) for name, loss in losses.items()},
        limit=_products(x.detach(), w.detach()),
        refill=refill,
        check=lambda: _check(losses, x, w, y, kind),
        peak_baseline=step(baseline),
    )


def _kind(name: str, num_classes: int, generator: torch.Generator) -> _Kind:
    between = torch.rand(num_classes, generator=generator) * 1.5 + 0.5
    return {
        PLAIN: _Kind(),
        WEIGHTED: _Kind(class_weight=between),
        SMOOTHED: _Kind(smoothing=SMOOTHING),
        TEMPERATURE: _Kind(temperature=between),
        ARCFACE: _Kind(cosine=True),
    }[name]


def _products(x: Tensor, w: Tensor) -> Callable[[], None]:
    """The three products of a step, whole: no method on this machine is faster."""
    logits = x.new_empty(len(x), len(w))
    grad_x, grad_w = torch.empty_like(x), torch.empty_like(w)

    def run() -> None:
        torch.mm(x, w.t(), out=logits)
        torch.mm(logits, w, out=grad_x)
        torch.mm(logits.t(), x, out=grad_w)

    return run


def _check(losses: dict[str, Loss], x: Tensor, w: Tensor, y: Tensor, kind: _Kind) -> None:
    truth = _truth(x.detach(), w.detach(), y, kind)
    errors = {}
    for name, loss in losses.items():
        value = loss(x, w, y)
        found = (value.detach(), *torch.autograd.grad(value, (x, w)))
        errors[name] = [
            float((ours.double() - theirs).norm() / theirs.norm()) for ours, theirs in zip(found, truth, strict=True)
        ]
    for name, got in errors.items():
        if not all(error <= least + _TOLERANCE for error, least in zip(got, errors["eager"], strict=True)):
            raise Mismatch(f"{name} is {got} from float64 (loss, input, weight), eager {errors['eager']}")


def _truth(x: Tensor, w: Tensor, y: Tensor, kind: _Kind) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float64, some rows at a time."""
    double = kind._replace(
        class_weight=None if kind.class_weight is None else kind.class_weight.double(),
        temperature=None if kind.temperature is None else kind.temperature.double(),
    )
    weight = w.double().requires_grad_()
    total = len(y) if kind.class_weight is None else float(kind.class_weight.double()[y].sum())
    loss, parts = torch.zeros((), dtype=torch.float64), []
    for rows in torch.arange(len(x)).split(max(1, _CHECKED_AT_A_TIME // len(w))):
        part = x[rows].double().requires_grad_()
        each = len(rows) if double.class_weight is None else double.class_weight[y[rows]].sum()
        value = eager(part, weight, y[rows], double) * each / total
        value.backward()
        loss += value.detach()
        parts.append(part.grad)
    assert weight.grad is not None
    return loss, torch.cat([part for part in parts if part is not None]), weight.grad


def _case(title: str, shape: tuple[int, int, int], targets: dict[str, float], quick: bool = False) -> Case:
    rows, width, num_classes = shape
    return Case(
        operation="linear_ce",
        title=title,
        shape=shape,
        dtype=torch.float32,
        # Features and class rows are read once, their gradients written once.
        moved=2 * 4 * width * (rows + num_classes),
        limit="products",
        prepare=functools.partial(prepare, shape, title),
        targets=targets,
        quick=quick,
        timed=rows * num_classes < 1 << 28,
    )


PLAIN, WEIGHTED, SMOOTHED = "linear cross-entropy", "weighted linear cross-entropy", "smoothed linear cross-entropy"
TEMPERATURE, ARCFACE = "linear cross-entropy with class temperatures", "ArcFace"
_SHAPES = [
    (512 if num_classes == 100000 else 1024, width, num_classes)
    for num_classes in (1000, 10000, 100000)
    for width in (384, 768, 1024)
]
_ARCFACE_TARGETS: dict[tuple[int, int, int], dict[str, float]] = {
    (1024, 512, 1000): {},
    (1024, 512, 10000): {"eager": 1.6, "compiled": 1.2, "share": 1 / 1.15},
    (512, 512, 100000): {"eager": 1.7, "share": 1 / 1.15},
    # Gradients are 213 MB of the peak; eager stores several times 1638 MB of logits.
    (4096, 512, 100000): {"peak": 0.06},
}

CASES = (
    *(_case(ARCFACE, shape, targets, quick=shape[2] == 1000) for shape, targets in _ARCFACE_TARGETS.items()),
    *(
        _case(title, shape, {"torch chunked": 1.0, "peak": 1.0}, quick=shape == (1024, 384, 1000))
        for title in (PLAIN, WEIGHTED, SMOOTHED)
        for shape in _SHAPES
    ),
    *(_case(TEMPERATURE, shape, {"fastest": 1.5}) for shape in _SHAPES if shape[1] == 768),
)
