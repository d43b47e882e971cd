"""A row's loss: its options, the statistics that it is a function of, and its eager formula.

An option of a row is a field of ``RowOptions``, which crosses every layer whole, from ``functional`` to a kernel. Twins
of ``row_loss`` here, by the same name: csrc/row_loss.inl and backends/triton/row_loss.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fusedloss.core.checks import check_bool, check_choice, check_focal_gamma, check_number
from fusedloss.core.operands import RowInputs


class RowOptions(NamedTuple):
    """The options of a row's loss, one number for all rows each; 0 turns one off.

    An operation takes them as ``float[]``, in this order.
    """

    label_smoothing: float = 0.0
    focal_gamma: float = 0.0
    poly_epsilon: float = 0.0
    z_loss: float = 0.0
    penalty_margin: float = 0.0
    penalty_strength: float = 0.0
    penalty_scale: float = 1.0  # multiplies the sum over the classes: 1 / K for a mean
    penalty_mix: float = 0.0  # 1: (1 - strength) * loss + strength * penalty


class RowSettings(NamedTuple):
    """The options of a row as the caller of a loss gives them; see ``fusedloss.cross_entropy``."""

    label_smoothing: Tensor | float = 0.0
    focal_gamma: float = 0.0
    poly_epsilon: float = 0.0
    z_loss: float = 0.0
    margin_penalty: MarginPenalty | None = None

    def is_default(self) -> bool:
        """Whether every option is off."""
        # An array has no truth value: types first.
        floats = type(self.label_smoothing) is type(self.focal_gamma) is type(self.poly_epsilon) is type(self.z_loss)
        return floats and type(self.z_loss) is float and self.margin_penalty is None and self == _NO_SETTINGS

    def check(self) -> None:
        """Raises for a number out of range; tensors are checked by whoever knows the rows."""
        if not isinstance(self.label_smoothing, Tensor):
            check_number("label_smoothing", self.label_smoothing, at_least=0.0, at_most=1.0)
        check_focal_gamma(self.focal_gamma)
        check_number("poly_epsilon", self.poly_epsilon)
        check_number("z_loss", self.z_loss)
        if self.margin_penalty is not None and not isinstance(self.margin_penalty, MarginPenalty):
            got = type(self.margin_penalty).__name__
            raise TypeError(f"margin_penalty must be a fusedloss.MarginPenalty; got {got}")

    def options(self, num_classes: int) -> RowOptions:
        """The numbers; a tensor leaves its own at 0."""
        penalty, smoothing = self.margin_penalty, self.label_smoothing
        more = {} if penalty is None else penalty.options(num_classes)
        return RowOptions(
            0.0 if isinstance(smoothing, Tensor) else smoothing,
            self.focal_gamma,
            self.poly_epsilon,
            self.z_loss,
            **more,
        )


class Statistics(NamedTuple):
    """Differentiable statistics of each row, after the terms; every field has the rows' shape.

    ``cross_entropy`` = sum_j w_j q_j (lse - z_j), which is w_y (lse - z_y) for labels;
    ``smooth_loss`` = sum_j w_j (lse - z_j);
    ``target_logit`` = z_y (sum_j w_j q_j z_j for probabilities); ``one_minus_pt`` = 1 - p_y;
    ``hinge`` = sum_j relu(max z - z_j - margin) for the row's ``MarginPenalty``. Ignored rows have zeros but in
    ``log_sum_exp``.
    """

    log_sum_exp: Tensor
    target_logit: Tensor
    cross_entropy: Tensor
    smooth_loss: Tensor | None
    one_minus_pt: Tensor
    hinge: Tensor | None = None


def row_loss(statistics: Statistics, options: RowOptions, rows: RowInputs, num_classes: int) -> Tensor:
    """The loss of each row from its statistics.

    ``(1 - p_y)^gamma * ((1 - eps) * cross_entropy + eps / K * smooth_loss) + poly_epsilon * (1 - p_y)``, mixed with or
    added to the penalty, ``+ z_loss * lse^2``.
    """
    row = statistics.cross_entropy
    smoothing = options.label_smoothing if rows.label_smoothing is None else rows.label_smoothing
    if rows.label_smoothing is not None or options.label_smoothing != 0:
        assert statistics.smooth_loss is not None
        row = (1 - smoothing) * row + (smoothing / num_classes) * statistics.smooth_loss
    if options.focal_gamma != 0:
        # A row with p_y = 1 has loss 0 and gradient 0; the power alone would have an infinite one below gamma = 1.
        certain = statistics.one_minus_pt == 0
        focus = torch.where(certain, torch.ones_like(row), statistics.one_minus_pt) ** options.focal_gamma
        row = torch.where(certain, torch.zeros_like(row), focus * row)
    if options.poly_epsilon != 0:
        row = row + options.poly_epsilon * statistics.one_minus_pt
    if statistics.hinge is not None:
        strength = options.penalty_strength if rows.penalty_strength is None else rows.penalty_strength
        penalty = strength * options.penalty_scale * statistics.hinge
        row = (1 - strength) * row + penalty if options.penalty_mix else row + penalty
    if options.z_loss != 0:
        row = row + options.z_loss * statistics.log_sum_exp.square()
    return row


def without_focal(options: RowOptions) -> RowOptions:
    """The options where smoothing and focal factor are already in the cross-entropy."""
    values = dict(zip(RowOptions._fields, options, strict=True))
    return RowOptions(**{**values, "label_smoothing": 0.0, "focal_gamma": 0.0})


def needs_smooth_loss(options: RowOptions, rows: RowInputs) -> bool:
    """Whether the row is a function of ``smooth_loss``."""
    return rows.label_smoothing is not None or options.label_smoothing != 0


def needs_hinge(options: RowOptions, rows: RowInputs) -> bool:
    """Whether the row is a function of ``hinge``."""
    return rows.penalty_strength is not None or options.penalty_strength != 0


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

    def options(self, num_classes: int) -> dict[str, float]:
        """The fields of RowOptions that are its own; a strength that is a tensor leaves its own at 0."""
        return {
            "penalty_margin": self.margin,
            "penalty_strength": 0.0 if isinstance(self.strength, Tensor) else self.strength,
            "penalty_scale": 1.0 / num_classes if self.over == "mean" else 1.0,
            "penalty_mix": float(self.mix),
        }

    def __post_init__(self) -> None:
        check_number("MarginPenalty: margin", self.margin, at_least=0.0)
        check_choice("MarginPenalty: over", self.over, ("mean", "sum"))
        check_bool("MarginPenalty: mix", self.mix)
        if isinstance(self.strength, Tensor):
            if not self.strength.is_floating_point():
                raise TypeError(f"MarginPenalty: strength must be floating point; got {self.strength.dtype}")
        else:
            check_number("MarginPenalty: strength", self.strength, at_least=0.0, at_most=1.0 if self.mix else math.inf)


_NO_SETTINGS = RowSettings()
