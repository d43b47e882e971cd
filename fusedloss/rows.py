"""What changes the row: the options of a row's loss and its eager formula over the row's statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """Differentiable statistics of each row, after the terms; every field has the rows' shape.

    ``cross_entropy`` = sum_j w_j q_j (lse - z_j), which is w_y (lse - z_y) for labels;
    ``uniform`` = sum_j w_j (lse - z_j);
    ``target_logit`` = z_y (sum_j w_j q_j z_j for probabilities); ``rest`` = 1 - p_y. Ignored rows have zeros but in
    ``log_sum_exp``.
    """

    log_sum_exp: Tensor
    target_logit: Tensor
    cross_entropy: Tensor
    uniform: Tensor | None
    rest: Tensor


@dataclass(frozen=True)
class Row:
    """Options of a row's loss: smoothing (a float or one value per row), focal exponent, and weight of lse squared."""

    smoothing: Tensor | float = 0.0
    focal_gamma: float = 0.0
    z_loss: float = 0.0

    @property
    def smooths(self) -> bool:
        """Whether the loss needs the uniform statistic."""
        return isinstance(self.smoothing, Tensor) or self.smoothing != 0

    def loss(self, statistics: Statistics, num_classes: int) -> Tensor:
        """(1 - p_y)^gamma * ((1 - eps) * cross_entropy + eps / K * uniform) + z_loss * lse^2, for each row."""
        row = statistics.cross_entropy
        if self.smooths:
            assert statistics.uniform is not None
            row = (1 - self.smoothing) * row + (self.smoothing / num_classes) * statistics.uniform
        if self.focal_gamma != 0:
            # A row with p_y = 1 has loss 0 and slope 0; the power alone would have an infinite slope below gamma = 1.
            certain = statistics.rest == 0
            focus = torch.where(certain, torch.ones_like(statistics.rest), statistics.rest) ** self.focal_gamma
            row = torch.where(certain, torch.zeros_like(row), focus * row)
        if self.z_loss != 0:
            row = row + self.z_loss * statistics.log_sum_exp.square()
        return row
