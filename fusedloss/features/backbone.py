"""What a backbone is: a frozen network with its preprocessing."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fusedloss.features.manifest import FeatureSource

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
INSTALL_HINT = "pip install 'fusedloss[features]'"


@dataclass(frozen=True)
class BackboneOptions:
    """How a backbone is to compute features; None is the network's own choice. See `load_backbone`."""

    weights: Path | None
    pooling: str | None
    image_size: int | None
    crop: float | None
    max_length: int | None
    precision: str
    normalize: bool
    device: torch.device

    def weights_origin(self) -> str:
        """What a bank records about where the weights were read from."""
        return "pretrained" if self.weights is None else str(self.weights.resolve())


class Backbone(abc.ABC):
    """A frozen network: `prepare` turns an input into what `collate` batches, `compute` gives `(B, D)`.

    `source` says how the features come about; it is what a bank records and what predictions are checked
    against.
    """

    kind: Literal["image", "text"] = "image"

    def __init__(self, model: nn.Module, source: FeatureSource, device: torch.device) -> None:
        self.model: Any = model.eval().requires_grad_(False).to(device)
        self.source = source
        self.device = device
        self.in_features = int(self.compute(self.example()).shape[1])

    @abc.abstractmethod
    def prepare(self, item: Any) -> Any:
        """One input as `collate` takes it."""

    def collate(self, items: Sequence[Any]) -> Any:
        """A batch of prepared inputs."""
        return torch.stack(list(items))

    @abc.abstractmethod
    def example(self) -> Any:
        """A batch of one made-up input, to learn the width of the features."""

    @abc.abstractmethod
    def forward(self, batch: Any) -> Tensor:
        """Features `(B, D)` of a batch, before any normalisation."""

    @torch.inference_mode()
    def compute(self, batch: Any) -> Tensor:
        """Features `(B, D)` of a batch, float32 on the CPU."""
        dtype = PRECISIONS[self.source.precision]
        autocast = torch.autocast(self.device.type, dtype=dtype) if dtype else contextlib.nullcontext()
        with autocast, torch.backends.cudnn.flags(deterministic=True):
            features = self.forward(batch.to(self.device)).float()
        if self.source.normalized:
            features = nn.functional.normalize(features, dim=1)
        return features.cpu()


def explain_missing(library: str, error: Exception) -> ImportError:
    """The error that names the command which installs a library.

    timm raises RuntimeError, not ImportError, where torchvision does not match torch.
    """
    return ImportError(f"this backbone needs {library}, which cannot be imported ({error}): {INSTALL_HINT}")
