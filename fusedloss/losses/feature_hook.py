"""Keeps the detached input of a layer for a loss that needs features."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn


class FeatureTap:
    """A forward pre-hook on a layer that keeps its input until the loss takes it.

    `in_features` None takes any width; `always` keeps the input in evaluation and without gradients too.
    The layer holds the tap and the tap holds the loss weakly: copying or pickling the model copies neither the loss nor
    a gradient path, and the copy feeds nobody.
    """

    def __init__(
        self, loss: nn.Module, layer: nn.Module, in_features: int | None = None, *, always: bool = False
    ) -> None:
        if not isinstance(layer, nn.Module):
            hint = " (a model with two classifiers: watch one of them)" if isinstance(layer, tuple | list) else ""
            raise TypeError(f"watch: layer must be an nn.Module; got {type(layer).__name__}{hint}")
        takes = getattr(layer, "in_features", None)
        if isinstance(takes, int) and in_features not in (None, takes):
            raise ValueError(
                f"watch: this loss has in_features={in_features} but the layer takes {takes}; "
                f"build the loss with in_features={takes}"
            )
        self._loss = weakref.ref(loss)
        self._always = always
        self._features: Tensor | None = None
        self._handle = layer.register_forward_pre_hook(_Hook(self))

    def keep(self, features: Tensor) -> None:
        """Keeps one batch, where the loss is in training and gradients are on, or always."""
        loss = self._loss()
        if loss is None or not (self._always or (loss.training and torch.is_grad_enabled())):
            return
        features = features.detach()
        # A 1x1 convolution as classifier takes (B, D, 1, 1).
        if features.dim() > 2 and features[0].numel() == features.shape[1]:
            features = features.flatten(1)
        self._features = features

    def take(self) -> Tensor | None:
        """The features kept since the last call, once."""
        features, self._features = self._features, None
        return features

    def remove(self) -> None:
        """Leaves the layer."""
        self._handle.remove()


class _Hook:
    def __init__(self, tap: FeatureTap | None) -> None:
        self._tap = tap

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._tap is not None and inputs and isinstance(inputs[0], Tensor):
            self._tap.keep(inputs[0])

    def __deepcopy__(self, memo: dict) -> _Hook:
        return _Hook(None)

    def __reduce__(self) -> tuple:
        return _Hook, (None,)
