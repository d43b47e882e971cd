"""Which backend serves each operation on each device, and why another does not."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from fusedloss.core.user_warnings import warn_user

NAMES = ("reference", "cpp", "triton")
OPERATIONS = ("softmax_ce", "class_stats", "linear_ce", "supcon")

# Whether values are looked at even where that waits for the device.
CHECK_VALUES = os.environ.get("FUSEDLOSS_CHECK", "") not in ("", "0")

_PREFERRED = {"cpu": "cpp", "cuda": "triton"}
_FROM_ENVIRONMENT: str | None = os.environ.get("FUSEDLOSS_BACKEND") or None
# The blocks that this thread or task is in, innermost last: a mark of each block's own, and the backend it forces.
_blocks: ContextVar[tuple[tuple[object, str], ...]] = ContextVar("fusedloss_backend_blocks", default=())
# The names that blocks of any thread force: torch.compile guards on it, and without one nobody's blocks are read.
_forced_anywhere: tuple[str, ...] = ()
_lock = threading.Lock()
_kernels: dict[tuple[str, str, str, str | None], Callable[..., Any]] = {}
_reasons: dict[tuple[str, str], str | None] = {}


def unavailable_reason(name: str, device_type: str) -> str | None:
    """Why backend `name` can't serve `device_type`, or None when it can."""
    key = (name, device_type)
    if key not in _reasons:
        _reasons[key] = None if name == "reference" else _module(name).unavailable_reason(device_type)
    return _reasons[key]


def forced() -> str | None:
    """The backend that a ``backend()`` block or FUSEDLOSS_BACKEND asks for, or None."""
    return _forced_here() if _forced_anywhere else _FROM_ENVIRONMENT


def _forced_here() -> str | None:
    blocks = _blocks.get()
    return blocks[-1][1] if blocks else _FROM_ENVIRONMENT


def resolve_backend(device_type: str) -> str:
    """The backend that serves `device_type`.

    Raises:
        RuntimeError: a backend was asked for that can't serve the device; the message says why.
    """
    name = forced()
    if name:
        reason = unavailable_reason(name, device_type)
        if reason:
            raise RuntimeError(f"backend '{name}' can't serve device '{device_type}': {reason}")
        return name
    preferred = _PREFERRED.get(device_type)
    if preferred is None:
        return "reference"
    reason = unavailable_reason(preferred, device_type)
    if reason is None:
        return preferred
    _warn_once(
        f"fusedloss: the {preferred} backend is unavailable on '{device_type}' ({reason}); plain PyTorch is used."
    )
    return "reference"


# torch.compiler.assume_constant_result does this and imports the compiler, which takes as long as torch itself.
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]
_forced_here._dynamo_marked_constant = True  # type: ignore[attr-defined]


def kernel(stem: str, function: str, device_type: str) -> Callable[..., Any]:
    """The function of the backend that serves `device_type`; `stem` is the file, `function` the name in it."""
    key = (stem, function, device_type, forced())
    found = _kernels.get(key)
    if found is None:
        name = resolve_backend(device_type)
        found = getattr(importlib.import_module(f"fusedloss.backends.{name}.{stem}"), function)
        guard = getattr(_module(name), "guarded", None)
        found = _kernels[key] = found if guard is None else guard(found)
    return found


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces one backend inside the block, in this thread or task: ``"reference"``, ``"cpp"`` or ``"triton"``.

    Raises:
        ValueError: another name.
        RuntimeError: at the call of an operation, when the backend can't serve its device; it says why.

    >>> import torch, fusedloss
    >>> with fusedloss.backend("reference"):
    ...     fusedloss.cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
    tensor(0.6931)
    """
    _check_name("backend", name)
    block = (object(), name)
    _enter(block)
    try:
        yield
    finally:
        _leave(block)


def _enter(block: tuple[object, str]) -> None:
    global _forced_anywhere
    with _lock:
        _forced_anywhere = tuple(sorted((*_forced_anywhere, block[1])))
    _blocks.set((*_blocks.get(), block))


def _leave(block: tuple[object, str]) -> None:
    """Takes out this block alone: blocks of generators may end in another order than they began."""
    global _forced_anywhere
    _blocks.set(tuple(other for other in _blocks.get() if other is not block))
    with _lock:
        names = list(_forced_anywhere)
        names.remove(block[1])
        _forced_anywhere = tuple(names)


def _check_name(source: str, name: object) -> None:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, NAMES))}; got {name!r}")


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"fusedloss.backends.{name}")


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warn_user(message, RuntimeWarning)


if _FROM_ENVIRONMENT:
    _check_name("FUSEDLOSS_BACKEND", _FROM_ENVIRONMENT)
