"""Files that are either whole or absent: write aside, flush to the disk, rename."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedloss.atomic_io import write_bytes


class StorageError(OSError):
    """A file of a run could not be written or read; the message says which and what is still good."""


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file by ``data`` such that a crash at any moment leaves the old or the new content."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
    except OSError as error:
        raise StorageError(
            error.errno,
            f"{error.strerror}: {path} could not be written; what was complete before is untouched",
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (NaN becomes null), atomically."""
    write_atomically(path, (json.dumps(_without_nan(value), indent=1, allow_nan=False) + "\n").encode())


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_atomically(path, "".join(json_line(row) for row in rows).encode())


def json_line(row: dict[str, Any]) -> str:
    """One line of strict JSON."""
    return json.dumps(_without_nan(row), allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """The content of a JSON file of a run."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise StorageError(error.errno, f"{error.strerror}: {path}") from error
    except json.JSONDecodeError as error:
        raise StorageError(f"{path} is not JSON: {error}") from error


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, atomically."""
    from safetensors.torch import save

    write_atomically(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        # read whole instead of mapped: the file may be replaced while its tensors live
        return load(path.read_bytes())
    except OSError as error:
        raise StorageError(error.errno, f"{error.strerror}: {path}") from error
    except SafetensorError as error:
        raise StorageError(f"{path} is not a safetensors file: {error}") from error


class Checkpoint:
    """The state of a training after some epoch: ``checkpoint.json`` names the safetensors file that belongs
    to it.

    The tensors are written first under a name of their own, so the JSON's rename is the one moment at which
    the new state takes the place of the old.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "checkpoint.json"

    def exists(self) -> bool:
        return self.path.exists()

    def save(self, epoch: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        name = f"checkpoint-{epoch:05d}.safetensors"
        write_tensors(self.folder / name, tensors)
        # NaN scores stay NaN here (not null): a resumed history is the history itself
        write_atomically(self.path, (json.dumps({"epoch": epoch, "tensors": name} | values) + "\n").encode())
        self._remove_others(name)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        values = read_json(self.path)
        self._remove_others(values["tensors"])
        return read_tensors(self.folder / values["tensors"]), values

    def _remove_others(self, name: str) -> None:
        for path in self.folder.glob("checkpoint-*.safetensors*"):
            if path.name != name:
                path.unlink(missing_ok=True)


def flatten_optimizer(state: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors ``optimizer.<parameter>.<name>`` of an optimizer's state."""
    return {
        f"optimizer.{index}.{name}": torch.as_tensor(value)
        for index, entries in state["state"].items()
        for name, value in entries.items()
    }


def unflatten_optimizer(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The reverse of ``flatten_optimizer``, over all tensors of a checkpoint."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = tensor
    return state


def select_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with the prefix, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under names with the prefix."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
