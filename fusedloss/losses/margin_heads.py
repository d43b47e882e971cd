"""Losses and heads on cosines with a margin: they own one row of weights per class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fusedloss import functional
from fusedloss.core.checks import check_class_weight, check_number
from fusedloss.functional import RowStatistics
from fusedloss.losses.cosine_weight import CosineWeight, check_scale
from fusedloss.losses.cross_entropy import CrossEntropyKeywords, CrossEntropyLoss
from fusedloss.losses.keywords import forwards_keywords
from fusedloss.losses.registered_terms import RegisteredTerm, current, sequence_of
from fusedloss.terms import AdditiveMargin, AngularMargin, CombinedMargin, MarginTerm, Scale
from fusedloss.terms.margins import Fallback, GradientKind

# What other libraries call these arguments.
OTHER_NAMES = {
    "s": "scale",
    "m": "margin",
    "embedding_size": "in_features",
    "num_features": "in_features",
    "out_features": "num_classes",
    "weight": "class_weight",
}


class MarginKeywords(CrossEntropyKeywords, total=False):
    """Options of a margin loss; `weight` is its rows of weights, and class weights are `class_weight`."""

    class_weight: Tensor | None
    sample_rate: float | None
    sub_centers: int


class MarginLoss(CosineWeight):
    """Cross-entropy of scaled cosines with a margin at the label; the cosines are never stored whole.

    Subclasses hand on their margin: a term of ``fusedloss.terms`` that changes the labelled class's cosine.
    """

    @forwards_keywords(CrossEntropyLoss, without=["weight"])
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        margin: MarginTerm,
        scale: float | Tensor = 30.0,
        *,
        class_weight: Tensor | None = None,
        sample_rate: float | None = None,
        sub_centers: int = 1,
        **keywords: Unpack[CrossEntropyKeywords],
    ) -> None:
        super().__init__(in_features, num_classes, sub_centers)
        if sample_rate is not None:
            check_number("sample_rate", sample_rate, above=0.0, at_most=1.0)
            if self.sub_centers > 1:
                raise ValueError(f"sample_rate must be None with sub_centers={sub_centers}; got {sample_rate}")
        check_scale(scale)
        # The scale first among the terms.
        keywords["terms"] = (Scale(scale), *sequence_of(keywords.get("terms", ())))
        keywords["weight"] = check_class_weight("class_weight", class_weight)
        self.margin = RegisteredTerm(margin)
        self.loss = CrossEntropyLoss(**keywords)
        self.sample_rate = sample_rate

    def forward(
        self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """The loss of features ``(B, D)`` against labels ``(B,)``."""
        return self.loss_with(self.current_margin(), input, target, sample_weight)

    def current_margin(self) -> MarginTerm:
        """The margin that this loss was built with, its tensors as they are now."""
        margin = self.margin.current()
        assert isinstance(margin, MarginTerm)
        return margin

    def loss_with(
        self, margin: MarginTerm, input: Tensor, target: Tensor, sample_weight: Tensor | None
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """The loss with another margin than the one that it was built with."""
        if not torch.compiler.is_compiling():
            self._step_watch.look(self)
        if self.sub_centers > 1:
            return self.loss.forward(self.margin_cosines(margin, input, target), target, sample_weight)
        options = self.loss._options(sample_weight)
        options["terms"] = (margin, *options["terms"])
        sample_rate = self.sample_rate if self.training else None
        result: Tensor | tuple[Tensor, RowStatistics] = functional.linear_cross_entropy(
            input, self.weight, target, normalize=True, sample_rate=sample_rate, **options
        )
        return result

    def margin_cosines(self, margin: MarginTerm, input: Tensor, target: Tensor) -> Tensor:
        """Cosines ``(B, K)`` with the margin at the label, before the scale."""
        return functional.margin_logits(
            input,
            self.weight,
            target,
            margin=margin,
            scale=1.0,
            ignore_index=self.loss.ignore_index,
            sub_centers=self.sub_centers,
        )

    def settings(self) -> dict[str, Any]:
        kept = {name: getattr(self.loss, name) for name in CrossEntropyKeywords.__annotations__ if name != "weight"}
        scale, *terms = current(self.loss.terms)
        assert isinstance(scale, Scale)
        margin = getattr(self.current_margin(), "margin", None)
        shown = {"scale": scale.scale, "terms": tuple(terms), "class_weight": self.loss.weight, "margin": margin}
        return super().settings() | kept | shown

    @property
    def scale(self) -> Tensor | float:
        """What multiplies the cosines."""
        scale = current(self.loss.terms)[0]
        assert isinstance(scale, Scale)
        return scale.scale


class ArcFaceLoss(MarginLoss):
    """ArcFace: cross-entropy of ``scale * cos(theta_k + margin [k = y])``, theta_k the angle to class k's row.

    Rows that are equal, opposite, zero, or of length 1e-20 or 1e20 have finite gradients. Give ``loss.parameters()``
    to the optimizer; ``loss.logits(features)`` are the scores at inference.

    Args:
        in_features: width D of the features.
        num_classes: number of classes K.
        margin: radians; a float, or a ``(K,)`` tensor (per class).
        scale: a float, or an ``nn.Parameter`` that is learned.
        fallback: beyond ``theta + margin = pi``: ``"monotone"``, ``"easy"`` or ``"none"`` (``AngularMargin``).
        gradient: ``"exact"``, or ``"straight_through"`` as insightface computes it.
        terms: what else changes the logits, after the scale.
        class_weight: ``(K,)``.
        sub_centers: rows of weights per class; these cosines are stored.
        sample_rate: share of the classes that training steps see (PartialFC).
        keywords: those of ``CrossEntropyLoss``, but `weight`, which is this loss's rows.

    Raises:
        ValueError, TypeError: settings out of range; an angle above pi, which degrees give away.

    Source: Deng et al. 2019, arXiv:1801.07698.

    Example:
        >>> import torch, fusedloss
        >>> loss = fusedloss.ArcFaceLoss(8, 3, margin=0.5, scale=30.0)
        >>> loss(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])).backward()
        >>> loss.weight.grad.shape, loss.logits(torch.randn(4, 8)).shape
        (torch.Size([3, 8]), torch.Size([4, 3]))
    """

    @forwards_keywords(MarginLoss, without=["margin"], other_names=OTHER_NAMES)
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        margin: float | Tensor = 0.5,
        scale: float | Tensor = 30.0,
        *,
        fallback: Fallback = "monotone",
        gradient: GradientKind = "exact",
        **keywords: Unpack[MarginKeywords],
    ) -> None:
        super().__init__(in_features, num_classes, AngularMargin(margin, fallback, gradient), scale, **keywords)

    def settings(self) -> dict[str, Any]:
        return super().settings() | _angular_settings(self.current_margin())


class CosFaceLoss(MarginLoss):
    """CosFace: cross-entropy of ``scale * (cos theta_k - margin [k = y])``.

    Args:
        margin: a float, or a ``(K,)`` tensor (per class).
        in_features, num_classes, scale, keywords: as in ``ArcFaceLoss``.

    Source: Wang et al. 2018, arXiv:1801.09414.

    Example:
        >>> import torch, fusedloss
        >>> loss = fusedloss.CosFaceLoss(8, 3, margin=0.35)
        >>> loss(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])).backward()
    """

    @forwards_keywords(MarginLoss, other_names=OTHER_NAMES)
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        margin: float | Tensor = 0.35,
        scale: float | Tensor = 30.0,
        **keywords: Unpack[MarginKeywords],
    ) -> None:
        super().__init__(in_features, num_classes, AdditiveMargin(margin), scale, **keywords)


class CombinedMarginLoss(MarginLoss):
    """Cross-entropy of ``scale * (cos(m1 theta_y + m2) - m3)`` at the label, ``scale * cos theta_k`` elsewhere.

    Args:
        margin: ``(m1, m2, m3)``: SphereFace, ArcFace and CosFace in one.
        in_features, num_classes, scale, fallback, gradient, keywords: as in ``ArcFaceLoss``.

    Source: Deng et al. 2019, arXiv:1801.07698, equation 4.

    Example:
        >>> import torch, fusedloss
        >>> loss = fusedloss.CombinedMarginLoss(8, 3, margin=(1.0, 0.3, 0.2))
        >>> loss(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])).backward()
    """

    @forwards_keywords(MarginLoss, other_names=OTHER_NAMES)
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        margin: Sequence[float | Tensor] = (1.0, 0.5, 0.0),
        scale: float | Tensor = 30.0,
        *,
        fallback: Fallback = "monotone",
        gradient: GradientKind = "exact",
        **keywords: Unpack[MarginKeywords],
    ) -> None:
        if not isinstance(margin, (tuple, list)) or len(margin) != 3:
            raise ValueError(f"margin must be three numbers (m1, m2, m3); got {margin!r}")
        m1, m2, m3 = margin
        super().__init__(in_features, num_classes, CombinedMargin(m1, m2, m3, fallback, gradient), scale, **keywords)

    def settings(self) -> dict[str, Any]:
        margin = self.current_margin()
        assert isinstance(margin, CombinedMargin)
        return super().settings() | _angular_settings(margin) | {"margin": (margin.m1, margin.m2, margin.m3)}


def _angular_settings(margin: MarginTerm) -> dict[str, Any]:
    return {name: getattr(margin, name) for name in ("fallback", "gradient")}


class ArcFaceHead(CosineWeight):
    """Features and labels in, scaled cosine logits with ArcFace's margin out: for trainers with their own loss.

    Args:
        in_features: width D of the features.
        num_classes: number of classes K.
        margin: radians; a float, or a ``(K,)`` tensor (per class).
        scale: above 0; a float, or an ``nn.Parameter`` that is learned.
        sub_centers: rows of weights per class, of which the nearest counts.

    Shape:
        features ``(B, D)``; labels ``(B,)`` or None (inference: no margin). Returns ``(B, K)`` in float32.

    Raises:
        ValueError, TypeError: settings out of range, tensors that do not fit. IndexError: a label outside [0, K), on
            the CPU.

    Source: Deng et al. 2019, arXiv:1801.07698.

    Example:
        >>> import torch, fusedloss
        >>> head = fusedloss.ArcFaceHead(8, 3)
        >>> logits = head(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
        >>> torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        margin: float | Tensor = 0.5,
        scale: float | Tensor = 30.0,
        *,
        sub_centers: int = 1,
    ) -> None:
        super().__init__(in_features, num_classes, sub_centers)
        check_scale(scale)
        self.margin = RegisteredTerm(AngularMargin(margin))
        self._scale = RegisteredTerm(Scale(scale))

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"margin": self._margin_term().margin, "scale": self.scale}

    @property
    def scale(self) -> Tensor | float:
        """What multiplies the cosines."""
        scale = self._scale.current()
        assert isinstance(scale, Scale)
        return scale.scale

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scaled cosines ``(B, K)``, with the margin at `labels`."""
        return functional.margin_logits(
            features,
            self.weight,
            labels,
            margin=self._margin_term(),
            scale=self.scale,
            sub_centers=self.sub_centers,
        )

    def _margin_term(self) -> AngularMargin:
        margin = self.margin.current()
        assert isinstance(margin, AngularMargin)
        return margin
