"""One step: the gradients of a batch, the optimizer, and the learning rate of the moment."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fusedloss.train.buffered_step import rate_tensor
from fusedloss.train.heads import Head
from fusedloss.train.objectives import Objective


def schedule(step: int, total: int, warmup: float) -> float:
    """Factor on the peak learning rate: linear warm-up over ``warmup * total`` steps, then a cosine to 0."""
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(total - rising, 1)))


def adamw(modules: list[nn.Module], weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW that decays weight matrices alone; its learning rate is a tensor that a ``BufferedStep`` fills."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    used = [group for group in groups if group["params"]]
    device = parameters[0].device
    return torch.optim.AdamW(used, lr=rate_tensor(device), fused=True, capturable=device.type == "cuda")


def gradient_step(head: Head, objective: Objective, batch_size: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Function of a batch that fills the gradients and returns the detached loss."""
    linear, auxiliary = head.as_linear(), objective.auxiliary
    if linear is not None and auxiliary is None:
        return LinearStep(linear, objective.loss, batch_size, objective.features)
    modules = [module for module in (head, objective.loss, auxiliary) if module is not None]

    def step(features: Tensor, labels: Tensor) -> Tensor:
        for module in modules:
            module.zero_grad(set_to_none=True)
        with _multiplying_in(features):
            hidden = head.hidden(features)
            logits = head.classify(hidden)
            contrast = None if auxiliary is None else auxiliary(hidden, labels, head.class_weight)
        loss: Tensor = objective.loss(logits, labels, *([hidden] if objective.features else []))
        if contrast is not None:
            loss = loss + contrast
        loss.backward()
        return loss.detach()

    return step


def _multiplying_in(features: Tensor) -> torch.autocast:
    """Inside the block layers multiply in the features' type, of 32 bits or 16."""
    return torch.autocast(features.device.type, features.dtype, enabled=features.dtype != torch.float32)


class LinearStep:
    """Gradients of a linear head written into buffers that live as long as the training.

    Only the loss goes through autograd: fresh logits and weight gradients in every step would cost page
    faults. Features of 16 bits are multiplied as such; weights and their gradients stay in 32.
    """

    def __init__(self, head: nn.Linear, loss: nn.Module, batch_size: int, takes_features: bool = False) -> None:
        self.head, self.loss, self.takes_features, self.batch_size = head, loss, takes_features, batch_size
        self.logits: Tensor | None = None
        for parameter in head.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self, features: Tensor, labels: Tensor) -> Tensor:
        head, dtype = self.head, features.dtype
        if self.logits is None:
            self.logits = features.new_empty(self.batch_size, head.out_features)
        with torch.no_grad():
            weight, bias = head.weight.to(dtype), head.bias.to(dtype)
            logits = torch.addmm(bias, features, weight.t(), out=self.logits[: len(features)])
        logits = logits.detach().requires_grad_()
        self.loss.zero_grad(set_to_none=True)
        loss: Tensor = self.loss(logits, labels, *([features] if self.takes_features else []))
        loss.backward()
        assert logits.grad is not None
        if dtype == head.weight.dtype:
            torch.mm(logits.grad.t(), features, out=head.weight.grad)
        else:
            head.weight.grad.copy_(torch.mm(logits.grad.t(), features))  # type: ignore[union-attr]
        torch.sum(logits.grad, 0, dtype=head.bias.dtype, out=head.bias.grad)
        return loss.detach()
