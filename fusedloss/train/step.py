"""One step: the gradients of a batch, the optimizer, and the learning rate of the moment."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

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
    if isinstance(head, nn.Linear) and head.bias is not None:
        return LinearStep(head, objective.loss, batch_size)

    def step(features: Tensor, labels: Tensor) -> Tensor:
        head.zero_grad(set_to_none=True)
        objective.loss.zero_grad(set_to_none=True)
        loss: Tensor = objective.loss(head(features), labels)
        loss.backward()
        return loss.detach()

    return step


class LinearStep:
    """Gradients of a linear head written into buffers that live as long as the training.

    Only the loss goes through autograd: fresh logits and weight gradients in every step would cost page
        faults.
    """

    def __init__(self, head: nn.Linear, loss: nn.Module, batch_size: int) -> None:
        self.head, self.loss = head, loss
        self.logits = head.weight.new_empty(batch_size, head.out_features)
        for parameter in head.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self, features: Tensor, labels: Tensor) -> Tensor:
        head = self.head
        with torch.no_grad():
            logits = torch.addmm(head.bias, features, head.weight.t(), out=self.logits[: len(features)])
        logits = logits.detach().requires_grad_()
        self.loss.zero_grad(set_to_none=True)
        loss: Tensor = self.loss(logits, labels)
        loss.backward()
        assert logits.grad is not None
        torch.mm(logits.grad.t(), features, out=head.weight.grad)
        torch.sum(logits.grad, 0, out=head.bias.grad)
        return loss.detach()
