"""What changes the row: the options of a row's loss and its eager formula over the row's statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """Differentiable statistics of each row, after the terms; every field has the rows' shape.

    ``cross_entropy`` = sum_j w_j q_j (lse - z_j), which is w_y (lse - z_y) for labels;
    ``uniform`` = sum_j w_j (lse - z_j);
    ``target_logit`` = z_y (sum_j w_j q_j z_j for probabilities); ``rest`` = 1 - p_y;
    ``hinge`` = sum_j relu(max z - z_j - margin) for the row's ``MarginPenalty``. Ignored rows have zeros but in
    ``log_sum_exp``.
    """

    log_sum_exp: Tensor
    target_logit: Tensor
    cross_entropy: Tensor
    uniform: Tensor | None
    rest: Tensor
    hinge: Tensor | None = None


@dataclass(frozen=True, eq=False)
class MarginPenalty:
    """Margin-based label smoothing: holds each row's logits within `margin` of the largest.

    ``R_i = mean_k relu(max_k z_ik - z_ik - margin)`` is added to the row as ``strength * R_i``, without class weight or
    focal factor, on the logits after the terms.

    Args:
        margin: at least 0, in units of the logits.
        strength: at least 0; a float, or a tensor with one value per row (it gets a gradient when it requires one).
        over: ``"mean"`` over the classes, or ``"sum"`` (equation 6 of the paper).
        mix: ``(1 - strength) * loss + strength * R_i`` instead (FeDLaS); strength is then at most 1.

    Raises:
        ValueError, TypeError: a value out of range; the message names it.

    Source: Liu et al. 2022, arXiv:2111.15430.

    >>> import torch, fusedloss
    >>> penalty = fusedloss.MarginPenalty(margin=1.0, strength=0.1)
    >>> fusedloss.cross_entropy(torch.tensor([[4.0, 0.0]]), torch.tensor([0]), margin_penalty=penalty)
    tensor(0.1681)
    """

    margin: float
    strength: Tensor | float
    over: Literal["mean", "sum"] = "mean"
    mix: bool = False

    def __post_init__(self) -> None:
        _check_at_least_zero("margin", self.margin)
        if self.over not in ("mean", "sum"):
            raise ValueError(f"MarginPenalty: over: got {self.over!r}; allowed are 'mean' and 'sum'")
        if isinstance(self.strength, Tensor):
            if not self.strength.is_floating_point():
                raise TypeError(f"MarginPenalty: strength must be floating point; got {self.strength.dtype}")
            return
        _check_at_least_zero("strength", self.strength)
        if self.mix and self.strength > 1:
            raise ValueError(f"MarginPenalty: strength must be at most 1 with mix=True; got {self.strength}")

    def share(self, num_classes: int) -> float:
        """What multiplies the sum over the classes."""
        return 1.0 / num_classes if self.over == "mean" else 1.0


@dataclass(frozen=True)
class Row:
    """Options of a row's loss: smoothing (a float or one per row), focal exponent, weight of lse squared, penalty."""

    smoothing: Tensor | float = 0.0
    focal_gamma: float = 0.0
    z_loss: float = 0.0
    penalty: MarginPenalty | None = None

    @property
    def smooths(self) -> bool:
        """Whether the loss needs the uniform statistic."""
        return isinstance(self.smoothing, Tensor) or self.smoothing != 0

    @property
    def learns(self) -> bool:
        """Whether a tensor of the row may get a gradient."""
        return isinstance(self.smoothing, Tensor) or (
            self.penalty is not None and isinstance(self.penalty.strength, Tensor)
        )

    def loss(self, statistics: Statistics, num_classes: int) -> Tensor:
        """(1 - p_y)^gamma * ((1 - eps) * cross_entropy + eps / K * uniform), with the penalty, + z_loss * lse^2."""
        row = statistics.cross_entropy
        if self.smooths:
            assert statistics.uniform is not None
            row = (1 - self.smoothing) * row + (self.smoothing / num_classes) * statistics.uniform
        if self.focal_gamma != 0:
            # A row with p_y = 1 has loss 0 and slope 0; the power alone would have an infinite slope below gamma = 1.
            certain = statistics.rest == 0
            focus = torch.where(certain, torch.ones_like(statistics.rest), statistics.rest) ** self.focal_gamma
            row = torch.where(certain, torch.zeros_like(row), focus * row)
        if self.penalty is not None:
            assert statistics.hinge is not None
            strength = self.penalty.strength
            penalty = strength * self.penalty.share(num_classes) * statistics.hinge
            row = (1 - strength) * row + penalty if self.penalty.mix else row + penalty
        if self.z_loss != 0:
            row = row + self.z_loss * statistics.log_sum_exp.square()
        return row


def _check_at_least_zero(name: str, value: float) -> None:
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)):
        raise TypeError(f"MarginPenalty: {name} must be a number; got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"MarginPenalty: {name} must be finite and at least 0; got {value}")
