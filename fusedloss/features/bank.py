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

from fusedloss.atomic_io import disk_full_explained, sync_folder
from fusedloss.features import checks
from fusedloss.features.bank_files import (
    CLASSES_FILE,
    FEATURES_FILE,
    GROUPS_FILE,
    LABELS_FILE,
    PATHS_FILE,
    load_array,
    load_names,
    read_manifest,
    release_pages,
)
from fusedloss.features.manifest import DTYPES, BankError, FeatureSource, Manifest, library_versions, now
from fusedloss.features.verified import Verified, verify_files
from fusedloss.features.writer import BankWriter, Contents


class FeatureBank:
    """Features `(N, D)` in float16 or float32, labels `(N,)`, and optional groups `(N,)` and paths.

    On disk a bank is a folder: manifest.json, features.npy, labels.npy, classes.json, and groups.npy and
    paths.json where there are any. The manifest is written last and holds the sha256 of every other file.
    Made by `from_arrays`, `open` and `create`.

    Example:
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
        self._verified: Verified | None = None

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

        Args:
            features: ``(N, D)``; float16 and float32 are kept, other real numbers become float32.
            labels: ``(N,)`` integers in ``[0, K)``.
            groups: ``(N,)`` integers; rows of a group are never split between training and validation.
            class_names: K names; without them K is the largest label plus one and the names are the numbers.
            paths: N names of the rows, for messages and predictions.
            source: how the features were computed, where that is known.

        Raises:
            BankError: shapes that disagree, labels outside ``[0, K)``, NaN or infinite features.
            TypeError: anything that is not an array, or not a sequence of names.

        Example:
            >>> FeatureBank.from_arrays([[0.0, 1.0], [1.0, 0.0]], [0, 1], class_names=["ant", "bee"])
            FeatureBank(2 rows of 2 float32, 2 classes)
        """
        array = checks.as_numpy(features, "features")
        if array.ndim != 2 or 0 in array.shape:
            raise BankError(f"features must have shape (N, D) with N and D at least 1; got {array.shape}")
        if array.dtype.kind not in "fiu":
            raise BankError(f"features must be real numbers; got {array.dtype}")
        array = np.ascontiguousarray(array, dtype=array.dtype if array.dtype.name in DTYPES else np.float32)
        label_array = checks.integer_vector("labels", labels, len(array))
        group_array = None if groups is None else checks.integer_vector("groups", groups, len(array))
        unnamed = class_names is None
        names = tuple(checks.class_numbers(label_array) if unnamed else checks.as_names("class_names", class_names))
        path_list = None if paths is None else checks.as_names("paths", paths, len(array))
        checks.check_labels(label_array, len(names))
        checks.check_finite(array, path_list)
        manifest = Manifest(
            num_rows=len(array), in_features=array.shape[1], num_classes=len(names), dtype=array.dtype.name,
            source=_source(source), versions=library_versions(), created=now(),
        )  # fmt: skip
        return cls(array, label_array, group_array, names, path_list, manifest)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = False) -> FeatureBank:
        """The bank in a folder, features memory-mapped.

        Files that are not as they were when they were last checked (by size, times and inode, which ``verified.json``
        keeps beside them) are read whole and must have the sha256 of the manifest; `verify=True` checks every file.

        Raises:
            IncompleteBankError: an extraction that has not ended.
            BankError: anything that does not match the manifest, another sha256 among it, labels outside ``[0, K)``,
                NaN or infinite features.
            TypeError: a path that is none.
        """
        folder = checks.as_path("path", path)
        manifest = read_manifest(folder)
        for name in manifest.files:
            if not (folder / name).is_file():
                raise BankError(f"{folder} must hold {name}, which its manifest lists; got no such file")
        seen, now_seen = Verified.read(folder), Verified.of(folder, manifest.files)
        checked = [] if verify else seen.unchanged(folder, manifest.files)
        rows = manifest.num_rows
        features = load_array(folder / FEATURES_FILE, (rows, manifest.in_features), manifest.dtype)
        labels = np.array(load_array(folder / LABELS_FILE, (rows,), "int64"))
        grouped = GROUPS_FILE in manifest.files
        groups = np.array(load_array(folder / GROUPS_FILE, (rows,), "int64")) if grouped else None
        class_names = tuple(load_names(folder / CLASSES_FILE, manifest.num_classes))
        paths = load_names(folder / PATHS_FILE, rows) if PATHS_FILE in manifest.files else None
        try:
            checks.check_labels(labels, len(class_names))
            if FEATURES_FILE not in checked:
                checks.check_finite(features, paths)
        except BankError as error:
            raise BankError(f"{folder}: {error}") from error
        verify_files(folder, manifest.files, checked)
        if len(checked) < len(manifest.files):
            now_seen.fingerprint = seen.fingerprint if seen.hashes == manifest.files else None
            seen = now_seen
            seen.write(folder)
        bank = cls(features, labels, groups, class_names, paths, manifest, folder)
        bank._verified = seen
        return bank

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
    ) -> BankWriter[FeatureBank]:
        """A writer that fills a bank on disk, or goes on where an interrupted one with the same plan stopped.

        `writer.rows_done` says how many rows are already safe; `writer.append(features)` adds the next ones
        and `writer.finish()` returns the bank.

        Args:
            path: a new folder, an empty one, or that of the interrupted bank.
            num_rows, in_features: N and D, at least 1.
            labels, class_names, groups, paths, source: as `from_arrays`.
            dtype: ``"float16"`` or ``"float32"``, as features are stored.
            inputs_sha256: identifies the inputs, so that a bank is not continued with others.

        Raises:
            BankError: arguments that disagree, or a folder that holds something else.
            TypeError, ValueError: arguments of another kind.
            OSError: no space for the whole bank.
        """
        rows = checks.as_integer("num_rows", num_rows, 1)
        width = checks.as_integer("in_features", in_features, 1)
        checks.check_choice("dtype", dtype, DTYPES)
        label_array = checks.integer_vector("labels", labels, rows)
        names = checks.as_names("class_names", class_names)
        checks.check_labels(label_array, len(names))
        group_array = None if groups is None else checks.integer_vector("groups", groups, rows)
        path_list = None if paths is None else checks.as_names("paths", paths, rows)
        manifest = Manifest(
            num_rows=rows, in_features=width, num_classes=len(names), dtype=dtype, source=_source(source),
            inputs_sha256=inputs_sha256, versions=library_versions(), created=now(),
        )  # fmt: skip
        contents = Contents(manifest, label_array, group_array, names, path_list)
        return BankWriter(checks.as_path("path", path), contents, FeatureBank.open)

    def save(self, path: str | os.PathLike[str]) -> FeatureBank:
        """Write the bank to a new folder, which appears whole or not at all, and open it there."""
        folder = checks.as_path("path", path)
        if folder.exists():
            raise FileExistsError(f"path must be a new folder; got {folder}, which exists")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        contents = Contents(self.manifest, self.labels, self.groups, list(self.class_names), self.paths)
        try:
            with disk_full_explained(folder, "nothing was kept there"):
                # The bank is opened, and its features are checked, once: under its final name.
                with BankWriter(temporary, contents, open_bank=lambda written: written) as writer:
                    for start in range(0, len(self), checks.ROWS_PER_BLOCK):
                        writer.append(self.features[start : start + checks.ROWS_PER_BLOCK])
                    writer.finish()
                os.rename(temporary, folder)
                sync_folder(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return FeatureBank.open(folder)

    def require_source(self, source: FeatureSource) -> None:
        """Raise BankError unless the features were computed as `source` says: backbone, weights and so on."""
        checks.check_instance("source", source, FeatureSource, "a FeatureSource")
        differences = self.manifest.source.differences(source)
        if differences:
            where = self.folder or "the bank"
            raise BankError(f"source must be that of the features of {where}; got another: {'; '.join(differences)}")

    def require_compatible(self, other: FeatureBank) -> None:
        """Raise BankError unless a head trained on this bank can be applied to the other one."""
        checks.check_instance("other", other, FeatureBank, "a FeatureBank")
        if self.in_features != other.in_features:
            raise BankError(f"other must have in_features {self.in_features}; got {other.in_features}")
        other.require_source(self.manifest.source)

    def fingerprint(self) -> str:
        """The sha256 of features, labels, groups and class names; the same in memory and on disk.

        ``verified.json`` keeps that of files which have not changed since.
        """
        if self._verified is None or self.folder is None:
            return self._computed_fingerprint()
        if self._verified.fingerprint is None:
            self._verified.fingerprint = self._computed_fingerprint()
            self._verified.write(self.folder)
        return self._verified.fingerprint

    def _computed_fingerprint(self) -> str:
        digest = hashlib.sha256()
        for array in (self.features, self.labels, self.groups):
            if array is None:
                digest.update(b"none")
                continue
            digest.update(f"{array.dtype.name}{array.shape}".encode())
            for start in range(0, len(array), checks.ROWS_PER_BLOCK):
                digest.update(np.ascontiguousarray(array[start : start + checks.ROWS_PER_BLOCK]).data)
                release_pages(array)
        digest.update(json.dumps(self.class_names).encode())
        return digest.hexdigest()


def _source(source: FeatureSource | None) -> FeatureSource:
    if source is None:
        return FeatureSource()
    checks.check_instance("source", source, FeatureSource, "a FeatureSource or None")
    return source
