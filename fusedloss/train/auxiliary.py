"""A second loss on what the last layer reads, through a projection that training alone has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fusedloss
from fusedloss.train.recipe import Recipe


class ContrastiveLoss(nn.Module):
    """Supervised contrast of projected hidden features, times its weight.

    With `prototypes` the classifier's weights go through the same projection and are the class centres of a balanced
    contrastive loss: every class is a contrast in every batch, and the classifier gets a gradient from it.
    """

    def __init__(self, width: int, num_classes: int, recipe: Recipe) -> None:
        super().__init__()
        self.weight, self.prototypes = recipe.supcon, recipe.supcon_prototypes
        self.projection = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, recipe.supcon_projection))
        self.loss = fusedloss.SupConLoss(recipe.supcon_temperature, class_balance=recipe.supcon_prototypes)
        self.register_buffer("classes", torch.arange(num_classes), persistent=False)

    def forward(self, hidden: Tensor, labels: Tensor, class_weight: Tensor) -> Tensor:
        """`hidden` ``(B, width)`` is what the head's last layer reads, `class_weight` ``(K, width)`` that layer's."""
        centres = {}
        if self.prototypes:
            centres = {"prototypes": self.projection(class_weight), "prototype_labels": self.classes}
        loss: Tensor = self.loss(self.projection(hidden), labels, **centres)
        return self.weight * loss
