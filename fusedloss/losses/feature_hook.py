"""Keeps the detached input of a layer for a loss that needs features."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fusedloss.losses.running_state import is_recomputing


class FeatureHook:
    """A forward pre-hook on a layer that keeps its input until the loss takes it.

    `in_features` None takes any width; `always` keeps the input in evaluation and without gradients too.
    The layer holds this object and this object holds the loss weakly: copying or pickling the model copies neither the
    loss nor a gradient path, and the copy feeds nobody.
    """

    def __init__(
        self, loss: nn.Module, layer: nn.Module, in_features: int | None = None, *, always: bool = False
    ) -> None:
        if not isinstance(layer, nn.Module):
            hint = " (a model with two classifiers: watch one of them)" if isinstance(layer, (tuple, list)) else ""
            raise TypeError(f"layer must be an nn.Module; got {type(layer).__name__}{hint}")
        takes = getattr(layer, "in_features", None)
        if isinstance(takes, int) and in_features not in (None, takes):
            raise ValueError(
                f"layer must take the in_features={in_features} of this loss; got one that takes {takes}: build the "
                f"loss with in_features={takes}"
            )
        self._loss = weakref.ref(loss)
        self._always = always
        self._features: Tensor | None = None
        self._recomputed = False
        self._handle = layer.register_forward_pre_hook(_PreHook(self))

    def keep(self, features: Tensor) -> None:
        """Keeps one batch, where the loss is in training and gradients are on, or always."""
        loss = self._loss()
        if loss is None or not (self._always or (loss.training and torch.is_grad_enabled())):
            return
        features = features.detach()
        # A 1x1 convolution as classifier takes (B, D, 1, 1).
        if features.dim() > 2 and features.shape[2:].numel() == 1:
            features = features.flatten(1)
        self._features, self._recomputed = features, is_recomputing()

    def take(self) -> Tensor | None:
        """The features kept since the last call, once; those of a repeated forward for a repeated loss alone."""
        features, self._features = self._features, None
        return None if self._recomputed and not is_recomputing() else features

    def remove(self) -> None:
        """Leaves the layer."""
        self._handle.remove()


class _PreHook:
    def __init__(self, hook: FeatureHook | None) -> None:
        self._hook = hook

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._hook is not None and inputs and isinstance(inputs[0], Tensor):
            self._hook.keep(inputs[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> _PreHook:
        return _PreHook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _PreHook, (None,)


def checked_features(features: Any, logits: Tensor, width: int | str) -> Tensor:
    """Features of the rows of `logits`, ``(B, width)``; the error says where timm has them."""
    if not isinstance(features, Tensor) or not features.is_floating_point():
        got = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"features must be a floating-point tensor; got {got}")
    rows = logits.shape[0]
    if features.dim() != 2 or features.shape[0] != rows or (isinstance(width, int) and features.shape[1] != width):
        raise ValueError(
            f"features must have shape ({rows}, {width}), the input of the classification layer (timm: "
            f"model.forward_head(model.forward_features(x), pre_logits=True)); got {tuple(features.shape)}"
        )
    return features
