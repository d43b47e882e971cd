"""A linear head and its cross-entropy in bfloat16, forward and backward: plain, and ArcFace."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedloss
from bench.cases import compiled
from bench.gpu import Case, Contest, agree, installed, values_of
from bench.linear_ce import MARGIN, SCALE, arcface_logits
from fusedloss import AngularMargin, Scale

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
PARTS = ("384", "768", "1024", "4096")
_CLASSES = (1000, 10000, 131072, 1000000)
_ROWS = {1000: 16384, 10000: 16384, 131072: 8192, 1000000: 4096}
_TOLERANCE = 2e-2
# Rows of the input's gradient and classes of the weight's that are checked, and classes of the truth at a time.
_CHECKED, _CLASSES_AT_A_TIME = 64, 1 << 14


def plain_fused(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return fusedloss.linear_cross_entropy(x, w, y)  # type: ignore[return-value]


def plain_eager(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), y)


def plain_torch(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """PyTorch's own, in chunks where it has an option for that."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    return F.linear_cross_entropy(x, w, y, **({} if options is None else {"options": options()}))


def plain_liger(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    found = liger_fused_linear_cross_entropy(x, w, y)
    return found[0] if isinstance(found, tuple) else found


def plain_cce(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, w, y)


def arcface_fused(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return fusedloss.linear_cross_entropy(  # type: ignore[return-value]
        x, w, y, normalize=True, terms=[AngularMargin(MARGIN), Scale(SCALE)]
    )


def arcface_eager(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(arcface_logits(x, w, y), y)


def contestants(arcface: bool, device: torch.device) -> dict[str, Loss]:
    """Those that can do it, and are here."""
    eager = arcface_eager if arcface else plain_eager
    losses: dict[str, Loss] = {"fused": arcface_fused if arcface else plain_fused, "eager": eager}
    if not arcface:
        losses |= {"torch": plain_torch} if hasattr(F, "linear_cross_entropy") else {}
        losses |= {"liger": plain_liger} if installed("liger_kernel") else {}
        losses |= {"cce": plain_cce} if installed("cut_cross_entropy") else {}
    return losses | ({"compiled": compiled(eager)} if device.type == "cuda" else {})


def prepare(device: torch.device, rows: int, width: int, num_classes: int, arcface: bool) -> Contest:
    generator = torch.Generator(device=device).manual_seed(0)
    random = functools.partial(torch.randn, generator=generator, device=device, dtype=torch.bfloat16)
    x, w = random(rows, width).requires_grad_(), random(num_classes, width).div_(width**0.5).requires_grad_()
    y = torch.randint(num_classes, (rows,), generator=generator, device=device)
    losses = contestants(arcface, device)

    def step(loss: Loss) -> Tensor:
        x.grad = w.grad = None
        value = loss(x, w, y)
        value.backward()
        return value

    def values(loss: Loss) -> tuple[Tensor, ...]:
        value = step(loss)
        assert x.grad is not None and w.grad is not None
        return value.detach(), x.grad[:_CHECKED].clone(), w.grad[:_CHECKED].clone()

    def check() -> list[str]:
        found = values_of({name: functools.partial(values, loss) for name, loss in losses.items()})
        x.grad = w.grad = None
        return agree(found, truth(x.detach(), w.detach(), y, arcface), _TOLERANCE)

    return Contest({name: functools.partial(step, loss) for name, loss in losses.items()}, check)


def truth(x: Tensor, w: Tensor, y: Tensor, arcface: bool) -> tuple[Tensor, Tensor, Tensor]:
    """In float64: the loss, and its gradients of the first rows of the input and of the weight."""
    wide = x.double()
    parts, at_label = [], torch.zeros_like(wide[:, 0])
    for start, block in _blocks(w):
        z, is_label = _logits(wide, block, y, start, arcface)
        parts.append(z.logsumexp(1))
        at_label += torch.where(is_label, z, 0.0).sum(1)
    lse = torch.stack(parts).logsumexp(0)

    def backward(z: Tensor, is_label: Tensor, rows: slice) -> None:
        z.backward(((z.detach() - lse[rows].unsqueeze(1)).exp() - is_label.double()) / len(x))

    first, some = wide[:_CHECKED].clone().requires_grad_(), w[:_CHECKED].double().requires_grad_()
    for start, block in _blocks(w):
        backward(*_logits(first, block, y[:_CHECKED], start, arcface), slice(_CHECKED))
    backward(*_logits(wide, some, y, 0, arcface), slice(None))
    assert first.grad is not None and some.grad is not None
    return (lse - at_label).mean(), first.grad, some.grad


def _blocks(w: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(w), _CLASSES_AT_A_TIME):
        yield start, w[start : start + _CLASSES_AT_A_TIME].double()


def _logits(x: Tensor, w: Tensor, y: Tensor, start: int, arcface: bool) -> tuple[Tensor, Tensor]:
    """Logits of the classes from `start` on, and where they are the label's."""
    is_label = y.unsqueeze(1) == torch.arange(start, start + len(w), device=w.device)
    if not arcface:
        return x @ w.t(), is_label
    cosine = F.normalize(x) @ F.normalize(w).t()
    return SCALE * torch.where(is_label, (cosine.clamp(-1, 1).acos() + MARGIN).cos(), cosine), is_label


def cases(small: bool) -> list[Case]:
    found = []
    for arcface in (False, True):
        for part in PARTS:
            for num_classes in (30, 70) if small else _CLASSES:
                width, rows = (int(part) // 6, 20) if small else (int(part), _ROWS[num_classes])
                label = f"{'ArcFace' if arcface else 'plain'} bfloat16 {rows} x {width} x {num_classes}"
                # Three products: logits, and the gradients of input and weight.
                found.append(Case("linear_ce", label, 6.0 * rows * width * num_classes, "gemm", functools.partial(
                    prepare, rows=rows, width=width, num_classes=num_classes, arcface=arcface), part))  # fmt: skip
    return found
