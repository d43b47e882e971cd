"""What a feature bank says about itself: sizes, where the features come from, and a hash of every file."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
DTYPES = ("float16", "float32")


class BankError(ValueError):
    """A folder or a set of arrays that is not a usable feature bank."""


class IncompleteBankError(BankError):
    """A bank whose extraction has not ended; the message says how to go on with it."""


@dataclass(frozen=True)
class FeatureSource:
    """How features were computed; two banks can be mixed only when everything here but `weights` is equal.

    Every field is None for arrays that a user brought, unless the user names the backbone.
    """

    # "timm:NAME" or "hf:NAME"
    backbone: str | None = None
    # The file, or "pretrained"
    weights: str | None = None
    # Of the loaded tensors, in order, so that it is the same for .pth and .safetensors
    weights_sha256: str | None = None
    # "pre_logits", "cls" or "mean"
    pooling: str | None = None
    # Preprocessing, in words
    transform: str | None = None
    # Pixels
    image_size: int | None = None
    # Share of the resized image's edge that the centre crop keeps
    crop: float | None = None
    # Tokens
    max_length: int | None = None
    # Of the backbone's arithmetic: "float32", "bfloat16" or "float16" (autocast)
    precision: str = "float32"
    # Rows have L2 norm one
    normalized: bool = False

    def differences(self, other: FeatureSource) -> list[str]:
        """What differs, in words; where the weights were read from does not count, their hash does."""
        return [
            f"{item.name} is {getattr(self, item.name)!r}, not {getattr(other, item.name)!r}"
            for item in dataclasses.fields(self)
            if item.name != "weights" and getattr(self, item.name) != getattr(other, item.name)
        ]


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json."""

    num_rows: int
    in_features: int
    num_classes: int
    dtype: str
    source: FeatureSource = FeatureSource()
    # Of the list of inputs that the rows were computed from
    inputs_sha256: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    # UTC, ISO 8601
    created: str = ""
    # Name to sha256.
    files: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder; BankError names the file and what is wrong with it."""
        file = folder / MANIFEST_FILE
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BankError(f"{file} cannot be read: {error}") from error
        return cls.from_json(text, file)

    @classmethod
    def from_json(cls, text: str, origin: Path) -> Manifest:
        """Parse a manifest; BankError names the file and what is wrong with it."""
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise BankError(f"{origin} is not valid JSON: {error}") from error
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise BankError(
                f"{origin} must have schema_version {SCHEMA_VERSION} for this version of fusedloss; got {version!r}"
            )
        try:
            manifest = cls(**{**content, "source": FeatureSource(**content["source"])})
            if not isinstance(manifest.files, dict):
                raise ValueError(f"files must map names to hashes; got {type(manifest.files).__name__}")
            sizes = (manifest.num_rows, manifest.in_features, manifest.num_classes)
            if not all(isinstance(size, int) and size > 0 for size in sizes) or manifest.dtype not in DTYPES:
                raise ValueError(
                    f"sizes must be positive integers and dtype one of {', '.join(DTYPES)}; "
                    f"got {sizes} and {manifest.dtype!r}"
                )
        except (KeyError, TypeError, ValueError) as error:
            raise BankError(f"{origin} is not a feature-bank manifest: {error}") from error
        return manifest


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that features depend on."""
    versions = {"python": platform.python_version()}
    for name in ("fusedloss", "numpy", "torch", "timm", "transformers", "pillow"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
