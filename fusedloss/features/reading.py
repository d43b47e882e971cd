"""Reading inputs from where people have them: class folders, tables of images or texts, and packed images."""

from __future__ import annotations

import csv
import hashlib
import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusedloss.features import checks
from fusedloss.features.inputs import (
    Inputs,
    PackedImages,
    Texts,
    encode_groups,
    encode_labels,
    image_inputs,
    sha256_of_list,
)

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
# Characters; the csv module's own limit, 131072, is too small for long documents.
LARGEST_CELL = 1 << 27
FORMS = "a folder of images, or a .csv, .tsv, .jsonl or .npz file"


def read_inputs(path: Path | str, *, labelled: bool = True, class_names: Sequence[str] | None = None) -> Inputs:
    """Read a list of inputs; the kind follows from the path.

    * a folder: one sub-folder of images per class (with `labelled=False`, any images below the folder);
    * .csv, .tsv (with a header) or .jsonl: columns `path` (an image, relative to the file) or `text`,
      `label`, and optionally `group`;
    * .npz: `images` uint8 `(N, H, W)` or `(N, H, W, 3)`, `labels`, and optionally `groups`, `class_names`,
      `paths`.

    Args:
        path: the folder or the file.
        labelled: False where labels are not needed; those present are ignored.
        class_names: fixes the order of the classes (else sorted); a label outside it is refused.

    Raises:
        ValueError: what cannot be read, naming the file and the row.
        TypeError: arguments of another kind.

    Example:
        >>> read_inputs("photos.parquet")
        Traceback (most recent call last):
        ...
        ValueError: path must be a folder of images, or a .csv, .tsv, .jsonl or .npz file; got photos.parquet, \
which does not exist
    """
    path = checks.as_path("path", path)
    if class_names is not None:
        class_names = checks.as_names("class_names", class_names)
    if path.is_dir():
        return read_folder(path, labelled, class_names)
    if not path.is_file():
        raise ValueError(f"path must be {FORMS}; got {path}, which does not exist")
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return read_packed(path, labelled, class_names)
    if suffix in TABLE_SUFFIXES or suffix == ".jsonl":
        return read_table(path, labelled, class_names)
    if suffix in IMAGE_SUFFIXES and not labelled:
        return image_inputs([path], [path.name], None, None, None)
    raise ValueError(f"path must be {FORMS}; got {path}")


def read_folder(folder: Path, labelled: bool, class_names: Sequence[str] | None) -> Inputs:
    """Images below a folder, which are in one folder per class where labels are needed."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"{folder} must hold images ({', '.join(sorted(IMAGE_SUFFIXES))}); got none")
    names = [file.relative_to(folder).as_posix() for file in files]
    if not labelled:
        return image_inputs(files, names, None, None, None)
    loose = [name for name in names if "/" not in name]
    if loose:
        raise ValueError(f"{folder} must hold one folder per class; got {len(loose)} images in none ({loose[0]})")
    labels, classes = encode_labels([name.split("/")[0] for name in names], class_names, folder)
    return image_inputs(files, names, labels, None, classes)


def read_table(file: Path, labelled: bool, class_names: Sequence[str] | None) -> Inputs:
    """Images or texts listed in a table."""
    rows = list(read_jsonl(file) if file.suffix.lower() == ".jsonl" else read_delimited(file))
    if not rows:
        raise ValueError(f"{file} must have rows; got none")
    columns = set(rows[0][1])
    if len(columns & {"path", "text"}) != 1:
        raise ValueError(f"{file} must have a column 'path' (images) or 'text', not both; got {sorted(columns)}")
    if labelled and "label" not in columns:
        raise ValueError(f"{file} must have a column 'label'; got {sorted(columns)}")

    def column(name: str) -> list[str]:
        for number, row in rows:
            if row.get(name) is None or (name != "text" and row[name] == ""):
                raise ValueError(f"{file} must have a value for '{name}' in every row; got none in line {number}")
        return [str(row[name]) for _, row in rows]

    labels, classes = encode_labels(column("label"), class_names, file) if labelled else (None, None)
    groups = encode_groups(column("group")) if "group" in columns else None
    if "path" in columns:
        names = column("path")
        files = [file.parent / name for name in names]
        missing = [str(image) for image in files if not image.is_file()]
        if missing:
            gone = f"{len(missing)} of {len(files)} images do not exist, the first is {missing[0]}"
            raise ValueError(f"{file} must list images that exist; {gone}")
        return image_inputs(files, names, labels, groups, classes)
    texts = column("text")
    names = [f"{file.name}:{number}" for number, _ in rows]
    return Inputs("text", Texts(texts), names, labels, groups, classes, sha256_of_list("text", texts))


def read_delimited(file: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """Line numbers and rows of a .csv or .tsv file."""
    csv.field_size_limit(LARGEST_CELL)
    with open(file, newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream, delimiter=TABLE_SUFFIXES[file.suffix.lower()])
        try:
            for row in reader:
                if None in row:
                    raise ValueError(
                        f"{file} must have one value per column; got more in line {reader.line_num} than the header has"
                    )
                yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{file} cannot be read after line {reader.line_num}: {error}") from error


def read_jsonl(file: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """Line numbers and rows of a .jsonl file."""
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                raise ValueError(f"{file}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{file}, line {number} must be an object with 'path' or 'text', and 'label'; "
                    f"got {type(row).__name__}"
                )
            yield number, row


def read_packed(file: Path, labelled: bool, class_names: Sequence[str] | None) -> Inputs:
    """Images packed in a .npz file."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} cannot be read as .npz: {error}") from error
    images = arrays.get("images")
    if (
        images is None
        or images.dtype != np.uint8
        or not (images.ndim == 3 or images.shape[3:] == (3,))
        or not len(images)
    ):
        got = f"{images.dtype} {images.shape}" if images is not None else f"only {sorted(arrays)}"
        raise ValueError(f"{file} must hold 'images', uint8 (N, H, W) or (N, H, W, 3); got {got}")
    if labelled and "labels" not in arrays:
        raise ValueError(f"{file} must hold 'labels'; got {sorted(arrays)}")
    names = (
        [str(name) for name in arrays["paths"]]
        if "paths" in arrays
        else [f"{file.name}:{row}" for row in range(len(images))]
    )
    if len(names) != len(images):
        raise ValueError(f"{file} must hold as many 'paths' as images, {len(images)}; got {len(names)}")
    labels, classes = packed_labels(file, arrays, class_names) if labelled else (None, None)
    groups = checks.integer_vector(f"{file}: groups", arrays["groups"], len(images)) if "groups" in arrays else None
    digest = hashlib.sha256(f"{images.shape}".encode() + np.ascontiguousarray(images).data).hexdigest()
    return Inputs("image", PackedImages(images), names, labels, groups, classes, digest)


def packed_labels(
    file: Path, arrays: dict[str, np.ndarray], class_names: Sequence[str] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels of packed images, and the names of their classes."""
    labels = checks.integer_vector(f"{file}: labels", arrays["labels"], len(arrays["images"]))
    names = (
        [str(name) for name in arrays["class_names"]]
        if "class_names" in arrays
        else list(map(str, range(labels.max() + 1)))
    )
    checks.check_labels(labels, len(names))
    if class_names is None:
        return labels, tuple(names)
    return encode_labels([names[label] for label in labels], class_names, file)
