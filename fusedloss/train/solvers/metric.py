"""An approximate Hessian of a linear softmax that is quick to invert: a block per class, nothing between classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ClassMetric(NamedTuple):
    """For each class ``diag(diagonal) + mass * centre centre^T`` of the weights, bordered by the bias.

    Attributes:
        centre: ``(K, D)``, the mean of the rows that the class is uncertain of.
        diagonal: ``(K, D)``, how they spread about it, and the penalty.
        mass: ``(K,)``, the curvature in the bias.
    """

    centre: Tensor
    diagonal: Tensor
    mass: Tensor

    def solve(self, gradient: Tensor) -> Tensor:
        """The inverse times ``(K, D + 1)``: in ``b + w . centre`` instead of b the block is diagonal."""
        of_bias = gradient[:, -1]
        result = torch.empty_like(gradient)
        weight = result[:, :-1]
        torch.addcmul(gradient[:, :-1], of_bias[:, None], self.centre, value=-1, out=weight)
        weight /= self.diagonal
        result[:, -1] = of_bias / self.mass - (weight * self.centre).sum(1)
        return result


def class_metric(features: Tensor, spread: Tensor, decay: float, least: float) -> ClassMetric:
    """The metric where rows have curvature `spread` in each logit.

    Half of a class's own variance and half of all classes' are taken: its own rests on few rows.

    Args:
        features: ``(P, D)``.
        spread: ``(P, K)``, each row's share times ``p (1 - p)``.
        decay: the penalty's curvature.
        least: of `mass`, for classes that no row is near.
    """
    mass = spread.sum(0)
    square = features.square()
    safe = mass.clamp(min=least)
    centre = (spread.t() @ features) / safe[:, None]
    between = mass[:, None] * centre.square()
    own = (spread.t() @ square).sub_(between).clamp_(min=0)
    pooled = ((spread.sum(1) @ square) - between.sum(0)).clamp_(min=0) / mass.sum().clamp(min=least)
    diagonal = own.add_(safe[:, None] * pooled).mul_(0.5).add_(decay)
    return ClassMetric(centre, diagonal, safe)
