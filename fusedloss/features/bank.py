"""FeatureBank: frozen features with their labels, in memory or memory-mapped from a folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusedloss.atomic_io import disk_full_explained, sha256_of_file, sync_folder
from fusedloss.features import checks
from fusedloss.features.manifest import (
    DTYPES,
    MANIFEST_FILE,
    BankError,
    FeatureSource,
    IncompleteBankError,
    Manifest,
    library_versions,
    now,
)
from fusedloss.features.writer import PROGRESS_FILE, BankWriter, rows_done


class FeatureBank:
    """Features `(N, D)` in float16 or float32, labels `(N,)`, and optional groups `(N,)` and paths.

    On disk a bank is a folder: manifest.json, features.npy, labels.npy, classes.json, and groups.npy and
    paths.json where there are any. The manifest is written last and holds the sha256 of every other file.

    >>> bank = FeatureBank.from_arrays([[0.0, 1.0], [1.0, 0.0]], [0, 1])
    >>> len(bank), bank.in_features, bank.num_classes
    (2, 2, 2)
    """

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        groups: np.ndarray | None,
        class_names: tuple[str, ...],
        paths: list[str] | None,
        manifest: Manifest,
        folder: Path | None = None,
    ) -> None:
        self.features = features
        self.labels = labels
        self.groups = groups
        self.class_names = class_names
        self.paths = paths
        self.manifest = manifest
        self.folder = folder

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        where = f", folder={str(self.folder)!r}" if self.folder else ""
        sizes = f"{len(self)} rows of {self.in_features} {self.manifest.dtype}, {self.num_classes} classes"
        return f"FeatureBank({sizes}{where})"

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def in_features(self) -> int:
        return int(self.features.shape[1])

    @classmethod
    def from_arrays(
        cls,
        features: Any,
        labels: Any,
        *,
        groups: Any = None,
        class_names: Sequence[str] | None = None,
        paths: Sequence[str] | None = None,
        source: FeatureSource | None = None,
    ) -> FeatureBank:
        """A bank in memory from numpy arrays or tensors, which are shared where the dtype allows, not copied.

        float16 and float32 features are kept, others become float32. Raises BankError for shapes that
        disagree, labels outside `[0, K)` and NaN or infinite features. Without `class_names`, K is the
        largest label plus one and the names are the numbers.
        """
        array = checks.as_numpy(features)
        if array.ndim != 2 or 0 in array.shape:
            raise BankError(f"features must have shape (N, D) with N and D at least 1; got {array.shape}")
        if array.dtype.kind not in "fiu":
            raise BankError(f"features must be real numbers; got {array.dtype}")
        array = np.ascontiguousarray(array, dtype=array.dtype if array.dtype.name in DTYPES else np.float32)
        label_array = checks.integer_vector("labels", labels, len(array))
        group_array = None if groups is None else checks.integer_vector("groups", groups, len(array))
        names = tuple(map(str, range(label_array.max() + 1) if class_names is None else class_names))
        if paths is not None and len(paths) != len(array):
            raise BankError(f"paths must have one entry per row, {len(array)}; got {len(paths)}")
        checks.check_labels(label_array, len(names))
        path_list = None if paths is None else [str(path) for path in paths]
        checks.check_finite(array, path_list)
        manifest = Manifest(
            num_rows=len(array), in_features=array.shape[1], num_classes=len(names), dtype=array.dtype.name,
            source=source or FeatureSource(), versions=library_versions(), created=now(),
        )  # fmt: skip
        return cls(array, label_array, group_array, names, path_list, manifest)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = False) -> FeatureBank:
        """The bank in a folder, features memory-mapped; `verify=True` also checks every file's sha256.

        Raises IncompleteBankError for an extraction that has not ended, and BankError for anything that
        does not match the manifest, labels outside `[0, K)` and NaN or infinite features (a pass over the
        features, with no copy).
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        for name, expected in manifest.files.items():
            if not (folder / name).is_file():
                raise BankError(f"{folder}: {name} is missing, though the manifest lists it")
            if verify and sha256_of_file(folder / name) != expected:
                raise BankError(f"{folder}: {name} does not have the sha256 of the manifest; it was changed or damaged")
        rows = manifest.num_rows
        features = load_array(folder / "features.npy", (rows, manifest.in_features), manifest.dtype)
        labels = np.array(load_array(folder / "labels.npy", (rows,), "int64"))
        grouped = "groups.npy" in manifest.files
        groups = np.array(load_array(folder / "groups.npy", (rows,), "int64")) if grouped else None
        class_names = tuple(load_names(folder / "classes.json", manifest.num_classes))
        paths = load_names(folder / "paths.json", rows) if "paths.json" in manifest.files else None
        try:
            checks.check_labels(labels, len(class_names))
            checks.check_finite(features, paths)
        except BankError as error:
            raise BankError(f"{folder}: {error}") from error
        return cls(features, labels, groups, class_names, paths, manifest, folder)

    @staticmethod
    def create(
        path: str | os.PathLike[str],
        num_rows: int,
        in_features: int,
        *,
        labels: Any,
        class_names: Sequence[str],
        dtype: str = "float16",
        source: FeatureSource | None = None,
        groups: Any = None,
        paths: Sequence[str] | None = None,
        inputs_sha256: str | None = None,
    ) -> BankWriter:
        """A writer that fills a bank on disk, or goes on where an interrupted one with the same plan stopped.

        `writer.rows_done` says how many rows are already safe; `writer.append(features)` adds the next ones
        and `writer.finish()` returns the bank. Raises BankError when the folder holds something else.
        """
        if num_rows < 1 or in_features < 1 or dtype not in DTYPES:
            raise BankError(
                f"num_rows and in_features must be at least 1 and dtype one of {DTYPES}; "
                f"got {num_rows}, {in_features}, {dtype!r}"
            )
        label_array = checks.integer_vector("labels", labels, num_rows)
        checks.check_labels(label_array, len(class_names))
        manifest = Manifest(
            num_rows=num_rows, in_features=in_features, num_classes=len(class_names), dtype=dtype,
            source=source or FeatureSource(), inputs_sha256=inputs_sha256, versions=library_versions(),
            created=now(),
        )  # fmt: skip
        group_array = None if groups is None else checks.integer_vector("groups", groups, num_rows)
        path_list = None if paths is None else [str(name) for name in paths]
        if path_list is not None and len(path_list) != num_rows:
            raise BankError(f"paths must have one entry per row, {num_rows}; got {len(path_list)}")
        return BankWriter(
            Path(path), manifest, label_array, group_array, [str(name) for name in class_names], path_list
        )

    def save(self, path: str | os.PathLike[str]) -> FeatureBank:
        """Write the bank to a new folder, which appears whole or not at all, and open it there."""
        folder = Path(path)
        if folder.exists():
            raise FileExistsError(f"{folder} exists; a bank is saved to a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        try:
            with disk_full_explained(folder, "nothing was kept there"):
                plan = (self.manifest, self.labels, self.groups, list(self.class_names), self.paths)
                with BankWriter(temporary, *plan) as writer:
                    for start in range(0, len(self), checks.ROWS_PER_BLOCK):
                        writer.append(self.features[start : start + checks.ROWS_PER_BLOCK])
                    writer.finish()
                os.rename(temporary, folder)
                sync_folder(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return FeatureBank.open(folder)

    def require_source(self, source: FeatureSource) -> None:
        """Raise BankError unless the features were computed as `source` says: backbone, weights, the rest."""
        differences = self.manifest.source.differences(source)
        if differences:
            where = self.folder or "the bank"
            raise BankError(f"{where} holds features computed in another way: {'; '.join(differences)}")

    def require_compatible(self, other: FeatureBank) -> None:
        """Raise BankError unless a head trained on this bank can be applied to the other one."""
        if self.in_features != other.in_features:
            raise BankError(f"in_features differ: {self.in_features} and {other.in_features}")
        other.require_source(self.manifest.source)

    def fingerprint(self) -> str:
        """The sha256 of features, labels, groups and class names; the same in memory and on disk."""
        digest = hashlib.sha256()
        for array in (self.features, self.labels, self.groups):
            if array is None:
                digest.update(b"none")
                continue
            digest.update(f"{array.dtype.name}{array.shape}".encode())
            for start in range(0, len(array), checks.ROWS_PER_BLOCK):
                digest.update(np.ascontiguousarray(array[start : start + checks.ROWS_PER_BLOCK]).data)
        digest.update(json.dumps(self.class_names).encode())
        return digest.hexdigest()


def read_manifest(folder: Path) -> Manifest:
    if not folder.is_dir():
        raise BankError(f"{folder} is not a folder; a feature bank is the folder that extract or import wrote")
    if not (folder / MANIFEST_FILE).is_file():
        if (folder / PROGRESS_FILE).is_file():
            done, total = rows_done(folder)
            raise IncompleteBankError(
                f"{folder} is incomplete: {done} of {total} rows. "
                "Run the same extract command again, and it goes on from there"
            )
        raise BankError(f"{folder} is not a feature bank: it has no {MANIFEST_FILE}")
    return Manifest.read(folder)


def load_array(file: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A read-only memory map; BankError for a truncated file, a pickle, another shape or another dtype."""
    try:
        array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BankError(f"{file} cannot be read as a whole .npy array (truncated?): {error}") from error
    if array.shape != shape or array.dtype.name != dtype:
        raise BankError(f"{file} holds {array.dtype.name} {array.shape}; the manifest says {dtype} {shape}")
    return array


def load_names(file: Path, count: int) -> list[str]:
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BankError(f"{file} cannot be read: {error}") from error
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
        raise BankError(f"{file} must be a JSON list of {count} strings")
    return names
