"""The heads that a recipe can name, and the preparation of features before them: a new head is one class here."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import ClassVar, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadSettings(Protocol):
    """The settings of a recipe that heads and the preparation read."""

    @property
    def head(self) -> str: ...
    @property
    def hidden(self) -> tuple[int, ...]: ...
    @property
    def dropout(self) -> float: ...
    @property
    def cosine_scale(self) -> float: ...
    @property
    def normalize(self) -> bool: ...


class Head(nn.Module, abc.ABC):
    """A classifier on prepared features ``(B, D)``: hidden layers, if any, and a layer that gives logits ``(B, K)``.

    ``unit_rows`` says that the features must have unit length.
    """

    unit_rows: ClassVar[bool] = False

    @classmethod
    @abc.abstractmethod
    def build(cls, settings: HeadSettings, in_features: int, num_classes: int) -> Head:
        """The untrained head, initialised from torch's global generator."""

    @property
    @abc.abstractmethod
    def class_weight(self) -> Tensor:
        """``(K, width)``: the last layer's row of each class."""

    @abc.abstractmethod
    def classify(self, hidden: Tensor) -> Tensor:
        """Logits ``(B, K)`` of what the last layer reads."""

    def hidden(self, features: Tensor) -> Tensor:
        """What the last layer reads, ``(B, width)``: the features themselves for a head without hidden layers."""
        return features

    def as_linear(self) -> nn.Linear | None:
        """The head as one linear layer with a bias, whose gradients can be written into buffers, or None."""
        return None

    def forward(self, features: Tensor) -> Tensor:
        return self.classify(self.hidden(features))


HeadClass = TypeVar("HeadClass", bound=type[Head])
HEADS: dict[str, type[Head]] = {}


def head(name: str) -> Callable[[HeadClass], HeadClass]:
    """Register a class of heads under the name that recipes use."""

    def register(kind: HeadClass) -> HeadClass:
        HEADS[name] = kind
        return kind

    return register


@head("linear")
class LinearHead(Head, nn.Linear):
    """``W x + b``."""

    @classmethod
    def build(cls, settings: HeadSettings, in_features: int, num_classes: int) -> LinearHead:
        return cls(in_features, num_classes)

    @property
    def class_weight(self) -> Tensor:
        return self.weight

    def classify(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias)

    def as_linear(self) -> nn.Linear:
        return self


@head("cosine")
class CosineHead(Head):
    """``scale * x·w_k / |w_k|``: scaled cosines for rows x of unit length."""

    unit_rows = True

    def __init__(self, in_features: int, num_classes: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.normal_(self.weight, std=in_features**-0.5)

    @classmethod
    def build(cls, settings: HeadSettings, in_features: int, num_classes: int) -> CosineHead:
        return cls(in_features, num_classes, settings.cosine_scale)

    @property
    def class_weight(self) -> Tensor:
        return self.weight

    def classify(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, F.normalize(self.weight, dim=1) * self.scale)


@head("mlp")
class MlpHead(Head, nn.Sequential):
    """Linear, GELU, LayerNorm, dropout for each hidden width, then a linear classifier."""

    @classmethod
    def build(cls, settings: HeadSettings, in_features: int, num_classes: int) -> MlpHead:
        layers: list[nn.Module] = []
        for width in settings.hidden:
            layers += [nn.Linear(in_features, width), nn.GELU(), nn.LayerNorm(width), nn.Dropout(settings.dropout)]
            in_features = width
        return cls(*layers, nn.Linear(in_features, num_classes))

    @property
    def class_weight(self) -> Tensor:
        return cast(nn.Linear, self[-1]).weight

    def hidden(self, features: Tensor) -> Tensor:
        x: Tensor = features
        for layer in list(self)[:-1]:
            x = layer(x)
        return x

    def classify(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self[-1](hidden)
        return logits


class FeatureTransform(nn.Module):
    """``(x - mean) / deviation`` per feature, then optionally rows of unit length, in float32."""

    mean: Tensor
    inverse_deviation: Tensor

    def __init__(self, in_features: int, normalize: bool) -> None:
        super().__init__()
        self.normalize = normalize
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("inverse_deviation", torch.ones(in_features))

    def standardize_by(self, features: Tensor) -> None:
        """Take mean and deviation from these rows; a constant feature is only shifted."""
        mean, square = (torch.zeros_like(self.mean, dtype=torch.float64) for _ in range(2))
        for chunk in features.split(8192):
            mean += chunk.double().sum(0)
        mean /= len(features)
        for chunk in features.split(8192):
            square += (chunk.double() - mean).square().sum(0)
        deviation = (square / len(features)).sqrt()
        self.mean.copy_(mean)
        self.inverse_deviation.copy_(torch.where(deviation > 1e-8 * (1 + mean.abs()), 1 / deviation, 1.0))

    def forward(self, features: Tensor) -> Tensor:
        prepared = (features.float() - self.mean).mul_(self.inverse_deviation)
        return F.normalize(prepared, dim=1) if self.normalize else prepared


def build_head(settings: HeadSettings, in_features: int, num_classes: int) -> Head:
    """The untrained head of a recipe, initialised from torch's global generator."""
    return HEADS[settings.head].build(settings, in_features, num_classes)


def build_transform(settings: HeadSettings, in_features: int) -> FeatureTransform:
    """The preparation of a recipe, not yet fitted; some heads need rows of unit length."""
    return FeatureTransform(in_features, settings.normalize or HEADS[settings.head].unit_rows)
