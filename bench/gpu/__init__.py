"""What is timed on a GPU: a file per stem, with ``cases(small)``; ``python -m bench.gpu`` runs them."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.cases import Mismatch

Call = Callable[[], Any]


class Contest(NamedTuple):
    """A case with its tensors made: ``"fused"`` and its rivals, and a check that names the rivals that are wrong.

    The check raises Mismatch where ``"fused"`` is.
    """

    calls: dict[str, Call]
    check: Callable[[], list[str]]


@dataclass(frozen=True)
class Case:
    """One line of a table. ``work`` is bytes (limits ``"copy"``, ``"read"``) or operations (``"gemm"``).

    ``part`` is one of the stem's ``PARTS``, where its cases take longer than a mode of ``bench/gpu.sh`` may.
    """

    stem: str
    label: str
    work: float
    limit: str
    prepare: Callable[[torch.device], Contest]
    part: str = ""


def stems() -> list[str]:
    """The stems that have cases."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def cases_of(stem: str, small: bool, part: str = "") -> list[Case]:
    """The cases of one stem, or of a part of it; `small` ones take seconds in Triton's interpreter."""
    cases = importlib.import_module(f"{__name__}.{stem}").cases(small)
    return [case for case in cases if part in ("", case.part)]


def parts_of(stem: str) -> tuple[str, ...]:
    """The parts of one stem, none for most."""
    return getattr(importlib.import_module(f"{__name__}.{stem}"), "PARTS", ())


def installed(package: str) -> bool:
    """Whether a rival's package is there."""
    return importlib.util.find_spec(package) is not None


def values_of(calls: Mapping[str, Callable[[], tuple[Tensor, ...]]]) -> dict[str, tuple[Tensor, ...]]:
    """What each contestant computes, of those that find memory for it."""
    found = {}
    for name, call in calls.items():
        try:
            found[name] = call()
        except torch.OutOfMemoryError:
            if name == "fused":
                raise
            torch.cuda.empty_cache()
    return found


def agree(found: Mapping[str, tuple[Tensor, ...]], truth: tuple[Tensor, ...], tolerance: float) -> list[str]:
    """The rivals that are neither as near to `truth` as eager nor within `tolerance` of its largest.

    Raises:
        Mismatch: ``"fused"`` is not.
    """
    errors = {
        name: [float((one.double() - right).abs().max() / right.abs().max().clamp(min=1e-30)) for one, right in pairs]
        for name, values in found.items()
        for pairs in [list(zip(values, truth, strict=True))]
    }
    usual = errors.get("eager", [0.0] * len(truth))
    wrong = [
        name
        for name, each in errors.items()
        if not all(error <= max(tolerance, 1.1 * allowed) for error, allowed in zip(each, usual, strict=True))
    ]
    if "fused" in wrong:
        raise Mismatch(f"fused: {errors['fused']} from float64; eager: {usual}")
    return wrong
