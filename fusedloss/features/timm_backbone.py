"""Image backbones of timm."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedloss.features.backbone import Backbone, BackboneOptions, explain_missing
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


def load_timm(architecture: str, options: BackboneOptions) -> TimmBackbone:
    """The network of timm with this name; errors as `load_backbone`."""
    if options.pooling not in (None, "pre_logits"):
        raise ValueError(f"pooling must be pre_logits for timm backbones; got {options.pooling!r}")
    if options.max_length is not None:
        raise ValueError(f"max_length must be None for timm backbones; got {options.max_length}")
    try:
        import timm
        import timm.data
    except (ImportError, RuntimeError) as error:
        raise explain_missing("timm", error) from error
    if not timm.is_model(architecture.split(".")[0]):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f" (close: {', '.join(close)})" if close else ""
        raise ValueError(f"backbone must be a model of timm; got {architecture!r}{hint}")
    model = create_model(timm, architecture, options.weights)
    classifier = model.pretrained_cfg.get("classifier") or ()
    unused = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    if options.weights is not None:
        load_weights(model, options.weights, unused)
    digest = sha256_of_weights(model, unused)
    config, transform = preprocessing(timm, model, architecture, options)
    source = FeatureSource(
        backbone=f"timm:{architecture}",
        weights=options.weights_origin(),
        weights_sha256=digest,
        pooling="pre_logits",
        transform=" ".join(str(transform).split()),
        image_size=config["input_size"][-1],
        crop=config["crop_pct"],
        precision=options.precision,
        normalized=options.normalize,
    )
    return TimmBackbone(model, transform, source, options.device)


def preprocessing(timm: Any, model: Any, architecture: str, options: BackboneOptions) -> tuple[dict[str, Any], Any]:
    """The network's data configuration, changed by the options, and the transform that it stands for."""
    config: dict[str, Any] = timm.data.resolve_model_data_config(model)
    if options.image_size is not None and options.image_size != config["input_size"][-1]:
        resize_input(model, architecture, options.image_size)
        config["input_size"] = (3, options.image_size, options.image_size)
    if options.crop is not None:
        config["crop_pct"] = options.crop
    return config, timm.data.create_transform(**config, is_training=False)


def create_model(timm: Any, architecture: str, weights: Path | None) -> Any:
    """The network, pretrained unless a file of weights is given."""
    try:
        return timm.create_model(architecture, pretrained=weights is None)
    # The hub client raises errors of several libraries.
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        hint = "" if weights else "; a local file can be given as weights"
        raise ValueError(f"timm:{architecture} cannot be loaded{hint} ({reason})") from error


def resize_input(model: Any, architecture: str, image_size: int) -> None:
    """Networks with position embeddings must be told; convolutions take any size."""
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(image_size, image_size))
    elif model.pretrained_cfg.get("fixed_input_size"):
        own = model.pretrained_cfg["input_size"][-1]
        raise ValueError(f"image_size must be {own}, the only one of timm:{architecture}; got {image_size}")
