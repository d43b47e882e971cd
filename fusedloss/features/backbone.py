"""Backbones: a frozen network with its preprocessing, named `timm:NAME` or `hf:NAME`."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fusedloss.features.manifest import FeatureSource

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
INSTALL_HINT = "pip install 'fusedloss[features]'"


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


def load_backbone(
    name: str,
    *,
    weights: Path | str | None = None,
    pooling: str | None = None,
    image_size: int | None = None,
    crop: float | None = None,
    max_length: int | None = None,
    precision: str = "float32",
    normalize: bool = False,
    device: str = "auto",
) -> Backbone:
    """Load `timm:NAME` (images) or `hf:NAME` (images or text; NAME may be a folder) with its weights.

    * `weights`: a local .safetensors or .pth file; None takes the pretrained ones, from the hub or its
      local cache.
    * `pooling`: timm gives what its classifier reads ("pre_logits"); hf "cls" or "mean" (default: cls for
      images where the network has such a token, else mean).
    * `image_size` in pixels and `crop`, the share of the edge kept by the centre crop: timm; default the
      network's own.
    * `max_length` in tokens: text; default the network's own, at most 512.
    * `precision`: "float32", or autocast to "bfloat16" or "float16".

    Raises ValueError for a name or option that does not exist or weights that do not fit, and ImportError
    with the command that installs what is missing.
    """
    library, _, architecture = name.partition(":")
    if library not in ("timm", "hf") or not architecture:
        raise ValueError(f"backbone must be timm:NAME or hf:NAME; got {name!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    for option, value in (("image_size", image_size), ("max_length", max_length)):
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1; got {value}")
    if crop is not None and not 0 < crop <= 1:
        raise ValueError(f"crop must lie in (0, 1]; got {crop}")
    where = choose_device(device)
    file = None if weights is None else Path(weights)
    if library == "timm":
        from fusedloss.features.timm_backbone import load_timm

        if pooling not in (None, "pre_logits") or max_length is not None:
            raise ValueError("timm backbones have pooling 'pre_logits' and no max_length")
        return load_timm(architecture, file, image_size, crop, precision, normalize, where)
    from fusedloss.features.transformers_backbone import load_transformers

    if image_size is not None or crop is not None:
        raise ValueError("image_size and crop are for timm backbones; hf image networks use their own processor")
    return load_transformers(architecture, file, pooling, max_length, precision, normalize, where)


def backbone_of(source: FeatureSource, *, weights: Path | str | None = None, device: str = "auto") -> Backbone:
    """The backbone that features were computed with; ValueError when it is not the same any more.

    `weights` is needed where the file has moved since.
    """
    if source.backbone is None:
        raise ValueError("these features were brought by the user: no backbone is known that could compute new ones")
    if weights is None and source.weights != "pretrained":
        weights = source.weights
    backbone = load_backbone(
        source.backbone,
        weights=weights,
        pooling=source.pooling,
        image_size=source.image_size,
        crop=source.crop,
        max_length=source.max_length,
        precision=source.precision,
        normalize=source.normalized,
        device=device,
    )
    differences = backbone.source.differences(source)
    if differences:
        raise ValueError(f"{source.backbone} is not the backbone of the features any more: {'; '.join(differences)}")
    return backbone


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch sees no GPU")
    return device


def explain_missing(library: str, error: Exception) -> ImportError:
    """timm raises RuntimeError, not ImportError, where torchvision does not match torch."""
    return ImportError(f"this backbone needs {library}, which cannot be imported ({error}): {INSTALL_HINT}")
