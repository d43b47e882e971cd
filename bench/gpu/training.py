"""One epoch of a linear head with VACE over resident bfloat16 features; the floor is its matrix products."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import compiled
from bench.gpu import Case, Contest, agree, values_of
from fusedloss.train.data import TrainingData
from fusedloss.train.loop import Training
from fusedloss.train.recipe import Recipe

Gradients = Callable[[Tensor, Tensor], Tensor]
_TOLERANCE = 2e-2


def idiomatic(head: nn.Linear, tau: Tensor) -> Gradients:
    """Autocast, logits over the temperatures, PyTorch's cross-entropy: gradients of a batch, and its loss."""

    def gradients(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(head(x) / tau, y)
        loss.backward()
        return loss.detach()

    return gradients


def epoch_of(
    gradients: Gradients, head: nn.Linear, features: Tensor, labels: Tensor, batch_size: int
) -> Callable[[], float]:  # fmt: skip
    """A fresh order, a batch and a step of fused AdamW at a time, as loops are written."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)

    def epoch() -> float:
        total = torch.zeros((), device=features.device)
        for rows in torch.randperm(len(labels), device=labels.device).split(batch_size):
            optimizer.zero_grad(set_to_none=True)
            total += gradients(features[rows], labels[rows]) * len(rows)
            optimizer.step()
        return float(total) / len(labels)

    return epoch


def prepare(device: torch.device, rows: int, width: int, num_classes: int, batch_size: int) -> Contest:
    generator = torch.Generator(device=device).manual_seed(0)
    random = functools.partial(torch.randn, generator=generator, device=device, dtype=torch.bfloat16)
    labels = torch.randint(num_classes, (rows,), generator=generator, device=device)
    features = random(rows, width).add_(random(num_classes, width)[labels], alpha=0.2)
    recipe = Recipe(loss="vace", epochs=1000, batch_size=batch_size, capture=device.type == "cuda")
    with torch.random.fork_rng(devices=[]):
        ours = Training(recipe, 1e-3, TrainingData(features, labels, torch.bincount(labels)), None)
    tau = ours.objective.temperature
    assert tau is not None and isinstance(ours.head, nn.Linear)
    heads: dict[str, nn.Linear] = {"fused": ours.head, "eager": nn.Linear(width, num_classes, device=device)}
    gradients: dict[str, Gradients] = {"fused": ours.step.gradients, "eager": idiomatic(heads["eager"], tau)}
    if device.type == "cuda":
        heads["compiled"] = nn.Linear(width, num_classes, device=device)
        gradients["compiled"] = compiled(idiomatic(heads["compiled"], tau))
    for head in heads.values():
        head.load_state_dict(ours.head.state_dict())
    x, y = features[:batch_size], labels[:batch_size]

    def values(name: str) -> tuple[Tensor, ...]:
        head = heads[name]
        head.zero_grad(set_to_none=name != "fused")
        loss = gradients[name](x, y)
        assert head.weight.grad is not None and head.bias.grad is not None
        return loss, head.weight.grad.clone(), head.bias.grad.clone()

    def check() -> list[str]:
        exact = nn.Linear(width, num_classes, device=device, dtype=torch.float64)
        exact.load_state_dict(ours.head.state_dict())
        loss = F.cross_entropy(exact(x.double()) / tau.double(), y)
        found = values_of({name: functools.partial(values, name) for name in heads})
        return agree(found, (loss.detach(), *torch.autograd.grad(loss, list(exact.parameters()))), _TOLERANCE)

    calls: dict[str, Callable[[], float]] = {"fused": ours._train_epoch}
    for name in heads.keys() - {"fused"}:
        calls[name] = epoch_of(gradients[name], heads[name], features, labels, batch_size)
    return Contest(calls, check)


def cases(small: bool) -> list[Case]:
    rows, width, num_classes, batch_size = (150, 24, 10, 32) if small else (1_281_167, 1024, 1000, 16384)
    label = f"an epoch, bfloat16 {rows} x {width}, {num_classes} classes, batches of {batch_size}, VACE"
    # Two products: logits, and the gradient of the weight; features have none.
    return [Case("training", label, 4.0 * rows * width * num_classes, "gemm", functools.partial(
        prepare, rows=rows, width=width, num_classes=num_classes, batch_size=batch_size))]  # fmt: skip
