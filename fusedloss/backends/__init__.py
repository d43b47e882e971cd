"""Which backend answers for each operation on each device, and why another does not."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator

NAMES = ("reference", "cpp", "triton")
OPERATIONS = ("softmax_ce", "class_stats", "linear_ce", "supcon")

# Whether values are looked at even where that waits for the device.
CHECK_VALUES = os.environ.get("FUSEDLOSS_CHECK", "") not in ("", "0")

_PREFERRED = {"cpu": "cpp", "cuda": "triton"}
_forced: str | None = os.environ.get("FUSEDLOSS_BACKEND") or None
# By function and device, until another backend is forced.
_kernels: dict[tuple[str, str], Callable] = {}
_absent: dict[tuple[str, str], str | None] = {}


def unavailable_reason(name: str, device_type: str) -> str | None:
    """Why backend `name` can't answer on `device_type`, or None when it can."""
    key = (name, device_type)
    if key not in _absent:
        _absent[key] = None if name == "reference" else _module(name).unavailable_reason(device_type)
    return _absent[key]


# torch.compiler.assume_constant_result does this and imports the compiler, which takes as long as torch itself.
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve_backend(device_type: str) -> str:
    """The backend that answers on `device_type`; an asked-for backend that can't is an error that says why."""
    if _forced:
        reason = unavailable_reason(_forced, device_type)
        if reason:
            raise RuntimeError(f"backend '{_forced}' can't answer on device '{device_type}': {reason}")
        return _forced
    preferred = _PREFERRED.get(device_type)
    if preferred is None:
        return "reference"
    reason = unavailable_reason(preferred, device_type)
    if reason is None:
        return preferred
    _say_once(f"fusedloss: the {preferred} backend is absent on '{device_type}' ({reason}); PyTorch formulas answer.")
    return "reference"


def kernel(operation: str, function: str, device_type: str) -> Callable:
    """The function of the resolve_backend backend; `operation` is the file, `function` the name in it."""
    key = (function, device_type)
    found = _kernels.get(key)
    if found is None:
        module = importlib.import_module(f"fusedloss.backends.{resolve_backend(device_type)}.{operation}")
        found = _kernels[key] = getattr(module, function)
    return found


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces one backend inside the block: ``"reference"``, ``"cpp"`` or ``"triton"``.

    Raises:
        ValueError: another name.
        RuntimeError: at the call of an operation, when the backend can't answer on its device; it says why.

    >>> import torch, fusedloss
    >>> with fusedloss.backend("reference"):
    ...     fusedloss.cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
    tensor(0.6931)
    """
    _check_name("backend", name)
    previous = _forced
    _force(name)
    try:
        yield
    finally:
        _force(previous)


def _force(name: str | None) -> None:
    global _forced
    _forced = name
    _kernels.clear()


def _check_name(source: str, name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{source}: got '{name}'; allowed are {', '.join(NAMES)}")


def _module(name: str):
    return importlib.import_module(f"fusedloss.backends.{name}")


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


if _forced:
    _check_name("FUSEDLOSS_BACKEND", _forced)
