"""AdaFace and CurricularFace: a margin, or negatives, that follow running statistics of the features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fusedloss.core.checks import check_integer_tensor, check_number, check_tensor
from fusedloss.core.dtypes import compute_dtype
from fusedloss.core.normalize import unit_rows
from fusedloss.functional import RowStatistics
from fusedloss.losses.keywords import forwards_keywords
from fusedloss.losses.margin_heads import OTHER_NAMES, MarginKeywords, MarginLoss
from fusedloss.losses.running_state import add_skipped, register_skipped, statistics_move
from fusedloss.terms import AngularMargin, CombinedMargin, MarginTerm
from fusedloss.terms.margins import Fallback, angle_added, checked_cosine

# AdaFace: bounds of the lengths, and of the turned angle at either end of [0, pi].
_SHORTEST, _LONGEST = 1e-3, 100.0
_LEAST_ANGLE = 1e-3
# Added to the deviation, as in the reference code.
_LEAST_DEVIATION = 1e-3


@dataclass(frozen=True, eq=False)
class _ClippedAngle(MarginTerm):
    """``cos(clip(theta + angle, 1e-3, pi - 1e-3)) - cosine``, each ``(B, 1)``; no gradient where it is clipped."""

    angle: Tensor
    cosine: Tensor

    def label(self, z: Tensor, classes: Tensor) -> tuple[Tensor, Tensor | float]:
        z = checked_cosine("AdaFaceLoss", z)
        angle, cosine = self.angle.reshape(z.shape), self.cosine.reshape(z.shape)
        value, grad = angle_added(z, angle, "none")
        turned = z.detach().acos() + angle.detach()
        low, high = turned < _LEAST_ANGLE, turned > math.pi - _LEAST_ANGLE
        end = math.cos(_LEAST_ANGLE)
        value = torch.where(low, end, torch.where(high, -end, value))
        return value - cosine, torch.where(low | high, 0.0, grad)


class AdaFaceLoss(MarginLoss):
    """AdaFace: the margin follows the quality of an image, read off the length of its features.

    ``k = clip(h (|x| - mu) / (sigma + 1e-3), -1, 1)`` with running mean and deviation of the lengths, and at the label
    ``scale * (cos(theta - margin k) - margin (1 + k))``. Lengths are clipped to [1e-3, 100] and get no gradient, the
    turned angle is clipped to [1e-3, pi - 1e-3].

    Statistics are of labelled rows alone. They move in training mode with gradients enabled, once a call has succeeded,
    and not where a checkpoint repeats a forward. Rows that are not finite are left out and counted in ``skipped``; on a
    CPU a warning says so once.

    Args:
        in_features, num_classes, scale, keywords: as in ``ArcFaceLoss``.
        margin: m, radians.
        h: how far from the mean the margin changes.
        momentum: weight in [0, 1] of the new batch.
        fallback: ``"none"`` clips the turned angle, as published; ``"monotone"`` and ``"easy"`` as in
            ``AngularMargin``.

    Attributes:
        norm_mean, norm_deviation: running mean and deviation of the lengths.
        skipped: int64 ``()``, rows left out as not finite since this object was built; not in the state dict.

    Source: Kim et al. 2022, arXiv:2204.00964.

    Example:
        >>> import torch, fusedloss
        >>> loss = fusedloss.AdaFaceLoss(8, 3)
        >>> loss(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])).backward()
    """

    norm_mean: Tensor
    norm_deviation: Tensor
    skipped: Tensor

    @forwards_keywords(MarginLoss, other_names=OTHER_NAMES)
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        margin: float = 0.4,
        scale: float | Tensor = 64.0,
        *,
        h: float = 0.333,
        momentum: float = 0.01,
        fallback: Fallback = "none",
        **keywords: Unpack[MarginKeywords],
    ) -> None:
        super().__init__(in_features, num_classes, AngularMargin(margin, fallback), scale, **keywords)
        self.h = check_number("h", h)
        self.momentum = check_number("momentum", momentum, at_least=0.0, at_most=1.0)
        self.fallback = fallback
        self.register_buffer("norm_mean", torch.tensor(20.0))
        self.register_buffer("norm_deviation", torch.tensor(100.0))
        register_skipped(self)

    def forward(
        self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """The loss of features ``(B, D)`` against labels ``(B,)``; in training the statistics take them in first."""
        check_tensor("input", input, like=self.weight, of="the loss")
        check_integer_tensor("target", target)
        norm = torch.linalg.vector_norm(input.detach(), dim=-1, dtype=torch.float64).reshape(-1)
        usable = torch.isfinite(norm)
        norm = torch.where(usable, norm, self.norm_mean).clamp(_SHORTEST, _LONGEST).to(compute_dtype(input.dtype))
        mean, deviation = self.norm_mean.clone(), self.norm_deviation.clone()
        # A target that does not fit is refused below, before anything is stored.
        moves = statistics_move(self) and target.numel() == norm.numel() and target.device == norm.device
        if moves:
            labelled = target.reshape(-1) != self.loss.ignore_index
            mean, deviation = self._moved(norm, labelled & usable)
        result = self.loss_with(self._term(norm, mean, deviation), input, target, sample_weight)
        if moves:
            with torch.no_grad():
                self.norm_mean.copy_(mean)
                self.norm_deviation.copy_(deviation)
                add_skipped(self, (labelled & ~usable).sum())
        return result

    def _term(self, norm: Tensor, mean: Tensor, deviation: Tensor) -> MarginTerm:
        quality = ((norm - mean) / (deviation + _LEAST_DEVIATION) * self.h).clamp(-1.0, 1.0).unsqueeze(1)
        angular = self.current_margin()
        assert isinstance(angular, AngularMargin)
        margin = angular.margin
        if self.fallback == "none":
            # In float64, as the label's cosine: what torch.compile of torch 2.8 can't trace is a copy in another type.
            quality = quality.double()
            return _ClippedAngle(-margin * quality, margin + margin * quality)
        return CombinedMargin(1.0, -margin * quality, margin + margin * quality, self.fallback)

    @torch.no_grad()
    def _moved(self, norm: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation after the lengths kept; a batch with fewer than two moves nothing."""
        count = kept.sum()
        mean = torch.where(kept, norm, 0.0).sum() / count.clamp(min=1)
        square = torch.where(kept, norm - mean, 0.0).square().sum()
        deviation = (square / (count - 1).clamp(min=1)).sqrt()
        weight = torch.where(count > 1, self.momentum, 0.0).to(self.norm_mean.dtype)
        return (
            torch.lerp(self.norm_mean, mean.to(self.norm_mean.dtype), weight),
            torch.lerp(self.norm_deviation, deviation.to(self.norm_deviation.dtype), weight),
        )

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"fallback": self.fallback}


class CurricularFaceLoss(MarginLoss):
    """CurricularFace: ArcFace whose hard negatives count more as training goes on.

    A class k that is nearer than the label's turned cosine, ``c_k > cos(theta_y + margin)``, has ``c_k (t + c_k)`` in
    place of its cosine, with t a running mean of the labels' cosines. These cosines are stored, ``(B, K)``.

    Args:
        in_features, num_classes, scale, keywords: as in ``ArcFaceLoss``.
        margin: radians; a float.
        momentum: weight in [0, 1] of the new batch in t.

    Attributes:
        t: the running mean; it moves as the statistics of ``AdaFaceLoss`` do.
        skipped: int64 ``()``, rows left out as not finite since this object was built; not in the state dict.

    Source: Huang et al. 2020, arXiv:2004.00288.

    Example:
        >>> import torch, fusedloss
        >>> loss = fusedloss.CurricularFaceLoss(8, 3)
        >>> loss(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])).backward()
    """

    t: Tensor
    skipped: Tensor

    @forwards_keywords(MarginLoss, without=["sample_rate", "sub_centers"], other_names=OTHER_NAMES)
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        margin: float = 0.5,
        scale: float | Tensor = 64.0,
        *,
        momentum: float = 0.01,
        **keywords: Unpack[MarginKeywords],
    ) -> None:
        super().__init__(in_features, num_classes, AngularMargin(margin), scale, **keywords)
        self.momentum = check_number("momentum", momentum, at_least=0.0, at_most=1.0)
        self.register_buffer("t", torch.zeros(()))
        register_skipped(self)

    def forward(
        self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """The loss of features ``(B, D)`` against labels ``(B,)``; in training t takes the batch in first."""
        if not torch.compiler.is_compiling():
            self._step_watch.look(self)
        check_tensor("input", input, like=self.weight, of="the loss")
        check_integer_tensor("target", target)
        angular = self.current_margin()
        assert isinstance(angular, AngularMargin)
        cosine = self.margin_cosines(angular, input, target)
        moves = statistics_move(self)
        with torch.no_grad():
            labelled = target.reshape(-1) != self.loss.ignore_index
            classes = torch.where(labelled, target.reshape(-1), 0).to(torch.int64)
            rows = input.reshape(-1, self.in_features)
            label = (unit_rows(rows.double()) * unit_rows(self.weight[classes].double())).sum(1)
            usable = torch.isfinite(label)
            t = self._moved(label, labelled & usable) if moves else self.t.clone()
            turned, _ = angle_added(label, angular.margin, "none")
            harder = (cosine.reshape(-1, self.num_classes) > turned.unsqueeze(1)) & labelled.unsqueeze(1)
            harder = harder.scatter(1, classes.unsqueeze(1), False).reshape(cosine.shape)
        cosine = torch.where(harder, cosine * (t + cosine), cosine)
        result: Tensor | tuple[Tensor, RowStatistics] = self.loss(cosine, target, sample_weight)
        if moves:
            with torch.no_grad():
                self.t.copy_(t)
                add_skipped(self, (labelled & ~usable).sum())
        return result

    def _moved(self, label: Tensor, kept: Tensor) -> Tensor:
        """t after the labels' cosines kept."""
        count = kept.sum()
        mean = torch.where(kept, label, 0.0).sum() / count.clamp(min=1)
        weight = (count > 0) * self.momentum
        return torch.lerp(self.t, mean.to(self.t.dtype), weight.to(self.t.dtype))
