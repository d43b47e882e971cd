"""Cross-entropy whose class temperatures follow the scatter of the features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from fusedloss.core.checks import check_bool, check_integer, check_number, check_tensor
from fusedloss.core.row_loss import RowSettings
from fusedloss.functional import RowStatistics
from fusedloss.functional.arguments import checked
from fusedloss.losses.class_statistics import ClassStatistics
from fusedloss.losses.cross_entropy import CrossEntropyKeywords, CrossEntropyLoss
from fusedloss.losses.feature_hook import FeatureHook, checked_features
from fusedloss.losses.folding import check_linear, folded
from fusedloss.losses.keywords import forwards_keywords
from fusedloss.losses.row_checks import check_feature_rows
from fusedloss.losses.running_state import statistics_move
from fusedloss.terms import ClassTemperature, Term


class VACELoss(CrossEntropyLoss):
    """Variance-adaptive cross-entropy: each class has a temperature that follows the scatter of its features.

    ``tau_c = clip(a + b * scatter_c, tau_min, tau_max)`` and ``loss = cross_entropy(logits / tau, target)``, where
    scatter_c is the mean squared distance of the features of class c to their mean and ``b = strength / mean scatter``
    over the classes with at least two samples, taken anew at each update until `warmup_steps` updates (or
    ``fit_statistics``), and kept from then on. Classes never seen, or with one sample ever, get the mean scatter. The
    temperature carries no gradient. With ``a = 1 - strength`` the mean temperature is 1.

    Features come from ``forward(..., features=...)``, from ``watch(layer)``, or once and for all from
    ``fit_statistics``. Statistics move only in training mode with gradients enabled, once all arguments have been
    checked and before the loss is computed; not with probability targets, which name no class, nor where a checkpoint
    repeats a forward. Rows of features that are not finite are left out (``statistics.skipped``).

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

    Raises:
        ValueError, TypeError: settings out of range; features that are missing or do not fit. IndexError: a label
            outside [0, K), on the CPU. The statistics are then as they were.
        RuntimeError: statistics would move inside a ``torch.func`` transform.

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

    @forwards_keywords(CrossEntropyLoss)
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
        **keywords: Unpack[CrossEntropyKeywords],
    ) -> None:
        super().__init__(**keywords)
        self.a = check_number("a", a)
        self.strength = check_number("strength", strength, at_least=0.0)
        self.b = None if b is None else check_number("b", b)
        self.tau_min = check_number("tau_min", tau_min, above=0.0)
        self.tau_max = check_number("tau_max", tau_max, above=0.0)
        if self.tau_min > self.tau_max:
            raise ValueError(f"tau_min must be at most tau_max={tau_max}; got {tau_min}")
        self.warmup_steps = check_integer("warmup_steps", warmup_steps, at_least=0)
        self.center = check_bool("center", center)
        self.statistics = ClassStatistics(in_features, num_classes, momentum=momentum, ignore_index=self.ignore_index)
        clipped = min(max(a, tau_min), tau_max)
        self.register_buffer("temperature", torch.full((self.num_classes,), clipped, dtype=torch.float32))
        self.register_buffer("slope", torch.zeros((), dtype=torch.float64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._hook: FeatureHook | None = None

    @property
    def in_features(self) -> int:
        """Width of the features."""
        return self.statistics.in_features

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.statistics.num_classes

    @property
    def momentum(self) -> float | None:
        """Weight of a new batch in the running statistics."""
        return self.statistics.momentum

    def watch(self, layer: nn.Module) -> Self:
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
        if self._hook is not None:
            self._hook.remove()
        self._hook = FeatureHook(self, layer, self.in_features)
        return self

    def forward(  # type: ignore[override]
        self, logits: Tensor, target: Tensor, features: Tensor | None = None, sample_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """The loss; in training the statistics take `features` (or the watched layer's input) in first."""
        watched = self._hook.take() if self._hook is not None else None
        features = watched if features is None else features
        self._check_call(logits, target, features, sample_weight)
        if not target.is_floating_point() and statistics_move(self):
            if features is not None:
                self._update(features, target)
            elif self._hook is None and not torch.compiler.is_compiling() and int(self.updates) == 0:
                raise ValueError(
                    "features must be given before there are statistics: pass them, call "
                    "watch(model.get_classifier()) once, or fit_statistics(features, labels); got None"
                )
        return super().forward(self._centered(logits), target, sample_weight)

    def fit_statistics(self, features: Tensor, labels: Tensor) -> Self:
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
            self._set_temperature()
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
        check_tensor("logits", logits, ("B", self.num_classes), like=self.temperature, of="the loss")
        return (self._centered(logits) / self.temperature).to(logits.dtype)

    def fold_into(self, linear: nn.Linear, *, prior: bool = True) -> nn.Linear:
        """A new ``nn.Linear`` with the temperature (and centring and terms) baked in; see CrossEntropyLoss.fold_into.

        Example:
            >>> import torch, fusedloss
            >>> loss, layer, x = fusedloss.VACELoss(3, 2, a=2.0), torch.nn.Linear(3, 2), torch.ones(1, 3)
            >>> torch.allclose(loss.fold_into(layer)(x), loss.scaled_logits(layer(x)))
            True
        """
        check_linear("fold_into", linear)
        if self.center:
            linear = folded(linear, ())
            with torch.no_grad():
                linear.weight.sub_(linear.weight.mean(0, keepdim=True))
                linear.bias.sub_(linear.bias.mean())
        return super().fold_into(linear, prior=prior)

    def _terms(self) -> tuple[Term, ...]:
        # A snapshot: the next update writes the buffer while an earlier loss may still be waiting for its backward.
        return (_trusted_temperature(self.temperature.clone()), *super()._terms())

    def _centered(self, logits: Tensor) -> Tensor:
        return logits - logits.mean(1, keepdim=True) if self.center else logits

    def _check_call(
        self, logits: Tensor, target: Tensor, features: Tensor | None, sample_weight: Tensor | None
    ) -> None:
        """Everything that may be wrong but labels, which the statistics check before they move."""
        check_tensor("logits", logits, ("B", self.num_classes), like=self.temperature, of="the loss")
        settings = RowSettings(
            self.label_smoothing, self.focal_gamma, self.poly_epsilon, self.z_loss, self.margin_penalty
        )
        terms = super()._terms()
        checked(logits, target, self.weight, self.ignore_index, self.reduction, terms, settings, sample_weight)
        if features is not None:
            check_feature_rows(checked_features(features, logits, self.in_features), state=self.temperature)

    @torch.no_grad()
    def _update(self, features: Tensor, target: Tensor) -> None:
        try:
            self.statistics.update(features, target)
        except IndexError as error:
            raise IndexError(str(error).replace("labels", "target", 1)) from None
        self._set_temperature()
        self.updates += 1

    def _set_temperature(self) -> None:
        """Temperatures from the statistics, without asking the device for a value."""
        scatter, several = self.statistics.scatter, self.statistics.count >= 2
        mean = (scatter * several).sum() / several.sum()
        known = torch.isfinite(mean) & (mean > 0)
        if self.b is None:
            fresh = torch.where(known, self.strength / mean, 0.0)
            slope = torch.where(self.updates < max(self.warmup_steps, 1), fresh, self.slope)
        else:
            slope = torch.full_like(self.slope, self.b)
        filled = torch.where(several, scatter, torch.where(known, mean, 0.0))
        self.temperature.copy_((self.a + slope * filled).clamp(self.tau_min, self.tau_max))
        # torch.compile of torch 2.8 drops a copy into a 0-dim tensor of what a float attribute enters.
        self.slope.view(1).copy_(slope.view(1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the state between devices and leaves its types as they are."""
        names = ("temperature", "slope", "updates")
        before = {name: getattr(self, name) for name in names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in before.items():
            moved = getattr(self, name)
            if moved.dtype != kept.dtype:
                self._buffers[name] = kept.to(moved.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hook": None}


def _trusted_temperature(tau: Tensor) -> ClassTemperature:
    """A ClassTemperature of values known to be clipped: its check would wait for the device."""
    term = object.__new__(ClassTemperature)
    object.__setattr__(term, "tau", tau)
    return term
