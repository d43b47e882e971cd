"""A feature bank from the files that people already have: .npy, .npz, .csv, .pt, .safetensors."""

from __future__ import annotations

import csv
import gzip
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusedloss.features import checks
from fusedloss.features.bank import FeatureBank
from fusedloss.features.checks import as_numpy
from fusedloss.features.inputs import encode_groups, encode_labels
from fusedloss.features.manifest import DTYPES, BankError, FeatureSource

KINDS = ".npy, .npz, .csv, .csv.gz, .pt, .pth or .safetensors"
ARRAY_NAMES = {"features", "labels", "groups"}
COLUMN_NAMES = {"label": "labels", "group": "groups"}


def bank_from_files(
    features: Path,
    labels: Path | None = None,
    groups: Path | None = None,
    *,
    class_names: Sequence[str] | None = None,
    backbone: str | None = None,
    dtype: str | None = None,
) -> FeatureBank:
    """A bank in memory from one file that holds everything, or from one file per array.

    Integer labels are class numbers; names are numbered in the order of `class_names`, else alphabetically.

    Raises:
        ValueError: anything missing, ragged or unreadable, naming the file.
    """
    if dtype is not None:
        checks.check_choice("dtype", dtype, DTYPES)
    arrays = collect_arrays(features, labels, groups)
    label_array = np.asarray(arrays["labels"])
    if class_names is None and "class_names" in arrays:
        class_names = [str(name) for name in arrays["class_names"]]
    if label_array.dtype.kind in "US":
        label_array, class_names = encode_labels(label_array.astype(str).tolist(), class_names, labels or features)
    group_array = arrays.get("groups")
    if group_array is not None and group_array.dtype.kind in "US":
        group_array = encode_groups(group_array.astype(str).tolist())
    array = arrays["features"]
    if dtype is not None and array.ndim == 2:
        array = convert(array, dtype)
    return FeatureBank.from_arrays(
        array, label_array, groups=group_array, class_names=class_names, paths=arrays.get("paths"),
        source=FeatureSource(backbone=backbone),
    )  # fmt: skip


def collect_arrays(features: Path, labels: Path | None, groups: Path | None) -> dict[str, Any]:
    """The arrays of all files by name, features and labels among them."""
    arrays = read_arrays(features, "features")
    for name, file in (("labels", labels), ("groups", groups)):
        if file is not None:
            content = read_arrays(file, name)
            if name not in content:
                raise ValueError(f"{file} must hold one array, or one called {name}; got {sorted(content)}")
            arrays[name] = content[name]
    for name in ("features", "labels"):
        if name not in arrays:
            raise ValueError(
                f"{name} must be in {features}, or in a file of their own (--{name}); got {sorted(arrays)}"
            )
    return arrays


def convert(array: np.ndarray, dtype: str) -> np.ndarray:
    """The array in another dtype; BankError for rows that overflow it."""
    if array.dtype.kind not in "fiu":
        raise BankError(f"features must be real numbers; got {array.dtype}")
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    overflowed = np.isfinite(array).all(axis=1) & ~np.isfinite(converted).all(axis=1)
    if overflowed.any():
        largest = np.finfo(dtype).max
        raise BankError(
            f"features must be at most {largest:g} in size to be stored in {dtype} (use --dtype float32); "
            f"got {overflowed.sum()} rows that overflow it, the first is row {overflowed.argmax()}"
        )
    return converted


def read_arrays(file: Path, single: str) -> dict[str, Any]:
    """The arrays of a file by name; `single` names the array of a file that holds only one."""
    if not file.is_file():
        raise ValueError(f"{single} must be in a file: {KINDS}; got {file}, which does not exist")
    name = file.name.lower()
    if name.endswith((".csv", ".csv.gz")):
        return table_columns(file, *read_csv(file), single)
    readers = {
        ".npy": read_npy,
        ".npz": read_npz,
        ".pt": read_torch,
        ".pth": read_torch,
        ".safetensors": read_safetensors,
    }
    if file.suffix.lower() not in readers:
        raise ValueError(f"{single} must be in a file: {KINDS}; got {file}")
    try:
        arrays = readers[file.suffix.lower()](file)
    except (
        OSError,
        EOFError,
        ValueError,
        TypeError,
        RuntimeError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    # A single array is what the file was named for, whatever the file calls it.
    return {single: next(iter(arrays.values()))} if len(arrays) == 1 and not ARRAY_NAMES & set(arrays) else arrays


def read_npy(file: Path) -> dict[str, Any]:
    """The array of a .npy file, under an empty name."""
    with open(file, "rb") as stream:
        return {"": np.lib.format.read_array(stream, allow_pickle=False)}


def read_npz(file: Path) -> dict[str, Any]:
    """The arrays of a .npz file."""
    with np.load(file, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def read_torch(file: Path) -> dict[str, Any]:
    """What torch.save wrote: one array, or a dict of arrays among other things."""
    content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        return {"": as_numpy(content, "content")}
    kinds = (torch.Tensor, np.ndarray, list, tuple)
    return {str(name): as_numpy(value, str(name)) for name, value in content.items() if isinstance(value, kinds)}


def read_safetensors(file: Path) -> dict[str, Any]:
    """The tensors of a .safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: as_numpy(tensor) for name, tensor in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def read_csv(file: Path) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table, which must have as many values each."""
    rows: list[list[str]] = []
    try:
        with (gzip.open if file.suffix.lower() == ".gz" else open)(
            file, "rt", encoding="utf-8-sig", newline=""
        ) as stream:
            reader = csv.reader(stream)
            header = next(reader, [])
            for row in reader:
                if len(row) != len(header):
                    raise csv.Error(f"line {reader.line_num}: {len(row)} values, the header has {len(header)}")
                rows.append(row)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not rows:
        raise ValueError(f"{file} must have rows below its header; got none")
    return header, rows


def table_columns(file: Path, header: list[str], rows: list[list[str]], single: str) -> dict[str, Any]:
    """Columns label and group, every other one a feature; or the one column of a file of labels or groups."""
    if single != "features" and len(header) == 1:
        return {single: text_or_integers([row[0] for row in rows])}
    columns: dict[str, Any] = {}
    for name, plural in COLUMN_NAMES.items():
        if name in header:
            position = header.index(name)
            columns[plural] = text_or_integers([row[position] for row in rows])
    numeric = [position for position, name in enumerate(header) if name not in COLUMN_NAMES]
    if single == "features":
        columns["features"] = number_table(file, rows, numeric)
    elif single not in columns:
        column = single.removesuffix("s")
        raise ValueError(f"{file} must have one column, or a column '{column}'; got {', '.join(header)}")
    return columns


def number_table(file: Path, rows: list[list[str]], numeric: list[int]) -> np.ndarray:
    """The numeric columns of a table, float32."""
    table = np.empty((len(rows), len(numeric)), np.float32)
    for index, row in enumerate(rows):
        try:
            table[index] = [float(row[position]) for position in numeric]
        except ValueError as error:
            raise ValueError(
                f"{file}, row {index}: {error}; columns other than label and group must be numbers"
            ) from error
    return table


def text_or_integers(values: list[str]) -> np.ndarray:
    """Integers where all values are, else the texts."""
    try:
        return np.array([int(value) for value in values], np.int64)
    except (ValueError, OverflowError):
        return np.array(values)
