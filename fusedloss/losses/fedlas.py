"""Label smoothing or margin penalty whose strength follows the norm of each row's features."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusedloss import functional
from fusedloss.core.row_loss import MarginPenalty
from fusedloss.functional import RowStatistics
from fusedloss.losses.cross_entropy import CrossEntropyLoss
from fusedloss.losses.feature_hook import FeatureTap
from fusedloss.losses.norm_statistics import NormStatistics
from fusedloss.terms.term import readable

# Of the paper, for each base: strength (alpha or lambda) and beta.
_PUBLISHED = {"smoothing": (0.05, 4.0), "margin": (0.05, 0.5)}
_PUBLISHED_MARGIN = 10.0
_INDICATORS = ("norm", "probability", "logit")
# Added to the deviation, as in the reference code: equal norms have indicator 0.
_LEAST_DEVIATION = 1e-3


class FeDLaSLoss(CrossEntropyLoss):
    """Cross-entropy smoothed row by row, more or less as the row's feature norm is large (FeDLaS).

    ``g_i = (|f_i|_1 - mean) / deviation`` (running statistics of the norms, moved by the batch first),
    ``alpha_i = 2 strength sigmoid(beta psi_i g_i)`` in (0, 2 strength), and
    ``l_i = (1 - alpha_i) CE_i + alpha_i R_i`` with ``R_i = -1/K sum_k log p_k`` (`base` "smoothing") or the mean over
    classes of ``relu(max z - z_k - margin)`` ("margin"). ``psi_i`` is +1 or -1: the sign of p_0 - p_1, the outputs of
    a small network on the detached logits that learns through the sign as if it were not there ("learned", as
    published), or always +1 ("positive"). No gradient flows from alpha_i to logits or features.

    A learned gate minimises the training loss, which does not see calibration: expect it to switch smoothing off where
    that lowers the loss (docs/losses.md). Give ``loss.parameters()`` to the optimizer too.

    Args:
        num_classes: K.
        base: ``"smoothing"`` or ``"margin"``.
        strength: the paper's alpha or lambda, in [0, 0.5]; None for 0.05.
        beta: how fast alpha_i follows the norm; finite; None for 4 ("smoothing") or 0.5 ("margin").
        margin: of the margin penalty, at least 0; None for 10; only with that base.
        momentum: weight of a new batch in the running statistics; None accumulates exactly.
        gate: ``"learned"`` or ``"positive"``.
        indicator: what takes the place of the norm: ``"norm"``, the largest ``"probability"`` or the largest
            ``"logit"``; the last two need no features.
        norm: p of the norm, at least 1 or ``math.inf``.
        group: a process group whose ranks move the statistics together.
        keywords: those of ``CrossEntropyLoss`` but label_smoothing and margin_penalty.

    Attributes:
        last_gate, last_smoothing: psi_i and alpha_i of the last call, ``(B,)``, detached; None before it.

    Shape:
        logits ``(B, K)``, target ``(B,)`` or probabilities ``(B, K)``, features ``(B, D)`` of any width.

    Raises:
        ValueError, TypeError: arguments out of range; features that are missing or do not fit.

    Source: the FeDLaS paper, equations 7 to 12; docs/losses.md says where its code and this differ.

    Example:
        >>> import torch, fusedloss
        >>> loss = fusedloss.FeDLaSLoss(num_classes=3, gate="positive")
        >>> features = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
        >>> value = loss(torch.randn(2, 3), torch.tensor([0, 1]), features)
        >>> loss.last_smoothing  # norms 2 and 6, mean 4, deviation 2
        tensor([0.0018, 0.0982])
    """

    def __init__(
        self,
        num_classes: int,
        base: str = "smoothing",
        strength: float | None = None,
        beta: float | None = None,
        margin: float | None = None,
        momentum: float | None = 0.5,
        gate: str = "learned",
        *,
        indicator: str = "norm",
        norm: float = 1.0,
        group: dist.ProcessGroup | None = None,
        **keywords: Any,
    ) -> None:
        for name, value, allowed in (
            ("base", base, tuple(_PUBLISHED)),
            ("gate", gate, ("learned", "positive")),
            ("indicator", indicator, _INDICATORS),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: got {value!r}; allowed are {', '.join(map(repr, allowed))}")
        for name in ("label_smoothing", "margin_penalty"):
            if name in keywords:
                raise TypeError(f"{name} is what FeDLaSLoss computes for each row; give strength (and margin)")
        super().__init__(**keywords)
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes must be an integer of at least 1; got {num_classes!r}")
        self.num_classes, self.base, self.indicator, self.group = num_classes, base, indicator, group
        published_strength, published_beta = _PUBLISHED[base]
        self.strength = published_strength if strength is None else float(strength)
        self.beta = published_beta if beta is None else float(beta)
        if not 0.0 <= self.strength <= 0.5:
            raise ValueError(f"strength must lie in [0, 0.5], for alpha_i reaches twice that; got {strength}")
        if not math.isfinite(self.beta):
            raise ValueError(f"beta must be finite; got {beta}")
        if margin is not None and base != "margin":
            raise ValueError(f"margin: got {margin} with base={base!r}; it belongs to base='margin'")
        self.margin = (_PUBLISHED_MARGIN if margin is None else float(margin)) if base == "margin" else None
        if self.margin is not None and not 0.0 <= self.margin < math.inf:
            raise ValueError(f"margin must be finite and at least 0; got {margin}")
        self.statistics = NormStatistics(momentum, norm=norm, ignore_index=self.ignore_index)
        self.gate = _gate_network(num_classes) if gate == "learned" else None
        self.last_gate: Tensor | None = None
        self.last_smoothing: Tensor | None = None
        self._tap: FeatureTap | None = None

    def watch(self, layer: nn.Module) -> FeDLaSLoss:
        """Takes the features from `layer`'s input from now on, in evaluation too; returns self. See VACELoss.watch.

        Example:
            >>> import torch, fusedloss
            >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
            >>> loss = fusedloss.FeDLaSLoss(3).watch(model[1])
            >>> loss(model(torch.randn(8, 2, 2)), torch.arange(8) % 3).backward()
            >>> int(loss.statistics.count)
            8
        """
        if self._tap is not None:
            self._tap.remove()
        self._tap = FeatureTap(self, layer, always=True)
        return self

    def forward(  # type: ignore[override]
        self, logits: Tensor, target: Tensor, features: Tensor | None = None, sample_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """The loss; in training with gradients on, the statistics take the batch in first."""
        if not torch.compiler.is_compiling():
            self._step_watch.look(self)
        if logits.dim() != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(f"logits must have shape (B, {self.num_classes}); got {tuple(logits.shape)}")
        watched = self._tap.take() if self._tap is not None else None
        moves = self.training and torch.is_grad_enabled()
        indicator = self._indicator(logits.detach(), target, watched if features is None else features, moves)
        gate = self._psi(logits)
        signed = indicator if self.gate is None else gate * indicator
        alpha = torch.sigmoid(signed * self.beta) * (2 * self.strength)
        self.last_gate, self.last_smoothing = gate.detach(), alpha.detach()
        margin = None if self.margin is None else MarginPenalty(self.margin, alpha, mix=True)
        return functional.cross_entropy(
            logits,
            target,
            self.weight,
            self.ignore_index,
            self.reduction,
            alpha if margin is None else 0.0,
            terms=self._terms(),
            focal_gamma=self.focal_gamma,
            z_loss=self.z_loss,
            margin_penalty=margin,
            sample_weight=sample_weight,
            return_stats=self.return_stats,
        )

    def extra_repr(self) -> str:
        own = f"num_classes={self.num_classes}, base={self.base!r}, strength={self.strength}, beta={self.beta}"
        own += "" if self.margin is None else f", margin={self.margin}"
        rest = super().extra_repr()
        return f"{own}, indicator={self.indicator!r}" + (f", {rest}" if rest else "")

    @torch.no_grad()
    def _indicator(self, logits: Tensor, target: Tensor, features: Tensor | None, moves: bool) -> Tensor:
        """How far each row's norm lies from the running mean, in running deviations: ``(B,)``."""
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        if self.indicator == "norm":
            values = self.statistics.row_norms(self._checked(features, logits))
        elif self.indicator == "probability":
            values = logits.to(dtype).softmax(1).amax(1)
        else:
            values = logits.to(dtype).amax(1)
        if moves:
            labels = None if target.is_floating_point() else target
            self.statistics.update_values(values, labels, self.group)
        values = values.to(dtype)
        if readable(values):
            rows, center, spread = self.statistics.numbers()
            return (values - center) / (spread + _LEAST_DEVIATION) if rows > 0 else torch.zeros_like(values)
        mean, deviation = self.statistics.mean.to(dtype), self.statistics.deviation.to(dtype)
        return torch.where(self.statistics.count > 0, (values - mean) / (deviation + _LEAST_DEVIATION), 0.0)

    def _psi(self, logits: Tensor) -> Tensor:
        """The gate of each row, exactly +1 or -1, with the gradient of p_0 - p_1."""
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        if self.gate is None:
            return torch.ones(len(logits), dtype=dtype, device=logits.device)
        own = next(self.gate.parameters()).dtype
        with torch.autocast(logits.device.type, enabled=False):
            p = self.gate(logits.detach().to(own)).softmax(1)
        difference = (p[:, 0] - p[:, 1]).to(dtype)
        sign = torch.where(difference.detach() > 0, 1.0, -1.0).to(dtype)
        return sign + (difference - difference.detach())

    def _checked(self, features: Tensor | None, logits: Tensor) -> Tensor:
        if features is None:
            raise ValueError(
                "features: got None; pass them, or call watch(model.get_classifier()) once, or choose "
                "indicator='probability' or 'logit'"
            )
        if features.dim() != 2 or len(features) != len(logits):
            raise ValueError(
                f"features must have shape ({len(logits)}, D), the input of the classification layer (timm: "
                f"model.forward_head(model.forward_features(x), pre_logits=True)); got {tuple(features.shape)}"
            )
        return features.detach()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tap": None, "group": None}


def _gate_network(num_classes: int) -> nn.Sequential:
    hidden = max(num_classes // 2, 1)
    return nn.Sequential(nn.Linear(num_classes, hidden), nn.LeakyReLU(0.01, inplace=True), nn.Linear(hidden, 2))
