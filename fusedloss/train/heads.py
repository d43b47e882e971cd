"""Heads on prepared features, and the preparation: standardise, normalise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedloss.train.recipe import Recipe


class FeatureTransform(nn.Module):
    """``(x - mean) / deviation`` per feature, then optionally rows of unit length, in float32."""

    mean: Tensor
    inverse_deviation: Tensor

    def __init__(self, in_features: int, normalize: bool) -> None:
        super().__init__()
        self.normalize = normalize
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("inverse_deviation", torch.ones(in_features))

    def standardize_by(self, features: Tensor) -> None:
        """Take mean and deviation from these rows; a constant feature is only shifted."""
        mean, square = (
            torch.zeros_like(self.mean, dtype=torch.float64),
            torch.zeros_like(self.mean, dtype=torch.float64),
        )
        for chunk in features.split(8192):
            mean += chunk.double().sum(0)
        mean /= len(features)
        for chunk in features.split(8192):
            square += (chunk.double() - mean).square().sum(0)
        deviation = (square / len(features)).sqrt()
        self.mean.copy_(mean)
        self.inverse_deviation.copy_(torch.where(deviation > 1e-8 * (1 + mean.abs()), 1 / deviation, 1.0))

    def forward(self, features: Tensor) -> Tensor:
        prepared = (features.float() - self.mean).mul_(self.inverse_deviation)
        return F.normalize(prepared, dim=1) if self.normalize else prepared


class CosineHead(nn.Module):
    """``scale * x·w_k / |w_k|``: scaled cosines for rows x of unit length."""

    def __init__(self, in_features: int, num_classes: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.normal_(self.weight, std=in_features**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, F.normalize(self.weight, dim=1) * self.scale)


def mlp(in_features: int, num_classes: int, hidden: tuple[int, ...], dropout: float) -> nn.Sequential:
    """Linear, GELU, LayerNorm, dropout for each hidden width, then a linear classifier."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(in_features, width), nn.GELU(), nn.LayerNorm(width), nn.Dropout(dropout)]
        in_features = width
    return nn.Sequential(*layers, nn.Linear(in_features, num_classes))


def build_head(recipe: Recipe, in_features: int, num_classes: int) -> nn.Module:
    """The untrained head of a recipe, initialised from torch's global generator."""
    if recipe.head == "cosine":
        return CosineHead(in_features, num_classes, recipe.cosine_scale)
    if recipe.head == "mlp":
        return mlp(in_features, num_classes, recipe.hidden, recipe.dropout)
    return nn.Linear(in_features, num_classes)


def build_transform(recipe: Recipe, in_features: int) -> FeatureTransform:
    """The preparation of a recipe, not yet fitted; a cosine head needs rows of unit length."""
    return FeatureTransform(in_features, recipe.normalize or recipe.head == "cosine")
