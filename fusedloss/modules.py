"""The losses as modules: they keep parameters, buffers and hooks, and call functional."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusedloss import functional
from fusedloss.features_tap import FeatureTap
from fusedloss.functional import RowStatistics
from fusedloss.registered import RegisteredTerm, StepWatch
from fusedloss.statistics import ClassStatistics
from fusedloss.terms import AffineTerm, ClassTemperature, Prior, Term, fold_affine


class CrossEntropyLoss(nn.Module):
    """``torch.nn.CrossEntropyLoss`` with terms, focal, z-loss and sample weights: ``fusedloss.cross_entropy`` kept.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as in ``torch.nn.CrossEntropyLoss``;
            `size_average` and `reduce` were retired there and must stay None.
        terms: what changes the logit (``fusedloss.terms``). Their tensors are registered here: a Parameter as a
            parameter, another tensor as a buffer, under ``terms.0.log_prior``.
        focal_gamma, z_loss, return_stats: as in ``fusedloss.cross_entropy``.

    Shape:
        input ``(K,)``, ``(B, K)`` or ``(B, K, d1, ...)``; target as in ``fusedloss.cross_entropy``; sample_weight the
        target's shape or ``(B,)``. Returns a scalar, or the target's shape with ``reduction="none"``.

    Example:
        >>> import torch, fusedloss
        >>> loss = fusedloss.CrossEntropyLoss(terms=[fusedloss.Prior(torch.tensor([0.9, 0.1]).log())])
        >>> loss(torch.zeros(1, 2), torch.tensor([0]))
        tensor(0.1054)
        >>> list(loss.state_dict())
        ['terms.0.log_prior']
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: None = None,
        ignore_index: int = -100,
        reduce: None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        terms: Sequence[Term] = (),
        focal_gamma: float = 0.0,
        z_loss: float = 0.0,
        return_stats: bool = False,
    ) -> None:
        super().__init__()
        if size_average is not None or reduce is not None:
            raise ValueError("size_average and reduce were retired by torch; use reduction='mean', 'sum' or 'none'")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: got {reduction!r}; allowed are 'mean', 'sum' and 'none'")
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.focal_gamma = focal_gamma
        self.z_loss = z_loss
        self.return_stats = return_stats
        terms = (terms,) if isinstance(terms, Term) else tuple(terms)
        self.terms = nn.ModuleList(RegisteredTerm(term) for term in terms)
        self._step_watch = StepWatch()

    def forward(
        self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """The loss of logits `input` against `target`; see the class for shapes."""
        if not torch.compiler.is_compiling():
            self._step_watch.look(self)
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
            terms=self._terms(),
            focal_gamma=self.focal_gamma,
            z_loss=self.z_loss,
            sample_weight=sample_weight,
            return_stats=self.return_stats,
        )

    def fold_into(self, linear: nn.Linear, *, prior: bool = True) -> nn.Linear:
        """A new ``nn.Linear`` whose outputs are this loss's logits, terms included: inference needs no fusedloss.

        Args:
            linear: the classification layer, ``(in_features, K)``; unchanged.
            prior: False leaves ``Prior`` terms out. A model trained with one predicts the training frequencies with
                it, and treats the classes alike without it.

        Raises:
            TypeError: `linear` is no ``nn.Linear``, or a term is not affine.

        Example:
            >>> import torch, fusedloss
            >>> loss = fusedloss.CrossEntropyLoss(terms=[fusedloss.Scale(2.0)])
            >>> layer = torch.nn.Linear(3, 4)
            >>> x = torch.ones(1, 3)
            >>> torch.allclose(loss.fold_into(layer)(x), 2 * layer(x))
            True
        """
        _check_linear("fold_into", linear)
        terms = []
        for term in self._terms():
            if not isinstance(term, AffineTerm):
                raise TypeError(f"fold_into: {type(term).__name__} is not affine and can't be folded into a layer")
            term.check(linear.out_features)
            if prior or not isinstance(term, Prior):
                terms.append(term)
        return _folded(linear, tuple(terms))

    def extra_repr(self) -> str:
        shown = {"reduction": "mean", "ignore_index": -100, "label_smoothing": 0.0, "focal_gamma": 0.0, "z_loss": 0.0}
        return ", ".join(
            f"{name}={getattr(self, name)}" for name, usual in shown.items() if getattr(self, name) != usual
        )

    def _terms(self) -> tuple[Term, ...]:
        return tuple(term.current() for term in self.terms)  # type: ignore[operator, union-attr]


class VACELoss(CrossEntropyLoss):
    """Variance-adaptive cross-entropy: each class has a temperature that follows the scatter of its features.

    ``tau_c = clip(a + b * scatter_c, tau_min, tau_max)`` and ``loss = cross_entropy(logits / tau, target)``, where
    scatter_c is the mean squared distance of the features of class c to their mean and ``b = strength / mean scatter``
    over the classes with at least two samples, taken anew at each update until `warmup_steps` updates (or
    ``fit_statistics``), and kept from then on. Classes never seen, or with one sample ever, get the mean scatter. The
    temperature carries no gradient. With ``a = 1 - strength`` the mean temperature is 1.

    Features come from ``forward(..., features=...)``, from ``watch(layer)``, or once and for all from
    ``fit_statistics``. Statistics move only in training mode with gradients enabled, before the loss is computed, and
    not with probability targets, which name no class.

    Args:
        in_features: width D of the features.
        num_classes: K.
        a: temperature at scatter 0.
        strength: how far the mean temperature lies above `a`; at least 0.
        b: replaces ``strength / mean scatter`` when given.
        tau_min, tau_max: bounds of the temperatures; 0 < tau_min <= tau_max.
        momentum: weight of a new batch in the running statistics; None accumulates exactly.
        warmup_steps: updates after which b stays.
        center: subtract each row's mean from its logits first, so that a common offset changes nothing.
        keywords: those of ``CrossEntropyLoss`` (weight, ignore_index, reduction, label_smoothing, terms, ...); further
            terms apply after the temperature.

    Shape:
        logits ``(B, K)``, target ``(B,)`` or probabilities ``(B, K)``, features ``(B, D)``.

    Source: variance-adaptive cross-entropy; docs/vace.md says where this differs from the note that proposed it.

    Example:
        >>> import torch, fusedloss
        >>> loss = fusedloss.VACELoss(in_features=4, num_classes=3)
        >>> features, labels = torch.randn(30, 4), torch.arange(30) % 3
        >>> _ = loss.fit_statistics(features, labels)
        >>> value = loss(torch.randn(30, 3, requires_grad=True), labels)
        >>> loss.temperature.shape
        torch.Size([3])
    """

    temperature: Tensor
    slope: Tensor
    updates: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        a: float = 1.0,
        strength: float = 0.5,
        b: float | None = None,
        tau_min: float = 0.5,
        tau_max: float = 2.0,
        momentum: float | None = 0.1,
        warmup_steps: int = 100,
        center: bool = False,
        **keywords: Any,
    ) -> None:
        super().__init__(**keywords)
        for name, value in (("a", a), ("strength", strength), ("b", 0.0 if b is None else b)):
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite; got {value}")
        if strength < 0:
            raise ValueError(f"strength must be at least 0; got {strength}")
        if not (math.isfinite(tau_max) and 0 < tau_min <= tau_max):
            raise ValueError(f"tau_min and tau_max must satisfy 0 < tau_min <= tau_max; got {tau_min} and {tau_max}")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0; got {warmup_steps}")
        self.a, self.strength, self.b = a, strength, b
        self.tau_min, self.tau_max = tau_min, tau_max
        self.warmup_steps = warmup_steps
        self.center = center
        self.statistics = ClassStatistics(in_features, num_classes, momentum=momentum, ignore_index=self.ignore_index)
        clipped = min(max(a, tau_min), tau_max)
        self.register_buffer("temperature", torch.full((num_classes,), clipped, dtype=torch.float32))
        self.register_buffer("slope", torch.zeros((), dtype=torch.float64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._tap: FeatureTap | None = None

    @property
    def in_features(self) -> int:
        """Width of the features."""
        return self.statistics.in_features

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.statistics.num_classes

    def watch(self, layer: nn.Module) -> VACELoss:
        """Takes the features from `layer`'s input from now on, so that ``loss(model(x), y)`` suffices. Returns self.

        Args:
            layer: the classification layer, ``model.get_classifier()`` in timm; its input must be ``(B, in_features)``.

        Raises:
            TypeError: not one module. ValueError: a layer that takes another width.

        Example:
            >>> import torch, fusedloss
            >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
            >>> loss = fusedloss.VACELoss(4, 3).watch(model[1])
            >>> loss(model(torch.randn(8, 2, 2)), torch.arange(8) % 3).backward()
            >>> int(loss.updates)
            1
        """
        if self._tap is not None:
            self._tap.remove()
        self._tap = FeatureTap(self, layer, self.in_features)
        return self

    def forward(  # type: ignore[override]
        self, logits: Tensor, target: Tensor, features: Tensor | None = None, sample_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """The loss; in training the statistics take `features` (or the watched layer's input) in first."""
        watched = self._tap.take() if self._tap is not None else None
        features = watched if features is None else features
        if self.training and torch.is_grad_enabled() and not target.is_floating_point():
            if features is not None:
                self._update(features, target)
            elif self._tap is None and not torch.compiler.is_compiling() and int(self.updates) == 0:
                raise ValueError(
                    "features: got None and no statistics yet; pass features, call watch(model.get_classifier()) "
                    "once, or fit_statistics(features, labels)"
                )
        return super().forward(self._centered(logits), target, sample_weight)

    def fit_statistics(self, features: Tensor, labels: Tensor) -> VACELoss:
        """Sets statistics and temperatures from all features of a training set, exactly. Returns self.

        For frozen features; `features` is optional afterwards.

        Args:
            features: ``(N, D)``. labels: ``(N,)`` in [0, K), or ignore_index.

        Example:
            >>> import torch, fusedloss
            >>> loss = fusedloss.VACELoss(1, 2, strength=0.5)
            >>> _ = loss.fit_statistics(torch.tensor([[0.0], [2.0], [0.0], [4.0]]), torch.tensor([0, 0, 1, 1]))
            >>> loss.temperature  # scatters 1 and 4, mean 2.5
            tensor([1.2000, 1.8000])
        """
        exact = ClassStatistics(self.in_features, self.num_classes, ignore_index=self.ignore_index)
        exact.to(device=self.temperature.device).update(features, labels)
        with torch.no_grad():
            for name, buffer in self.statistics.named_buffers():
                buffer.copy_(exact.get_buffer(name))
            self.updates.zero_()
            self._refresh()
            self.updates.fill_(max(self.warmup_steps, 1))
        return self

    def scaled_logits(self, logits: Tensor) -> Tensor:
        """``logits / temperature`` (after centring, where asked): what to predict with.

        Args:
            logits: ``(B, K)``. Returns ``(B, K)`` in the same dtype.

        Example:
            >>> import torch, fusedloss
            >>> fusedloss.VACELoss(4, 2, a=2.0).scaled_logits(torch.tensor([[4.0, 2.0]]))
            tensor([[2., 1.]])
        """
        return (self._centered(logits) / self.temperature).to(logits.dtype)

    def fold_into(self, linear: nn.Linear, *, prior: bool = True) -> nn.Linear:
        """A new ``nn.Linear`` with the temperature (and centring and terms) baked in; see CrossEntropyLoss.fold_into.

        Example:
            >>> import torch, fusedloss
            >>> loss, layer, x = fusedloss.VACELoss(3, 2, a=2.0), torch.nn.Linear(3, 2), torch.ones(1, 3)
            >>> torch.allclose(loss.fold_into(layer)(x), loss.scaled_logits(layer(x)))
            True
        """
        _check_linear("fold_into", linear)
        if self.center:
            linear = _folded(linear, ())
            with torch.no_grad():
                linear.weight.sub_(linear.weight.mean(0, keepdim=True))
                linear.bias.sub_(linear.bias.mean())
        return super().fold_into(linear, prior=prior)

    def extra_repr(self) -> str:
        own = f"in_features={self.in_features}, num_classes={self.num_classes}, a={self.a}, strength={self.strength}"
        rest = super().extra_repr()
        return f"{own}, {rest}" if rest else own

    def _terms(self) -> tuple[Term, ...]:
        # A snapshot: the next update writes the buffer while an earlier loss may still be waiting for its backward.
        return (_trusted_temperature(self.temperature.clone()), *super()._terms())

    def _centered(self, logits: Tensor) -> Tensor:
        return logits - logits.mean(1, keepdim=True) if self.center else logits

    def _update(self, features: Tensor, labels: Tensor) -> None:
        if features.dim() != 2 or features.shape[-1] != self.in_features:
            raise ValueError(
                f"features must have shape (B, {self.in_features}), the input of the classification layer (timm: "
                f"model.forward_head(model.forward_features(x), pre_logits=True)); got {tuple(features.shape)}"
            )
        self.statistics.update(features.detach(), labels)
        with torch.no_grad():
            self._refresh()
            self.updates += 1

    def _refresh(self) -> None:
        """Temperatures from the statistics, without asking the device for a value."""
        scatter, count = self.statistics.scatter, self.statistics.count
        several = count >= 2
        mean = (scatter * several).sum() / several.sum()
        known = torch.isfinite(mean) & (mean > 0)
        if self.b is not None:
            self.slope.fill_(self.b)
        else:
            fresh = torch.where(known, self.strength / mean, 0.0)
            self.slope.copy_(torch.where(self.updates < max(self.warmup_steps, 1), fresh, self.slope))
        filled = torch.where(several, scatter, torch.where(known, mean, 0.0))
        self.temperature.copy_((self.a + self.slope * filled).clamp(self.tau_min, self.tau_max))

    def _apply(self, fn, recurse=True):
        """Moves the state between devices and leaves its types as they are."""
        names = ("temperature", "slope", "updates")
        before = {name: getattr(self, name) for name in names}
        super()._apply(fn, recurse)
        for name, kept in before.items():
            moved = getattr(self, name)
            if moved.dtype != kept.dtype:
                self._buffers[name] = kept.to(moved.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tap": None}


def _trusted_temperature(tau: Tensor) -> ClassTemperature:
    """A ClassTemperature of values known to be clipped: its check would wait for the device."""
    term = object.__new__(ClassTemperature)
    object.__setattr__(term, "tau", tau)
    return term


def _check_linear(name: str, linear: nn.Module) -> None:
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{name}: linear must be an nn.Linear; got {type(linear).__name__}")


def _folded(linear: nn.Linear, terms: tuple[AffineTerm, ...]) -> nn.Linear:
    weight = linear.weight.detach()
    bias = weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
    scale, offset = fold_affine(terms, linear.out_features, torch.float64, weight.device)
    new_weight, new_bias = weight.double(), bias.double()
    with torch.no_grad():
        if scale is not None:
            new_weight, new_bias = new_weight * scale.unsqueeze(1), new_bias * scale
        if offset is not None:
            new_bias = new_bias + offset
    folded = nn.Linear(linear.in_features, linear.out_features, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        folded.weight.copy_(new_weight)
        folded.bias.copy_(new_bias)
    return folded
