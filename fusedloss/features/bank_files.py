"""The files of a feature bank's folder: their names, and how each is written and read."""

from __future__ import annotations

import io
import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from fusedloss.features.manifest import MANIFEST_FILE, BankError, IncompleteBankError, Manifest

PROGRESS_FILE = "progress.json"
FEATURES_FILE = "features.npy"
LABELS_FILE = "labels.npy"
GROUPS_FILE = "groups.npy"
CLASSES_FILE = "classes.json"
PATHS_FILE = "paths.json"


def npy_bytes(array: np.ndarray) -> bytes:
    """A small array as the content of a .npy file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=False)
    return file.getvalue()


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The header of a .npy file whose rows are appended later."""
    file = io.BytesIO()
    description = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)
    return file.getvalue()


def json_bytes(value: Any) -> bytes:
    """One line of JSON."""
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete bank; IncompleteBankError says how far an unfinished one is."""
    if not folder.is_dir():
        raise BankError(f"path must be a feature bank, a folder as extract or import write it; got {folder}")
    if not (folder / MANIFEST_FILE).is_file():
        if (folder / PROGRESS_FILE).is_file():
            done, total = rows_done(folder)
            raise IncompleteBankError(
                f"{folder} is incomplete: {done} of {total} rows. "
                "Run the same extract command again, and it goes on from there"
            )
        raise BankError(f"path must be a feature bank; got {folder}, which has no {MANIFEST_FILE}")
    return Manifest.read(folder)


def rows_done(folder: Path) -> tuple[int, int]:
    """Rows that are safe, and rows planned, of the unfinished bank in a folder."""
    progress = read_progress(folder)
    return progress["rows_done"], progress["plan"]["num_rows"]


def read_progress(folder: Path) -> dict[str, Any]:
    """``rows_done`` and ``plan`` of the unfinished bank in a folder."""
    file = folder / PROGRESS_FILE
    try:
        progress: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if not 0 <= progress["rows_done"] <= progress["plan"]["num_rows"]:
            raise ValueError(f"rows_done must be at most the rows planned; got {progress['rows_done']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BankError(f"{file} cannot be read ({error}); delete {folder} and extract again") from error
    return progress


def load_array(file: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A read-only memory map; BankError for a truncated file, a pickle, another shape or another dtype."""
    try:
        array: np.ndarray = np.lib.format.open_memmap(file, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise BankError(f"{file} cannot be read as a whole .npy array (truncated?): {error}") from error
    if array.shape != shape or array.dtype.name != dtype:
        raise BankError(f"{file} must hold {dtype} {shape}, as the manifest says; got {array.dtype.name} {array.shape}")
    return array


def release_pages(array: np.ndarray) -> None:
    """Take what was read of a memory-mapped array out of this process; the system's cache keeps it."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def load_names(file: Path, count: int) -> list[str]:
    """The strings of classes.json or paths.json; BankError unless there are `count`."""
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BankError(f"{file} cannot be read: {error}") from error
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
        got = f"{len(names)} entries" if isinstance(names, list) else type(names).__name__
        raise BankError(f"{file} must be a JSON list of {count} strings; got {got}")
    return names
