"""What features are computed from: lists of images or texts, with their labels and groups as numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Inputs:
    """A list of images or texts: `load(row)` gives one, `paths` names them in messages and predictions.

    `sha256` identifies the list: which inputs, in which order.
    """

    kind: Literal["image", "text"]
    load: Callable[[int], Any]
    paths: list[str]
    labels: np.ndarray | None
    groups: np.ndarray | None
    class_names: tuple[str, ...] | None
    sha256: str

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class ImageFiles:
    """Images that are opened when they are loaded."""

    files: list[Path]

    def __call__(self, row: int) -> Image:
        from PIL import Image

        try:
            with Image.open(self.files[row]) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"row {row}: {self.files[row]} cannot be read as an image: {error}") from error


@dataclass(frozen=True)
class PackedImages:
    """Images in one uint8 array, `(N, H, W)` grey or `(N, H, W, 3)` colour."""

    images: np.ndarray

    def __call__(self, row: int) -> Image:
        from PIL import Image

        return Image.fromarray(self.images[row]).convert("RGB")


@dataclass(frozen=True)
class Texts:
    """Texts in memory."""

    texts: list[str]

    def __call__(self, row: int) -> str:
        return self.texts[row]


def image_inputs(
    files: list[Path],
    names: list[str],
    labels: np.ndarray | None,
    groups: np.ndarray | None,
    class_names: tuple[str, ...] | None,
) -> Inputs:
    """Inputs from image files; names and sizes identify them: reading every image twice would double the time."""
    entries = [f"{name}\0{file.stat().st_size}" for name, file in zip(names, files, strict=True)]
    return Inputs("image", ImageFiles(files), names, labels, groups, class_names, sha256_of_list("image", entries))


def encode_labels(
    values: list[str], class_names: Sequence[str] | None, origin: Path
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as numbers; classes in the order of `class_names`, else numbers by value and names alphabetically."""
    if class_names is not None and len(set(class_names)) < len(class_names):
        raise ValueError(f"class_names must differ; got {max(class_names, key=list(class_names).count)!r} twice")
    if class_names is None:
        distinct = set(values)
        numeric = all(value.lstrip("-").isdecimal() for value in distinct)
        class_names = sorted(distinct, key=lambda value: (int(value), value)) if numeric else sorted(distinct)
    number = {str(name): index for index, name in enumerate(class_names)}
    unknown = sorted(set(values) - set(number))
    if unknown:
        raise ValueError(
            f"labels must be among the {len(number)} class_names; got {len(unknown)} in {origin} that are not, "
            f"for example {unknown[0]!r}"
        )
    return np.array([number[value] for value in values], np.int64), tuple(map(str, class_names))


def encode_groups(values: list[str]) -> np.ndarray:
    """Groups as numbers: themselves where all are integers, else their rank in alphabetical order."""
    try:
        return np.array([int(value) for value in values], np.int64)
    except (ValueError, OverflowError):
        return np.unique(np.array(values), return_inverse=True)[1].astype(np.int64)


def sha256_of_list(kind: str, entries: list[str]) -> str:
    """The sha256 that identifies a list of inputs."""
    return hashlib.sha256(json.dumps([kind, entries]).encode()).hexdigest()
