"""Calls of the Triton backend: a file per stem, with ``variants(quick)`` and, where it has a tuning table, more.

What ``variants`` calls is only compiled, so that its tensors are left as they are allocated. What
``shape_classes(dtype, small)`` calls is timed in tiles of several sizes by ``bench.tune``, for the types in ``TUNED``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

ROWS = 64
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}


class Variant(NamedTuple):
    """A function of this package with its arguments."""

    function: Callable[..., None]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def name(self) -> str:
        """The function and what it gets, in words."""
        words = [self.function.__name__, *map(str, self.arguments)]
        for key, value in self.keywords.items():
            words.append(key if value is True else f"no {key}" if value is False else str(value))
        return " ".join(words)

    def __call__(self) -> None:
        self.function(*self.arguments, **self.keywords)


def variant(function: Callable[..., None], *arguments: Any, **keywords: Any) -> Variant:
    """The variant that is called so."""
    return Variant(function, arguments, keywords)


def compute_dtype(dtype: str) -> torch.dtype:
    """What the kernels compute in."""
    return torch.float64 if dtype == "f64" else torch.float32


class ShapeClass(NamedTuple):
    """An entry of a stem's tuning table: what is called to time it, and the entries to try."""

    name: str
    prepare: Callable[[torch.device], Callable[[], tuple[torch.Tensor, ...]]]
    candidates: list[tuple[int, ...]]


def stems() -> list[str]:
    """The stems that have variants."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def limited(tiles: Iterable[tuple[int, ...]], width: int) -> list[tuple[int, ...]]:
    """Product tiles whose step and block are no wider than the rows."""
    narrowed = (
        (rows, columns, min(step, width), min(block, width), warps, stages)
        for rows, columns, step, block, warps, stages in tiles
    )
    return list(dict.fromkeys(narrowed))


def shape_classes(stem: str, dtype: torch.dtype, small: bool) -> list[ShapeClass]:
    """The shape classes of a stem for one type."""
    return importlib.import_module(f"{__name__}.{stem}").shape_classes(dtype, small)


def tuned_types(stem: str) -> tuple[str, ...]:
    """The types that a stem's tiles are timed in, if it has any."""
    return getattr(importlib.import_module(f"{__name__}.{stem}"), "TUNED", ())


def every(quick: bool, of: Iterable[str] = ()) -> list[Variant]:
    """The variants of these stems, or of all; `quick` keeps one of each kernel, with all its options."""
    modules = [importlib.import_module(f"{__name__}.{stem}") for stem in of or stems()]
    return [found for module in modules for found in module.variants(quick)]
