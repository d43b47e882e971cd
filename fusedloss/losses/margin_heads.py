"""Losses and heads on cosines with a margin: they own one row of weights per class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedloss import functional
from fusedloss.backends.reference.linear_ce import unit_rows
from fusedloss.core.row_loss import MarginPenalty
from fusedloss.functional import RowStatistics
from fusedloss.losses.cosine_weight import CosineWeight
from fusedloss.losses.cross_entropy import CrossEntropyLoss
from fusedloss.losses.registered_terms import RegisteredTerm
from fusedloss.terms import AdditiveMargin, AngularMargin, CombinedMargin, MarginTerm, Scale, Term
from fusedloss.terms.margins import Fallback, GradientKind, angle_added


class _MarginLoss(CosineWeight):
    """Cross-entropy of scaled cosines with a margin at the label; the cosines are never stored whole."""

    class_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        margin: MarginTerm,
        scale: float | Tensor = 30.0,
        *,
        terms: Sequence[Term] = (),
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
        z_loss: float = 0.0,
        margin_penalty: MarginPenalty | None = None,
        sample_rate: float | None = None,
        sub_centers: int = 1,
        return_stats: bool = False,
    ) -> None:
        super().__init__(in_features, num_classes, sub_centers)
        terms = (terms,) if isinstance(terms, Term) else tuple(terms)
        if sub_centers > 1 and sample_rate is not None:
            raise ValueError("sample_rate: samples classes of one center; got sub_centers above 1 with it")
        self.margin = RegisteredTerm(margin)
        # Keeps class weights, terms and options as CrossEntropyLoss does, the scale first among the terms.
        self.loss = CrossEntropyLoss(
            class_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            terms=(Scale(scale), *terms),
            focal_gamma=focal_gamma,
            z_loss=z_loss,
            margin_penalty=margin_penalty,
            return_stats=return_stats,
        )
        self.sample_rate = sample_rate

    def forward(
        self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """The loss of features ``(B, D)`` against labels ``(B,)``."""
        return self._loss(input, target, self.margin.current(), sample_weight)  # type: ignore[arg-type]

    def _loss(
        self, input: Tensor, target: Tensor, margin: MarginTerm, sample_weight: Tensor | None
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        if not torch.compiler.is_compiling():
            self._step_watch.look(self)
        if self.sub_centers > 1:
            cosine = functional.margin_logits(
                input,
                self.weight,
                target,
                margin=margin,
                scale=1.0,
                ignore_index=self.loss.ignore_index,
                sub_centers=self.sub_centers,
            )
            return self.loss(cosine, target, sample_weight)
        options = self.loss._options(sample_weight)
        options["terms"] = (margin, *options["terms"])
        sample_rate = self.sample_rate if self.training else None
        return functional.linear_cross_entropy(
            input, self.weight, target, normalize=True, sample_rate=sample_rate, **options
        )

    @property
    def scale(self) -> Tensor | float:
        """What multiplies the cosines."""
        return self.loss._terms()[0].scale  # type: ignore[attr-defined]


class ArcFaceLoss(_MarginLoss):
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
        class_weight: ``(K,)``. sub_centers: rows per class (these cosines are stored). sample_rate: PartialFC, in
            training mode. Others as in ``CrossEntropyLoss``.

    Source: Deng et al. 2019, arXiv:1801.07698.

    Example:
        >>> import torch, fusedloss
        >>> loss = fusedloss.ArcFaceLoss(8, 3, margin=0.5, scale=30.0)
        >>> loss(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])).backward()
        >>> loss.weight.grad.shape, loss.logits(torch.randn(4, 8)).shape
        (torch.Size([3, 8]), torch.Size([4, 3]))
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        margin: float | Tensor = 0.5,
        scale: float | Tensor = 30.0,
        *,
        fallback: Fallback = "monotone",
        gradient: GradientKind = "exact",
        **keywords,
    ) -> None:
        super().__init__(in_features, num_classes, AngularMargin(margin, fallback, gradient), scale, **keywords)


class CosFaceLoss(_MarginLoss):
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

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        margin: float | Tensor = 0.35,
        scale: float | Tensor = 30.0,
        **keywords,
    ) -> None:
        super().__init__(in_features, num_classes, AdditiveMargin(margin), scale, **keywords)


class CombinedMarginLoss(_MarginLoss):
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

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        margin: Sequence[float | Tensor] = (1.0, 0.5, 0.0),
        scale: float | Tensor = 30.0,
        *,
        fallback: Fallback = "monotone",
        gradient: GradientKind = "exact",
        **keywords,
    ) -> None:
        if isinstance(margin, (float, int, Tensor)) or len(margin) != 3:
            raise ValueError(f"margin must be three numbers (m1, m2, m3); got {margin!r}")
        m1, m2, m3 = margin
        super().__init__(in_features, num_classes, CombinedMargin(m1, m2, m3, fallback, gradient), scale, **keywords)


class AdaFaceLoss(_MarginLoss):
    """AdaFace: the margin follows the quality of an image, read off the length of its features.

    ``k = clip(h (|x| - mu) / (sigma + 1e-3), -1, 1)`` with running mean and deviation of the lengths, and at the label
    ``scale * (cos(theta - margin k) - margin (1 + k))``. Lengths are clipped to [1e-3, 100] and get no gradient.

    Args:
        margin: m, radians. h: how far from the mean the margin changes. momentum: weight of the new batch.
        in_features, num_classes, scale, keywords: as in ``ArcFaceLoss``.

    Source: Kim et al. 2022, arXiv:2204.00964.

    Example:
        >>> import torch, fusedloss
        >>> loss = fusedloss.AdaFaceLoss(8, 3)
        >>> loss(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])).backward()
    """

    norm_mean: Tensor
    norm_deviation: Tensor

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
        **keywords,
    ) -> None:
        super().__init__(in_features, num_classes, AngularMargin(margin, fallback), scale, **keywords)
        self.h, self.momentum, self.fallback = h, momentum, fallback
        self.register_buffer("norm_mean", torch.tensor(20.0))
        self.register_buffer("norm_deviation", torch.tensor(100.0))

    def forward(
        self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """The loss of features ``(B, D)`` against labels ``(B,)``; the statistics move in training mode first."""
        norm = torch.linalg.vector_norm(input.detach(), dim=1, dtype=torch.float32).clamp(1e-3, 100.0)
        if self.training and torch.is_grad_enabled() and len(norm) > 1:
            deviation, mean = torch.std_mean(norm)
            with torch.no_grad():
                self.norm_mean.lerp_(mean.to(self.norm_mean.dtype), self.momentum)
                self.norm_deviation.lerp_(deviation.to(self.norm_deviation.dtype), self.momentum)
        quality = ((norm - self.norm_mean) / (self.norm_deviation + 1e-3) * self.h).clamp(-1.0, 1.0).unsqueeze(1)
        margin = self.margin.current().margin  # type: ignore[attr-defined]
        term = CombinedMargin(1.0, -margin * quality, margin + margin * quality, self.fallback)
        return self._loss(input, target, term, sample_weight)


class CurricularFaceLoss(_MarginLoss):
    """CurricularFace: ArcFace whose hard negatives count more as training goes on.

    A class k that is nearer than the label's turned cosine, ``c_k > cos(theta_y + margin)``, has ``c_k (t + c_k)`` in
    place of its cosine, with t a running mean of the labels' cosines. These cosines are stored, ``(B, K)``.

    Args:
        margin: radians; a float. momentum: weight of the new batch in t.
        in_features, num_classes, scale, keywords: as in ``ArcFaceLoss``.

    Source: Huang et al. 2020, arXiv:2004.00288.

    Example:
        >>> import torch, fusedloss
        >>> loss = fusedloss.CurricularFaceLoss(8, 3)
        >>> loss(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])).backward()
    """

    t: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        margin: float = 0.5,
        scale: float | Tensor = 64.0,
        *,
        momentum: float = 0.01,
        **keywords,
    ) -> None:
        super().__init__(in_features, num_classes, AngularMargin(margin), scale, **keywords)
        if self.sample_rate is not None or self.sub_centers > 1:
            raise ValueError("sample_rate, sub_centers: CurricularFaceLoss compares all classes of one center each")
        self.momentum = momentum
        self.register_buffer("t", torch.zeros(()))

    def forward(
        self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """The loss of features ``(B, D)`` against labels ``(B,)``; t moves in training mode first."""
        if not torch.compiler.is_compiling():
            self._step_watch.look(self)
        named = target != self.loss.ignore_index
        classes = torch.where(named, target, 0).to(torch.int64)
        term: AngularMargin = self.margin.current()  # type: ignore[assignment]
        cosine = functional.margin_logits(
            input, self.weight, target, margin=term, scale=1.0, ignore_index=self.loss.ignore_index
        )
        with torch.no_grad():
            label = (unit_rows(input.double()) * unit_rows(self.weight[classes].double())).sum(1)
            turned, _ = angle_added(label, term.margin, "none")
            if self.training:
                self._move(label, named)
            harder = (cosine > turned.unsqueeze(1)).scatter(1, classes.unsqueeze(1), False) & named.unsqueeze(1)
        cosine = torch.where(harder, cosine * (self.t.clone() + cosine), cosine)
        return self.loss(cosine, target, sample_weight)

    def _move(self, label: Tensor, named: Tensor) -> None:
        count = named.sum()
        mean = torch.where(named, label, 0.0).sum() / count.clamp(min=1)
        weight = (count > 0) * self.momentum
        self.t.copy_(torch.lerp(self.t, mean.to(self.t.dtype), weight.to(self.t.dtype)))


class ArcFaceHead(CosineWeight):
    """Features and labels in, scaled cosine logits with ArcFace's margin out: for trainers with their own loss.

    Args:
        in_features: width D. num_classes: K. margin: radians. scale: a float or an ``nn.Parameter``.

    Shape:
        features ``(B, D)``; labels ``(B,)`` or None (inference: no margin). Returns ``(B, K)`` in float32.

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
        self.margin = RegisteredTerm(AngularMargin(margin))
        self._scale = RegisteredTerm(Scale(scale))

    @property
    def scale(self) -> Tensor | float:
        """What multiplies the cosines."""
        return self._scale.current().scale  # type: ignore[attr-defined]

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scaled cosines ``(B, K)``, with the margin at `labels`."""
        return functional.margin_logits(
            features,
            self.weight,
            labels,
            margin=self.margin.current(),  # type: ignore[arg-type]
            scale=self.scale,
            sub_centers=self.sub_centers,
        )
