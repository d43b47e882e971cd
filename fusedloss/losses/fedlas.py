"""Label smoothing or margin penalty whose strength follows the norm of each row's features."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from fusedloss import functional
from fusedloss.core.checks import check_choice, check_integer, check_number, check_tensor
from fusedloss.core.dtypes import LABELS, compute_dtype
from fusedloss.core.row_loss import MarginPenalty
from fusedloss.functional import RowStatistics
from fusedloss.losses.cross_entropy import CrossEntropyKeywords, CrossEntropyLoss
from fusedloss.losses.feature_hook import FeatureHook, checked_features
from fusedloss.losses.keywords import forwards_keywords
from fusedloss.losses.norm_statistics import NormStatistics
from fusedloss.losses.running_state import statistics_move

# Of the paper, for each base: strength (alpha or lambda) and beta.
_PUBLISHED = {"smoothing": (0.05, 4.0), "margin": (0.05, 0.5)}
_PUBLISHED_MARGIN = 10.0
_GATES = ("learned", "positive")
_INDICATORS = ("norm", "probability", "logit")
# What this loss computes for each row, and the setting that it follows.
_OTHER_NAMES = {"label_smoothing": "strength", "margin_penalty": "margin"}
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

    Statistics move in training mode with gradients enabled, once a call has succeeded, and not where a checkpoint
    repeats a forward. Rows whose norm is not finite are left out of them (``statistics.skipped``) and have ``g_i = 0``.

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
        ValueError, TypeError: arguments out of range; features that are missing or do not fit. The statistics are then
            as they were.
        RuntimeError: statistics would move inside a ``torch.func`` transform.

    Source: the FeDLaS paper, equations 7 to 12; docs/losses.md says where its code and this differ.

    Example:
        >>> import torch, fusedloss
        >>> loss = fusedloss.FeDLaSLoss(num_classes=3, gate="positive")
        >>> features = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
        >>> value = loss(torch.randn(2, 3), torch.tensor([0, 1]), features)
        >>> loss.last_smoothing  # norms 2 and 6, mean 4, deviation 2
        tensor([0.0018, 0.0982])
    """

    @forwards_keywords(CrossEntropyLoss, without=["label_smoothing", "margin_penalty"], other_names=_OTHER_NAMES)
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
        **keywords: Unpack[CrossEntropyKeywords],
    ) -> None:
        check_choice("base", base, tuple(_PUBLISHED))
        check_choice("gate", gate, _GATES)
        check_choice("indicator", indicator, _INDICATORS)
        super().__init__(**keywords)
        self.num_classes = check_integer("num_classes", num_classes, at_least=1)
        self.base, self.indicator, self.group = base, indicator, group
        published_strength, published_beta = _PUBLISHED[base]
        # alpha_i reaches twice the strength.
        self.strength = published_strength if strength is None else check_number(
            "strength", strength, at_least=0.0, at_most=0.5
        )  # fmt: skip
        self.beta = published_beta if beta is None else check_number("beta", beta)
        if margin is not None and base != "margin":
            raise ValueError(f"margin must be None with base={base!r}; got {margin}")
        published_margin = _PUBLISHED_MARGIN if base == "margin" else None
        self.margin = published_margin if margin is None else check_number("margin", margin, at_least=0.0)
        self.statistics = NormStatistics(momentum, norm=norm, ignore_index=self.ignore_index)
        self.gate = _gate_network(self.num_classes) if gate == "learned" else None
        self.last_gate: Tensor | None = None
        self.last_smoothing: Tensor | None = None
        self._hook: FeatureHook | None = None

    def watch(self, layer: nn.Module) -> Self:
        """Takes the features from `layer`'s input from now on, in evaluation too; returns self. See VACELoss.watch.

        Example:
            >>> import torch, fusedloss
            >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
            >>> loss = fusedloss.FeDLaSLoss(3).watch(model[1])
            >>> loss(model(torch.randn(8, 2, 2)), torch.arange(8) % 3).backward()
            >>> int(loss.statistics.count)
            8
        """
        if self._hook is not None:
            self._hook.remove()
        self._hook = FeatureHook(self, layer, always=True)
        return self

    def forward(  # type: ignore[override]
        self, logits: Tensor, target: Tensor, features: Tensor | None = None, sample_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """The loss; in training with gradients on, the statistics take the batch in first."""
        if not torch.compiler.is_compiling():
            self._step_watch.look(self)
        watched = self._hook.take() if self._hook is not None else None
        check_tensor("logits", logits, ("B", self.num_classes), like=self.statistics.statistics.mean, of="the loss")
        values = self._values(logits.detach(), watched if features is None else features)
        # A target that does not fit is refused below, before anything is stored.
        labels = (
            target if isinstance(target, Tensor) and target.dtype in LABELS and target.shape == values.shape else None
        )
        moves = statistics_move(self)
        moments = self.statistics.moved(values, labels, self.group) if moves else self.statistics.current()
        gate = self._psi(logits)
        indicator = moments.standardized(values.to(gate.dtype), _LEAST_DEVIATION)
        signed = indicator if self.gate is None else gate * indicator
        alpha = torch.sigmoid(signed * self.beta) * (2 * self.strength)
        options = self._options(sample_weight)
        if self.margin is None:
            options["label_smoothing"] = alpha
        else:
            options["margin_penalty"] = MarginPenalty(self.margin, alpha, mix=True)
        result: Tensor | tuple[Tensor, RowStatistics] = functional.cross_entropy(logits, target, **options)
        if moves:
            self.statistics.store(moments)
        self.last_gate, self.last_smoothing = gate.detach(), alpha.detach()
        return result

    def settings(self) -> dict[str, Any]:
        strength, beta = _PUBLISHED[self.base]
        return super().settings() | {
            "strength": None if self.strength == strength else self.strength,
            "beta": None if self.beta == beta else self.beta,
            "margin": None if self.margin == _PUBLISHED_MARGIN else self.margin,
            "momentum": self.statistics.momentum,
            "gate": "positive" if self.gate is None else "learned",
            "norm": self.statistics.norm,
            "label_smoothing": 0.0,
        }

    @torch.no_grad()
    def _values(self, logits: Tensor, features: Any) -> Tensor:
        """What the statistics are of, one number per row: the norm of its features, or of its logits the largest."""
        if self.indicator == "norm":
            if features is None:
                raise ValueError(
                    "features must be given: pass them, or call watch(model.get_classifier()) once, or choose "
                    "indicator='probability' or 'logit'; got None"
                )
            return self.statistics.row_norms(checked_features(features, logits, "D").detach())
        wide = logits.to(compute_dtype(logits.dtype))
        return (wide.softmax(1) if self.indicator == "probability" else wide).amax(1)

    def _psi(self, logits: Tensor) -> Tensor:
        """The gate of each row, exactly +1 or -1, with the gradient of p_0 - p_1."""
        dtype = compute_dtype(logits.dtype)
        if self.gate is None:
            return torch.ones(len(logits), dtype=dtype, device=logits.device)
        own = next(self.gate.parameters()).dtype
        with torch.autocast(logits.device.type, enabled=False):
            p = self.gate(logits.detach().to(own)).softmax(1)
        difference = (p[:, 0] - p[:, 1]).to(dtype)
        sign = torch.where(difference.detach() > 0, 1.0, -1.0).to(dtype)
        straight_through: Tensor = sign + (difference - difference.detach())
        return straight_through

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hook": None, "group": None}


def _gate_network(num_classes: int) -> nn.Sequential:
    hidden = max(num_classes // 2, 1)
    return nn.Sequential(nn.Linear(num_classes, hidden), nn.LeakyReLU(0.01, inplace=True), nn.Linear(hidden, 2))
