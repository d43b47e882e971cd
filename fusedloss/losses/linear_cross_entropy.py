"""A linear layer and its cross-entropy in one module, whose logits are never stored whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fusedloss import functional
from fusedloss.core.checks import check_bool, check_integer, check_number, check_tensor
from fusedloss.functional import RowStatistics
from fusedloss.losses.cross_entropy import CrossEntropyKeywords, CrossEntropyLoss
from fusedloss.losses.keywords import forwards_keywords


class LinearCrossEntropyLoss(CrossEntropyLoss):
    """``torch.nn.LinearCrossEntropyLoss`` with smoothing, terms, focal and more in the same memory.

    Checkpoints interchange: parameters are ``linear.weight`` ``(K, D)`` and ``linear.bias``.

    Args:
        in_features: width D of the features.
        num_classes: number of classes K.
        out_features: further dimensions ``(d1, ...)`` of the logits ``(B, K, d1, ...)``; these logits are stored.
        bias: whether the layer has one.
        device, dtype: of the layer.
        options: taken for torch's signature; chunks are chosen here.
        normalize, sample_rate: as in ``fusedloss.linear_cross_entropy``.
        keywords: those of ``CrossEntropyLoss``; ``ignore_index=None`` is -100, as in torch.

    Shape:
        input ``(B, D)`` or ``(D,)``; target ``(B, d1, ...)``, ``()``, or probabilities of the logits' shape.

    Example:
        >>> import torch, fusedloss
        >>> loss = fusedloss.LinearCrossEntropyLoss(8, 3, bias=True, label_smoothing=0.1)
        >>> loss(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])).backward()
        >>> loss.logits(torch.randn(4, 8)).shape, list(loss.state_dict())
        (torch.Size([4, 3]), ['linear.weight', 'linear.bias'])
    """

    @forwards_keywords(CrossEntropyLoss)
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: Sequence[int] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        options: object = None,
        normalize: bool = False,
        sample_rate: float | None = None,
        **keywords: Unpack[CrossEntropyKeywords],
    ) -> None:
        if keywords.get("ignore_index", 0) is None:  # torch's default
            del keywords["ignore_index"]
        super().__init__(**keywords)
        self.in_features = check_integer("in_features", in_features, at_least=1)
        self.num_classes = check_integer("num_classes", num_classes, at_least=1)
        self.out_features = _sizes("out_features", out_features)
        self.normalize = check_bool("normalize", normalize)
        self.sample_rate = sample_rate
        if sample_rate is not None:
            check_number("sample_rate", sample_rate, above=0.0, at_most=1.0)
        if self.out_features and (normalize or sample_rate is not None):
            raise ValueError(f"out_features must be () with normalize or sample_rate; got {self.out_features}")
        rows = self.num_classes * math.prod(self.out_features)
        bias = check_bool("bias", bias)
        self.linear = nn.Linear(self.in_features, rows, bias=bias, device=device, dtype=dtype)

    def forward(
        self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """The loss of features `input` against `target`; see the class for shapes."""
        self._check_input(input)
        if self.out_features:
            return super().forward(self.logits(input), target, sample_weight)
        if not torch.compiler.is_compiling():
            self._step_watch.look(self)
        loss: Tensor | tuple[Tensor, RowStatistics] = functional.linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            normalize=self.normalize,
            sample_rate=self.sample_rate if self.training else None,
            **self._options(sample_weight),
        )
        return loss

    def logits(self, input: Tensor) -> Tensor:
        """The layer's logits ``(B, K, d1, ...)`` before terms; cosines, plus bias, with `normalize`."""
        self._check_input(input)
        if self.normalize:
            cosine = functional.margin_logits(input, self.linear.weight, scale=1.0)
            return cosine if self.linear.bias is None else cosine + self.linear.bias
        logits: Tensor = self.linear(input)
        # Not unflatten, which torch leaves untyped.
        return logits.reshape(*logits.shape[:-1], self.num_classes, *self.out_features) if self.out_features else logits

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"bias": self.linear.bias is not None}

    def _check_input(self, input: Tensor) -> None:
        check_tensor("input", input)
        if input.dim() not in (1, 2) or input.shape[-1] != self.in_features:
            raise ValueError(
                f"input must have shape (B, {self.in_features}) or ({self.in_features},); got {tuple(input.shape)}"
            )


def _sizes(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    if isinstance(sizes, (str, Tensor)) or not isinstance(sizes, Iterable):
        raise TypeError(f"{name} must be a sequence of integers; got {type(sizes).__name__}")
    return tuple(check_integer(name, size, at_least=1) for size in sizes)
