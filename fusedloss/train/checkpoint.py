"""Checkpoints of a training: tensors and values, replaced together."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedloss.atomic_io import StorageError, read_json, read_tensors, sha256_of_file, write_bytes, write_tensors

DAMAGED = "(damaged or edited; delete the folder's checkpoint to train again from the start)"


class Checkpoint:
    """The state of a training after some epoch: ``checkpoint.json`` names the safetensors file that belongs to it.

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
        content = {"epoch": epoch, "tensors": name, "tensors_sha256": sha256_of_file(self.folder / name)} | values
        # NaN scores stay NaN here (not null): a resumed history is the history itself.
        write_bytes(self.path, (json.dumps(content | {"sha256": _sha256_of_values(content)}) + "\n").encode())
        self._remove_others(name)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        values = read_json(self.path)
        if not isinstance(values, dict) or not isinstance(values.get("tensors"), str):
            raise StorageError(f"{self.path} must be a checkpoint that names its tensors; got none named")
        tensors = self.folder / values["tensors"]
        # Checkpoints of earlier versions have no hashes.
        if "sha256" in values and values.pop("sha256") != _sha256_of_values(values):
            raise StorageError(f"{self.path} must have the sha256 that it was written with; got another {DAMAGED}")
        loaded = read_tensors(tensors)
        if "tensors_sha256" in values and sha256_of_file(tensors) != values["tensors_sha256"]:
            raise StorageError(f"{tensors} must have the sha256 that {self.path} names; got another {DAMAGED}")
        self._remove_others(values["tensors"])
        return loaded, values

    def _remove_others(self, name: str) -> None:
        for path in self.folder.glob("checkpoint-*.safetensors*"):
            if path.name != name:
                path.unlink(missing_ok=True)


def _sha256_of_values(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


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
