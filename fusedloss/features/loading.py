"""Loading a backbone by its name, `timm:NAME` or `hf:NAME`."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from pathlib import Path

from fusedloss.features import checks
from fusedloss.features.backbone import PRECISIONS, Backbone, BackboneOptions
from fusedloss.features.device import choose_device
from fusedloss.features.manifest import FeatureSource
from fusedloss.features.timm_backbone import load_timm
from fusedloss.features.transformers_backbone import load_transformers

# A library of backbones is one entry: what stands before the colon of a name, and the function that loads the rest.
LOADERS: dict[str, Callable[[str, BackboneOptions], Backbone]] = {"timm": load_timm, "hf": load_transformers}


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

    Args:
        name: the library and the network's name in it.
        weights: a local .safetensors or .pth file; None takes the pretrained ones, from the hub or its local cache.
        pooling: timm gives what its classifier reads (``"pre_logits"``); hf ``"cls"`` or ``"mean"`` (default: cls
            for images where the network has such a token, else mean).
        image_size: edge in pixels (timm; default the network's own).
        crop: share of the edge kept by the centre crop, in ``(0, 1]`` (timm; default the network's own).
        max_length: tokens (text; default the network's own, at most 512).
        precision: ``"float32"``, or autocast to ``"bfloat16"`` or ``"float16"``.
        normalize: scale every row of features to L2 norm one.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...

    Raises:
        ValueError, TypeError: a name or an option that does not exist, or weights that do not fit.
        ImportError: a missing library, with the command that installs it.

    Example:
        >>> load_backbone("vgg16")
        Traceback (most recent call last):
        ...
        ValueError: backbone must be timm:NAME or hf:NAME; got 'vgg16'
    """
    checks.check_instance("backbone", name, str, "timm:NAME or hf:NAME")
    library, _, architecture = name.partition(":")
    if library not in LOADERS or not architecture:
        raise ValueError(f"backbone must be timm:NAME or hf:NAME; got {name!r}")
    checks.check_choice("precision", precision, tuple(PRECISIONS))
    if pooling is not None:
        checks.check_instance("pooling", pooling, str, "a string or None")
    if crop is not None and not (isinstance(crop, Real) and 0 < crop <= 1):
        raise ValueError(f"crop must be in (0, 1]; got {checks.described(crop)}")
    options = BackboneOptions(
        weights=None if weights is None else checks.as_path("weights", weights),
        pooling=pooling,
        image_size=None if image_size is None else checks.as_integer("image_size", image_size, 1),
        crop=crop,
        max_length=None if max_length is None else checks.as_integer("max_length", max_length, 1),
        precision=precision,
        normalize=bool(normalize),
        device=choose_device(device),
    )
    return LOADERS[library](architecture, options)


def backbone_of(source: FeatureSource, *, weights: Path | str | None = None, device: str = "auto") -> Backbone:
    """The backbone that features were computed with; ValueError when it is not the same any more.

    `weights` is needed where the file has moved since.
    """
    checks.check_instance("source", source, FeatureSource, "a FeatureSource")
    if source.backbone is None:
        raise ValueError(
            "source must name a backbone to compute new features with; got that of arrays brought by the user: "
            "no backbone is known"
        )
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
        raise ValueError(f"source must describe {source.backbone} as it is now; got another: {'; '.join(differences)}")
    return backbone
