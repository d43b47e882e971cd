"""BankWriter: fills a feature bank row by row, durably, and goes on after an interruption."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from fusedloss.atomic_io import disk_full_explained, sha256_of_file, write_all, write_bytes
from fusedloss.features import checks
from fusedloss.features.manifest import MANIFEST_FILE, BankError, Manifest

if TYPE_CHECKING:
    from fusedloss.features.bank import FeatureBank

PROGRESS_FILE = "progress.json"
FEATURES_FILE = "features.npy"


def npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=False)
    return file.getvalue()


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    description = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)
    return file.getvalue()


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()


def plan_of(manifest: Manifest, hashes: dict[str, str]) -> dict[str, Any]:
    """What must be equal for a bank to be continued: sizes, source, and the sha256 of labels and the like."""
    plan = dataclasses.asdict(manifest)
    for name in ("versions", "created", "files"):
        del plan[name]
    source = plan.pop("source")
    del source["weights"]  # where they were read from; their hash counts
    return {**plan, **source, **hashes}


def rows_done(folder: Path) -> tuple[int, int]:
    """Rows that are safe, and rows planned, of the unfinished bank in a folder."""
    progress = read_progress(folder)
    return progress["rows_done"], progress["plan"]["num_rows"]


def read_progress(folder: Path) -> dict[str, Any]:
    file = folder / PROGRESS_FILE
    try:
        progress: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if not 0 <= progress["rows_done"] <= progress["plan"]["num_rows"]:
            raise ValueError(f"rows_done is {progress['rows_done']}")
    except (ValueError, KeyError, TypeError) as error:
        raise BankError(f"{file} cannot be read ({error}); delete {folder} and extract again") from error
    return progress


class BankWriter:
    """Fills a bank; made by `FeatureBank.create`.

    Rows are synced to the disk before they are counted in progress.json, and the manifest comes last, so
    whatever stops the process leaves either an unfinished bank that can be continued or a whole one.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        labels: np.ndarray,
        groups: np.ndarray | None,
        class_names: list[str],
        paths: list[str] | None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.paths = paths
        self.rows_done = 0
        self.small_files = {"labels.npy": npy_bytes(labels), "classes.json": json_bytes(class_names)}
        if groups is not None:
            self.small_files["groups.npy"] = npy_bytes(groups)
        if paths is not None:
            self.small_files["paths.json"] = json_bytes(paths)
        self.header = npy_header(manifest.dtype, (manifest.num_rows, manifest.in_features))
        self.row_bytes = np.dtype(manifest.dtype).itemsize * manifest.in_features
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in self.small_files.items()}
        self.plan = plan_of(manifest, hashes)
        self.complete = (folder / MANIFEST_FILE).is_file()
        if self.complete:
            self._match_complete()
        elif (folder / PROGRESS_FILE).is_file():
            self._resume()
        else:
            self._start()

    def __enter__(self) -> BankWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the features file; what was appended stays."""
        if not self.complete:
            self.file.close()

    def append(self, features: Any) -> None:
        """Add the next rows `(n, D)`; when this returns they survive a power cut.

        Raises BankError for another width, too many rows, and NaN or infinite values, and OSError on a full
        disk; the rows of earlier calls are kept in every case.
        """
        block = checks.as_numpy(features)
        last_row = self.rows_done + len(block)
        if block.ndim != 2 or block.shape[1] != self.manifest.in_features:
            raise BankError(f"features must have shape (n, {self.manifest.in_features}); got {block.shape}")
        if self.complete or last_row > self.manifest.num_rows:
            raise BankError(
                f"{self.folder} is planned for {self.manifest.num_rows} rows; these would be row {last_row}"
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

    def finish(self) -> FeatureBank:
        """Write the manifest, which makes the bank complete, and open it."""
        from fusedloss.features.bank import FeatureBank

        if not self.complete:
            if self.rows_done != self.manifest.num_rows:
                raise BankError(
                    f"{self.folder} has {self.rows_done} of {self.manifest.num_rows} rows; append the others first"
                )
            self.file.close()
            names = (FEATURES_FILE, *self.small_files)
            hashes = {name: sha256_of_file(self.folder / name) for name in names}
            manifest = dataclasses.replace(self.manifest, files=hashes)
            with disk_full_explained(self.folder, self._kept()):
                write_bytes(self.folder / MANIFEST_FILE, manifest.to_json().encode())
            self.complete = True
        (self.folder / PROGRESS_FILE).unlink(missing_ok=True)
        return FeatureBank.open(self.folder)

    def _kept(self) -> str:
        return f"the first {self.rows_done} rows are safe; make room and run the same command again"

    def _start(self) -> None:
        if self.folder.exists() and any(entry.suffix != ".tmp" for entry in self.folder.iterdir()):
            raise BankError(f"{self.folder} is neither empty nor a feature bank; nothing was written there")
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = len(self.header) + self.row_bytes * self.manifest.num_rows + sum(map(len, self.small_files.values()))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            sizes = f"it needs {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free"
            raise OSError(errno.ENOSPC, f"no space for {self.folder}: {sizes}; nothing was written")
        with disk_full_explained(self.folder, self._kept()):
            # the progress file comes first: the folder is then known as ours whatever else is in it
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
        found = Manifest.read(self.folder)
        hashes = {name: digest for name, digest in found.files.items() if name != FEATURES_FILE}
        self._require_plan(plan_of(found, hashes), "was made")
        self.rows_done = found.num_rows

    def _require_plan(self, found: dict[str, Any], how: str) -> None:
        differences = []
        for name, value in self.plan.items():
            if found.get(name) != value:
                hashed = "sha256" in name or "." in name
                differences.append(f"{name} " + ("other than now" if hashed else f"{found.get(name)!r}, not {value!r}"))
        differences += [f"{name} other than now" for name in found if name not in self.plan]
        if differences:
            raise BankError(
                f"{self.folder} {how} with {'; '.join(differences)}. "
                "Give the same inputs and settings as then, or another folder"
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
            raise BankError(f"{path} is shorter than {finished}; delete {self.folder} and extract again")
        self.file = open(path, "r+b", buffering=0)  # noqa: SIM115  closed by close()
        self.file.truncate(size)
