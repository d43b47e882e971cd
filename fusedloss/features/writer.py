"""BankWriter: fills a feature bank row by row, durably, and goes on after an interruption."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from fusedloss.atomic_io import disk_full_explained, sha256_of_file, write_all, write_bytes
from fusedloss.features import checks
from fusedloss.features.bank_files import (
    CLASSES_FILE,
    FEATURES_FILE,
    GROUPS_FILE,
    LABELS_FILE,
    PATHS_FILE,
    PROGRESS_FILE,
    json_bytes,
    npy_bytes,
    npy_header,
    read_progress,
)
from fusedloss.features.manifest import MANIFEST_FILE, BankError, Manifest
from fusedloss.folder_lock import LOCK_FILE, FolderLock

Bank = TypeVar("Bank")


class Contents(NamedTuple):
    """All that a bank holds, except its features."""

    manifest: Manifest
    labels: np.ndarray
    groups: np.ndarray | None
    class_names: list[str]
    paths: list[str] | None

    def small_files(self) -> dict[str, bytes]:
        """The files that are written whole, before the features."""
        files = {LABELS_FILE: npy_bytes(self.labels), CLASSES_FILE: json_bytes(self.class_names)}
        if self.groups is not None:
            files[GROUPS_FILE] = npy_bytes(self.groups)
        if self.paths is not None:
            files[PATHS_FILE] = json_bytes(self.paths)
        return files


def plan_of(manifest: Manifest, hashes: dict[str, str]) -> dict[str, Any]:
    """What must be equal for a bank to be continued: sizes, source, and the sha256 of labels and the like."""
    plan = dataclasses.asdict(manifest)
    for name in ("versions", "created", "files"):
        del plan[name]
    source = plan.pop("source")
    # Where the weights were read from does not matter, their hash does.
    del source["weights"]
    return {**plan, **source, **hashes}


class BankWriter(Generic[Bank]):
    """Fills a bank; made by `FeatureBank.create`. `open_bank` opens the folder once it is complete.

    Rows are synced to the disk before progress.json says that they are done, and the manifest comes last, so
    whatever stops the process leaves either an unfinished bank that can be continued or a whole one.
    """

    def __init__(self, folder: Path, contents: Contents, open_bank: Callable[[Path], Bank]) -> None:
        self.folder = folder
        self.manifest = manifest = contents.manifest
        self.paths = contents.paths
        self.open_bank = open_bank
        self.rows_done = 0
        self.small_files = contents.small_files()
        self.header = npy_header(manifest.dtype, (manifest.num_rows, manifest.in_features))
        self.row_bytes = np.dtype(manifest.dtype).itemsize * manifest.in_features
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in self.small_files.items()}
        self.plan = plan_of(manifest, hashes)
        # What is there is looked at under the lock: another process may be writing it.
        self.lock = FolderLock(folder)
        if (folder / MANIFEST_FILE).is_file():
            self.complete = True
            self._match_complete()
            return
        self._refuse_other_files()
        self.lock.acquire()
        try:
            self.complete = (folder / MANIFEST_FILE).is_file()
            if self.complete:
                self._match_complete()
            elif (folder / PROGRESS_FILE).is_file():
                self._resume()
            else:
                self._start()
        except BaseException:
            self.lock.release()
            raise

    def __enter__(self) -> BankWriter[Bank]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the features file and let others write; what was appended stays."""
        if not self.complete:
            self.file.close()
        self.lock.release()

    def append(self, features: Any) -> None:
        """Add the next rows `(n, D)`; when this returns they survive a power cut.

        Raises BankError for another width, too many rows, and NaN or infinite values, and OSError on a full
        disk; the rows of earlier calls are kept in every case.
        """
        block = checks.as_numpy(features, "features")
        if block.ndim != 2 or block.shape[1] != self.manifest.in_features:
            raise BankError(f"features must have shape (n, {self.manifest.in_features}); got {block.shape}")
        if block.dtype.kind not in "fiu":
            raise BankError(f"features must be real numbers; got {block.dtype}")
        last_row = self.rows_done + len(block)
        if self.complete or last_row > self.manifest.num_rows:
            raise BankError(
                f"features must be the next of {self.manifest.num_rows} rows, as planned for {self.folder}; "
                f"got rows up to {last_row}"
            )
        if len(block) == 0:
            return
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(block, dtype=self.manifest.dtype)
        overflow = bool(np.isfinite(block).all()) and not np.isfinite(stored).all()
        note = f"; {self.manifest.dtype} overflowed, store float32 instead" if overflow else ""
        checks.check_finite(stored, self.paths, self.rows_done, note)
        with disk_full_explained(self.folder, self._kept()):
            self.file.seek(len(self.header) + self.rows_done * self.row_bytes)
            write_all(self.file, stored.view(np.uint8).data)
            os.fsync(self.file.fileno())
            self._record_progress(last_row)
        self.rows_done = last_row

    def finish(self) -> Bank:
        """Write the manifest, which makes the bank complete, and open it; BankError while rows are missing."""
        if not self.complete:
            if self.rows_done != self.manifest.num_rows:
                raise BankError(
                    f"features must be appended for all {self.manifest.num_rows} rows of {self.folder}; "
                    f"got {self.rows_done} of them"
                )
            self.file.close()
            names = (FEATURES_FILE, *self.small_files)
            hashes = {name: sha256_of_file(self.folder / name) for name in names}
            manifest = dataclasses.replace(self.manifest, files=hashes)
            with disk_full_explained(self.folder, self._kept()):
                write_bytes(self.folder / MANIFEST_FILE, manifest.to_json().encode())
            self.complete = True
        (self.folder / PROGRESS_FILE).unlink(missing_ok=True)
        self.lock.release()
        return self.open_bank(self.folder)

    def _kept(self) -> str:
        return f"the first {self.rows_done} rows are safe; make room and run the same command again"

    def _refuse_other_files(self) -> None:
        if (self.folder / PROGRESS_FILE).is_file() or not self.folder.exists():
            return
        if any(entry.suffix != ".tmp" and entry.name != LOCK_FILE for entry in self.folder.iterdir()):
            raise BankError(
                f"path must be a new or empty folder, or a bank's; got {self.folder}, which holds other files"
            )

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = len(self.header) + self.row_bytes * self.manifest.num_rows + sum(map(len, self.small_files.values()))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            sizes = f"it needs {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free"
            raise OSError(errno.ENOSPC, f"no space for {self.folder}: {sizes}; nothing was written")
        with disk_full_explained(self.folder, self._kept()):
            # The progress file comes first: the folder is then known as ours whatever else is in it.
            self._record_progress(0)
            self._write_small_files()
            self._open_features()

    def _resume(self) -> None:
        progress = read_progress(self.folder)
        self._require_plan(progress["plan"], "was begun")
        self.rows_done = progress["rows_done"]
        with disk_full_explained(self.folder, self._kept()):
            self._write_small_files()
            self._open_features()

    def _match_complete(self) -> None:
        stored = Manifest.read(self.folder)
        hashes = {name: digest for name, digest in stored.files.items() if name != FEATURES_FILE}
        self._require_plan(plan_of(stored, hashes), "was made")
        self.rows_done = stored.num_rows

    def _require_plan(self, stored: dict[str, Any], how: str) -> None:
        differences = []
        for name, value in self.plan.items():
            if stored.get(name) != value:
                hashed = "sha256" in name or "." in name
                before = "other than now" if hashed else f"{stored.get(name)!r}, not {value!r}"
                differences.append(f"{name} {before}")
        differences += [f"{name} other than now" for name in stored if name not in self.plan]
        if differences:
            raise BankError(
                f"path must be a new folder, or a bank that {how} with the same inputs and settings; "
                f"got {self.folder}, with {'; '.join(differences)}"
            )

    def _record_progress(self, rows: int) -> None:
        write_bytes(self.folder / PROGRESS_FILE, json_bytes({"rows_done": rows, "plan": self.plan}))

    def _write_small_files(self) -> None:
        for name, content in self.small_files.items():
            write_bytes(self.folder / name, content)

    def _open_features(self) -> None:
        path = self.folder / FEATURES_FILE
        size = len(self.header) + self.rows_done * self.row_bytes
        if self.rows_done == 0:
            write_bytes(path, self.header)
        elif not path.is_file() or path.stat().st_size < size:
            finished = f"its {self.rows_done} finished rows"
            raise BankError(f"{path} must hold {finished}; got fewer bytes (delete {self.folder} and extract again)")
        # Closed by close().
        self.file = open(path, "r+b", buffering=0)  # noqa: SIM115
        self.file.truncate(size)
