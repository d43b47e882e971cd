"""Where margin losses break: equal and opposite rows, zero rows, tiny and huge ones, 16-bit types.

    python -m bench.extreme_cosines

Prints one line per case: the relative error of the gradients of features and class rows against float64 with the
angle's unit tangent, or what was found in place of numbers. pytorch-metric-learning joins in where it is installed.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedloss

# At a scale of 30 an equal row has a loss of 1e-11, whose gradient no 16-bit type holds.
MARGIN, SCALE = 0.5, 8.0
ROWS, CLASSES, WIDTH = 8, 12, 64
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    terms = [fusedloss.AngularMargin(MARGIN), fusedloss.Scale(SCALE)]
    loss = fusedloss.linear_cross_entropy(x, w, y, normalize=True, terms=terms)
    assert isinstance(loss, Tensor)
    return loss


def usual(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The snippet of most repositories."""
    cosine = F.linear(F.normalize(x), F.normalize(w))
    theta = torch.acos(cosine.clamp(-1 + 1e-7, 1 - 1e-7))
    label = F.one_hot(y, len(w)).bool()
    return F.cross_entropy(torch.where(label, torch.cos(theta + MARGIN), cosine).float() * SCALE, y)


def metric_learning() -> Loss | None:
    """pytorch-metric-learning's ArcFaceLoss on given class rows."""
    if importlib.util.find_spec("pytorch_metric_learning") is None:
        return None
    from pytorch_metric_learning.losses import ArcFaceLoss

    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        module = ArcFaceLoss(len(w), w.shape[1], margin=math.degrees(MARGIN), scale=SCALE)
        del module.W
        module.W = w.t()
        return module(x, y)

    return loss


def truth(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """In float64; the label's gradient is sin(theta + m) times the unit tangent, 0 where there is none."""
    x_length, w_length = (torch.linalg.vector_norm(rows, dim=1, keepdim=True) for rows in (x, w))
    x_unit, w_unit = (
        torch.where(length == 0, 0.0, rows / torch.where(length == 0, 1.0, length))
        for rows, length in ((x, x_length), (w, w_length))
    )
    cosine, label = x_unit @ w_unit.t(), w_unit[y]
    with torch.no_grad():
        c = (x_unit * label).sum(1, keepdim=True)
        tangents = [label - c * x_unit, x_unit - c * label]
        sine = torch.linalg.vector_norm(tangents[0], dim=1, keepdim=True)
        theta = torch.atan2(sine, c)
        empty = (x_length == 0) | (w_length[y] == 0)
        theta = torch.where(empty, math.pi / 2, theta)
        inside = theta + MARGIN <= math.pi
        value = torch.where(inside, torch.cos(theta + MARGIN), theta.cos() - MARGIN * math.sin(MARGIN))
        slope = torch.where(inside, torch.sin(theta + MARGIN), theta.sin())
        # A sine of 1e-12 is the rounding of float64.
        units = [slope * torch.where(sine < 1e-12, 0, tangent / sine) for tangent in tangents]
    value = value + sum(
        (unit * (rows - rows.detach())).sum(1, keepdim=True) for unit, rows in zip(units, (x_unit, label), strict=True)
    )
    return F.cross_entropy(cosine.scatter(1, y.unsqueeze(1), value) * SCALE, y)


def rows_at(angle: float, x: Tensor, other: Tensor) -> Tensor:
    """Rows at `angle` to those of x."""
    x, other = F.normalize(x.double()), other.double()
    other = F.normalize(other - (other * x).sum(1, keepdim=True) * x)
    return math.cos(angle) * x + math.sin(angle) * other


def cases() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Features, class rows and labels, in float64, of each case."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).bfloat16().double()
    w = torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64).bfloat16().double()
    y = torch.arange(ROWS)
    found = {"random rows": (x, w, y)}

    def with_labels(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, torch.cat([rows, w[ROWS:]]), y

    found["cos = 1 (equal rows)"] = with_labels(x)
    found["cos = -1 (opposite rows)"] = with_labels(-x)
    found["angle 1e-3"] = with_labels(rows_at(1e-3, x, w[:ROWS]))
    found["theta + m just below pi"] = with_labels(rows_at(math.pi - MARGIN - 1e-3, x, w[:ROWS]))
    found["theta + m just above pi"] = with_labels(rows_at(math.pi - MARGIN + 1e-3, x, w[:ROWS]))
    found["a zero feature row"] = (x * (torch.arange(ROWS) != 2).unsqueeze(1), w, y)
    found["a zero class row"] = (x, w * (torch.arange(CLASSES) != 2).unsqueeze(1), y)
    found["features of 1e-20"] = (1e-20 * x, w, y)
    found["features of 1e20"] = (1e20 * x, w, y)
    found["class rows of 1e-20"] = (x, 1e-20 * w, y)
    found["class rows of 1e20"] = (x, 1e20 * w, y)
    return found


def error(loss: Loss, arguments: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> str:
    """Of both gradients, relative in norm, or what they hold."""
    x, w, y = arguments
    x, w = x.to(dtype), w.to(dtype)
    if not all(bool(torch.isfinite(rows).all() and (rows.abs() > 0).any()) for rows in (x, w)):
        return "-"
    exact = x.double().requires_grad_(), w.double().requires_grad_()
    expected = torch.autograd.grad(truth(exact[0], exact[1], y), exact)
    own = x.clone().requires_grad_(), w.clone().requires_grad_()
    try:
        found = torch.autograd.grad(loss(own[0], own[1], y), own)
    except (RuntimeError, ValueError) as problem:
        return type(problem).__name__
    worst = 0.0
    for ours_, theirs in zip(found, expected, strict=True):
        fits = theirs.abs().max() <= torch.finfo(dtype).max
        if bool(torch.isnan(ours_).any()):
            return "NaN"
        if bool(torch.isinf(ours_).any()) and fits:
            return "inf"
        # Entries below the type's range can't be held.
        scale = theirs.norm()
        worst = max(worst, float((ours_.double() - theirs).norm() / scale)) if scale > 0 else worst
    return f"{worst:.0e}"


def main() -> None:
    contestants: dict[str, Loss] = {"fusedloss": ours, "usual snippet": usual}
    peer = metric_learning()
    if peer is not None:
        contestants["pytorch-metric-learning"] = peer
    types = (torch.float32, torch.bfloat16, torch.float16)
    head = [f"{name} {str(dtype).removeprefix('torch.')}" for name in contestants for dtype in types]
    print("| case | " + " | ".join(head) + " |")
    print("|---" * (len(head) + 1) + "|")
    for name, arguments in cases().items():
        cells = [error(loss, arguments, dtype) for loss in contestants.values() for dtype in types]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
