"""One step: the gradients of a batch, the optimizer, and the learning rate of the moment."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fusedloss.train.auxiliary import ContrastiveLoss
from fusedloss.train.objectives import Objective


def schedule(step: int, total: int, warmup: float) -> float:
    """Factor on the peak learning rate: linear warm-up over ``warmup * total`` steps, then a cosine to 0."""
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(total - rising, 1)))


def adamw(modules: list[nn.Module], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW that decays weight matrices alone."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)


def gradient_step(head: nn.Module, objective: Objective, batch_size: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Function of a batch that fills the gradients and returns the detached loss."""
    loss_of = objective.loss
    if isinstance(head, nn.Linear) and head.bias is not None:
        return LinearStep(head, loss_of, batch_size, objective.features)
    if objective.features and isinstance(head, nn.Sequential):
        loss_of.watch(head[-1])  # type: ignore[operator]
    if objective.auxiliary is not None:
        return _with_auxiliary(head, objective, objective.auxiliary)
    # a head without hidden layers reads the features themselves
    given = objective.features and not isinstance(head, nn.Sequential)

    def step(features: Tensor, labels: Tensor) -> Tensor:
        head.zero_grad(set_to_none=True)
        loss_of.zero_grad(set_to_none=True)
        loss: Tensor = loss_of(head(features), labels, *([features] if given else []))
        loss.backward()
        return loss.detach()

    return step


def _with_auxiliary(
    head: nn.Module, objective: Objective, auxiliary: ContrastiveLoss
) -> Callable[[Tensor, Tensor], Tensor]:
    assert isinstance(head, nn.Sequential) and isinstance(head[-1], nn.Linear)
    body, classifier = head[:-1], head[-1]

    def step(features: Tensor, labels: Tensor) -> Tensor:
        for module in (head, objective.loss, auxiliary):
            module.zero_grad(set_to_none=True)
        hidden = body(features)
        loss: Tensor = objective.loss(classifier(hidden), labels) + auxiliary(hidden, labels, classifier)
        loss.backward()
        return loss.detach()

    return step


class LinearStep:
    """Gradients of a linear head written into buffers that live as long as the training.

    Only the loss goes through autograd: fresh logits and weight gradients in every step would cost page
        faults.
    """

    def __init__(self, head: nn.Linear, loss: nn.Module, batch_size: int, takes_features: bool = False) -> None:
        self.head, self.loss, self.takes_features = head, loss, takes_features
        self.logits = head.weight.new_empty(batch_size, head.out_features)
        for parameter in head.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self, features: Tensor, labels: Tensor) -> Tensor:
        head = self.head
        with torch.no_grad():
            logits = torch.addmm(head.bias, features, head.weight.t(), out=self.logits[: len(features)])
        logits = logits.detach().requires_grad_()
        self.loss.zero_grad(set_to_none=True)
        loss: Tensor = self.loss(logits, labels, *([features] if self.takes_features else []))
        loss.backward()
        assert logits.grad is not None
        torch.mm(logits.grad.t(), features, out=head.weight.grad)
        torch.sum(logits.grad, 0, out=head.bias.grad)
        return loss.detach()
