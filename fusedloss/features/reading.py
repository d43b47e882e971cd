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
LARGEST_CELL = 1 << 27  # characters; the csv module's own limit, 131072, cuts long documents off


def read_inputs(path: Path | str, *, labelled: bool = True, class_names: Sequence[str] | None = None) -> Inputs:
    """Read a list of inputs; the kind follows from the path.

    * a folder: one sub-folder of images per class (with `labelled=False`, any images below the folder);
    * .csv, .tsv (with a header) or .jsonl: columns `path` (an image, relative to the file) or `text`,
      `label`, and optionally `group`;
    * .npz: `images` uint8 `(N, H, W)` or `(N, H, W, 3)`, `labels`, and optionally `groups`, `class_names`,
      `paths`.

    `class_names` fixes the order of the classes (else sorted); a label outside it is refused. With
    `labelled=False` labels are not needed, and those present are ignored. Raises ValueError naming the file
    and the row.
    """
    path = Path(path)
    if path.is_dir():
        return read_folder(path, labelled, class_names)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a folder of images, or a .csv, .tsv, .jsonl or .npz file")
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return read_packed(path, labelled, class_names)
    if suffix in TABLE_SUFFIXES or suffix == ".jsonl":
        return read_table(path, labelled, class_names)
    if suffix in IMAGE_SUFFIXES and not labelled:
        return image_inputs([path], [path.name], None, None, None)
    raise ValueError(f"{path} is not a kind of input: give a folder of images, or a .csv, .tsv, .jsonl or .npz file")


def read_folder(folder: Path, labelled: bool, class_names: Sequence[str] | None) -> Inputs:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    names = [file.relative_to(folder).as_posix() for file in files]
    if not labelled:
        return image_inputs(files, names, None, None, None)
    loose = [name for name in names if "/" not in name]
    if loose:
        raise ValueError(f"{folder} must hold one folder per class; {len(loose)} images lie beside them ({loose[0]})")
    labels, classes = encode_labels([name.split("/")[0] for name in names], class_names, folder)
    return image_inputs(files, names, labels, None, classes)


def read_table(file: Path, labelled: bool, class_names: Sequence[str] | None) -> Inputs:
    rows = list(read_jsonl(file) if file.suffix.lower() == ".jsonl" else read_delimited(file))
    if not rows:
        raise ValueError(f"{file} has no rows")
    columns = set(rows[0][1])
    if len(columns & {"path", "text"}) != 1:
        raise ValueError(f"{file} must have a column 'path' (images) or 'text', not both; it has {sorted(columns)}")
    if labelled and "label" not in columns:
        raise ValueError(f"{file} must have a column 'label'; it has {sorted(columns)}")

    def column(name: str) -> list[str]:
        for number, row in rows:
            if row.get(name) is None or (name != "text" and row[name] == ""):
                raise ValueError(f"{file}, line {number}: no value for '{name}'")
        return [str(row[name]) for _, row in rows]

    labels, classes = encode_labels(column("label"), class_names, file) if labelled else (None, None)
    groups = encode_groups(column("group")) if "group" in columns else None
    if "path" in columns:
        names = column("path")
        files = [file.parent / name for name in names]
        missing = [str(image) for image in files if not image.is_file()]
        if missing:
            raise ValueError(f"{file}: {len(missing)} of {len(files)} images do not exist, the first is {missing[0]}")
        return image_inputs(files, names, labels, groups, classes)
    texts = column("text")
    names = [f"{file.name}:{number}" for number, _ in rows]
    return Inputs("text", Texts(texts), names, labels, groups, classes, sha256_of_list("text", texts))


def read_delimited(file: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(LARGEST_CELL)
    with open(file, newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream, delimiter=TABLE_SUFFIXES[file.suffix.lower()])
        try:
            for row in reader:
                if None in row:
                    raise ValueError(f"{file}, line {reader.line_num}: more values than the header has columns")
                yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{file}, after line {reader.line_num}: {error}") from error


def read_jsonl(file: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    with open(file, encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number} must be an object with 'path' or 'text', and 'label'")
            yield number, row


def read_packed(file: Path, labelled: bool, class_names: Sequence[str] | None) -> Inputs:
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
        found = f"{images.dtype} {images.shape}" if images is not None else f"only {sorted(arrays)}"
        raise ValueError(f"{file} must hold 'images', uint8 (N, H, W) or (N, H, W, 3); it holds {found}")
    if labelled and "labels" not in arrays:
        raise ValueError(f"{file} must hold 'labels'; it holds {sorted(arrays)}")
    names = (
        [str(name) for name in arrays["paths"]]
        if "paths" in arrays
        else [f"{file.name}:{row}" for row in range(len(images))]
    )
    if len(names) != len(images):
        raise ValueError(f"{file}: 'paths' has {len(names)} entries for {len(images)} images")
    labels, classes = packed_labels(file, arrays, class_names) if labelled else (None, None)
    groups = checks.integer_vector(f"{file}: groups", arrays["groups"], len(images)) if "groups" in arrays else None
    digest = hashlib.sha256(f"{images.shape}".encode() + np.ascontiguousarray(images).data).hexdigest()
    return Inputs("image", PackedImages(images), names, labels, groups, classes, digest)


def packed_labels(
    file: Path, arrays: dict[str, np.ndarray], class_names: Sequence[str] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
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
