"""Image backbones of timm."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedloss.features.backbone import Backbone, explain_missing
from fusedloss.features.manifest import FeatureSource
from fusedloss.features.weights import load_weights, sha256_of_weights

if TYPE_CHECKING:
    from PIL.Image import Image


class TimmBackbone(Backbone):
    """The features that the network's own classifier reads."""

    def __init__(self, model: Any, transform: Any, source: FeatureSource, device: torch.device) -> None:
        self.transform = transform
        super().__init__(model, source, device)

    def prepare(self, item: Image) -> Tensor:
        tensor: Tensor = self.transform(item)
        return tensor

    def example(self) -> Tensor:
        from PIL import Image

        edge = self.source.image_size or 224
        return self.prepare(Image.new("RGB", (edge, edge)))[None]

    def forward(self, batch: Tensor) -> Tensor:
        features: Tensor = self.model.forward_head(self.model.forward_features(batch), pre_logits=True)
        return features


def load_timm(
    architecture: str,
    weights: Path | None,
    image_size: int | None,
    crop: float | None,
    precision: str,
    normalize: bool,
    device: torch.device,
) -> TimmBackbone:
    try:
        import timm
        from timm.data import create_transform, resolve_model_data_config
    except (ImportError, RuntimeError) as error:
        raise explain_missing("timm", error) from error
    if not timm.is_model(architecture.split(".")[0]):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        raise ValueError(f"timm has no model {architecture!r}" + (f"; close: {', '.join(close)}" if close else ""))
    model = create_model(timm, architecture, weights)
    classifier = model.pretrained_cfg.get("classifier") or ()
    unused = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    if weights is not None:
        load_weights(model, weights, unused)
    digest = sha256_of_weights(model, unused)
    config = resolve_model_data_config(model)
    if image_size is not None and image_size != config["input_size"][-1]:
        resize_input(model, architecture, image_size)
        config["input_size"] = (3, image_size, image_size)
    if crop is not None:
        config["crop_pct"] = crop
    transform = create_transform(**config, is_training=False)
    source = FeatureSource(
        backbone=f"timm:{architecture}",
        weights="pretrained" if weights is None else str(weights.resolve()),
        weights_sha256=digest,
        pooling="pre_logits",
        transform=" ".join(str(transform).split()),
        image_size=config["input_size"][-1],
        crop=config["crop_pct"],
        precision=precision,
        normalized=normalize,
    )
    return TimmBackbone(model, transform, source, device)


def create_model(timm: Any, architecture: str, weights: Path | None) -> Any:
    try:
        return timm.create_model(architecture, pretrained=weights is None)
    except Exception as error:  # the hub client raises errors of several libraries
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        hint = "" if weights else "; a local file can be given as weights"
        raise ValueError(f"timm:{architecture} cannot be loaded{hint} ({reason})") from error


def resize_input(model: Any, architecture: str, image_size: int) -> None:
    """Networks with position embeddings must be told; convolutions take any size."""
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(image_size, image_size))
    elif model.pretrained_cfg.get("fixed_input_size"):
        raise ValueError(f"timm:{architecture} takes only its own image size, {model.pretrained_cfg['input_size'][-1]}")
