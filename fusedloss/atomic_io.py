"""Files that are either whole or absent, even when the machine stops while they are written."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor


class StorageError(OSError):
    """A file could not be written or read; the message says which, and what is still good."""


def sync_folder(folder: Path) -> None:
    """Make the names in a folder (files created or renamed there) durable."""
    # Windows has no handle for a folder; its renames are already ordered.
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file that replaces `path` when the block ends, and is removed if the block fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file, in a folder made if need be, such that a crash leaves the old or the new content.

    Raises:
        StorageError: an ``OSError`` with the same ``errno`` and the path in its message.
    """
    write_parts(path, [content])


def write_parts(path: Path, parts: Iterable[bytes]) -> None:
    """``write_bytes`` of a content that is made part by part; an error that makes one leaves the old content."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            for part in parts:
                file.write(part)
    except OSError as error:
        message = f"{error.strerror}: {path} could not be written; what was complete before is untouched"
        raise StorageError(error.errno, message) from error


def write_all(file: RawIOBase, content: bytes | memoryview) -> None:
    """Write everything to an unbuffered file, whose single writes may be partial."""
    remaining = memoryview(content).cast("B")
    while remaining:
        remaining = remaining[file.write(remaining) :]


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (NaN and infinities become null), atomically."""
    write_bytes(path, (json.dumps(_without_nan(value), indent=1, allow_nan=False) + "\n").encode())


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_bytes(path, "".join(json_line(row) for row in rows).encode())


def json_line(row: dict[str, Any]) -> str:
    """One line of strict JSON."""
    return json.dumps(_without_nan(row), allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """The content of a JSON file; StorageError when it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(error.errno, f"{error.strerror}: {path}") from error
    except ValueError as error:
        raise StorageError(f"{path} is not JSON: {error}") from error


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, atomically."""
    from safetensors.torch import save

    write_bytes(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; StorageError when it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        # Read whole instead of mapped: the file may be replaced while its tensors live.
        return load(path.read_bytes())
    except OSError as error:
        raise StorageError(error.errno, f"{error.strerror}: {path}") from error
    except SafetensorError as error:
        raise StorageError(f"{path} is not a safetensors file: {error}") from error


def sha256_of_file(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def disk_full_explained(path: Path, kept: str) -> Iterator[None]:
    """Say what a full disk (or quota) means for what is written at `path`; other errors pass unchanged."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(error.errno, f"no space left while writing {path}: {kept}") from error


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
