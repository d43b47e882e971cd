"""Loading a backbone's weights from a local file, and the hash that identifies them."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Keys under which training scripts nest weights.
CONTAINERS = ("state_dict", "model", "model_state_dict", "module")


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of one of torch.save, read without running pickled code."""
    if not file.is_file():
        raise ValueError(f"weights must be a file; got {file}, which does not exist")
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(file))
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read as safetensors: {error}") from error
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{file} cannot be read as weights (torch.load with weights_only=True): {reason}") from error
    for name in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(value, Tensor) for value in content.values())
    ):
        raise ValueError(f"{file} must hold a state dict (names of tensors); got {type(content).__name__}")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def load_weights(model: nn.Module, file: Path, unused: Sequence[str] = ()) -> None:
    """Load a file into a model: by name, or in order where the names differ and every shape agrees.

    Tensors whose names start with one of `unused` (the classifier, which features do not pass through) may
    be missing or have another shape. Raises ValueError with the first tensor that does not match.
    """
    stored = read_state_dict(file)
    expected = model.state_dict()
    needed = {name for name in expected if not is_unused(name, unused)}
    if needed <= set(stored):
        extra = sorted(name for name in stored if name not in expected and not is_unused(name, unused))
        if extra:
            raise ValueError(
                f"{file} must hold the backbone's tensors alone; got {len(extra)} others, the first is {extra[0]!r}"
            )
        for name in needed:
            if stored[name].shape != expected[name].shape:
                shapes = f"{tuple(expected[name].shape)} for the backbone; got {tuple(stored[name].shape)}"
                raise ValueError(f"{file}: {name!r} must have shape {shapes}")
        model.load_state_dict({name: stored[name] for name in needed}, strict=False)
        return
    renamed = dict(zip(expected, stored.values(), strict=False))
    for position, ((name, tensor), (other, given)) in enumerate(zip(expected.items(), stored.items(), strict=False)):
        if tensor.shape != given.shape:
            raise ValueError(
                f"{file} must fit the backbone, whose tensor {position} is {name!r} {tuple(tensor.shape)}; "
                f"got {other!r} {tuple(given.shape)}"
            )
    if len(stored) != len(expected):
        raise ValueError(f"{file} must hold {len(expected)} tensors, as the backbone has; got {len(stored)}")
    model.load_state_dict(renamed)


def is_unused(name: str, unused: Sequence[str]) -> bool:
    """Whether a tensor belongs to one of the modules that features do not pass through."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in unused)


def sha256_of_weights(model: nn.Module, unused: Sequence[str] = ()) -> str:
    """The sha256 of a model's tensors in order, dtype, shape and bytes, without the `unused` ones."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not is_unused(name, unused):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
