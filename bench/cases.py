"""What a benchmark is made of. An operation is a file here with ``CASES``, named in ``OPERATIONS``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

OPERATIONS = ("softmax_ce", "logit_losses", "class_stats", "linear_ce", "supcon")
# Figures that are to stay under their target; the others are to reach it.
AT_MOST = frozenset({"overhead_us", "peak"})


class Mismatch(Exception):
    """A contestant's values are wrong: none of its times may be shown."""


class Contest(NamedTuple):
    """A case with its tensors made.

    ``calls`` are timed: ``"fused"``, which the others are compared with, and its rivals. ``limit`` moves the
    same bytes, no more. ``peak_baseline`` is what ``"fused"`` must not exceed in peak memory.
    ``refill(i)`` writes new inputs before repetition i; ``check()`` raises `Mismatch`.
    """

    calls: dict[str, Callable[[], Any]]
    limit: Callable[[], Any]
    refill: Callable[[int], None]
    check: Callable[[], None]
    peak_baseline: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Case:
    """One line of a table.

    ``moved`` is the least traffic in bytes, ``limit`` what bounds it (``"copy"``, ``"read"``, ``"products"``). Keys of
    ``targets``: a rival (times faster than it), ``"fastest"`` (than the fastest rival), ``"share"`` (of the
    limit), ``"overhead_us"`` (over eager), ``"peak"`` (memory over the baseline's).
    """

    operation: str
    title: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    moved: int
    limit: str
    prepare: Callable[[], Contest]
    variant: str = ""
    divisor: int = 1
    targets: Mapping[str, float] = field(default_factory=dict)
    quick: bool = False
    timed: bool = True  # or only its peak memory is measured

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        """The case within its title."""
        upstream = f"loss/{self.divisor}" if self.divisor != 1 else ""
        return " ".join(filter(None, (str(self.shape), self.dtype_name, self.variant, upstream)))

    @property
    def name(self) -> str:
        return f"{self.title} {self.label}"


def cases_of(operation: str, quick: bool = False, match: str = "") -> list[Case]:
    """The cases of one operation; `quick` keeps a few small ones, `match` those whose name holds any of its parts."""
    cases = [case for case in importlib.import_module(f"bench.{operation}").CASES if case.quick or not quick]
    return [case for case in cases if any(part in case.name for part in match.split("|"))]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under ``torch.compile``, for one shape; forgets what was compiled before."""
    # Past its limit of recompilations torch.compile would quietly run the eager code.
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def reached(figure: str, value: float, target: float) -> bool:
    """Whether a figure is on the right side of its target."""
    return value <= target if figure in AT_MOST else value >= target
