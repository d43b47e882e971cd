"""What is timed on a GPU: a file per stem, with ``cases(small)``; ``python -m bench.gpu`` runs them."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.cases import Mismatch

Call = Callable[[], Any]
# Contestants of other packages, in the versions that happen to be installed: their errors are no reason to stop.
PEERS = ("liger", "quack", "cce", "pml")


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
    """What each contestant computes, of those that can; ``"fused"`` has to."""
    found = {}
    for name, call in calls.items():
        failed = attempt(name, lambda call=call, name=name: found.__setitem__(name, call()))  # type: ignore[misc]
        if failed and name == "fused":
            raise torch.OutOfMemoryError("fused")
    return found


def attempt(name: str, call: Call) -> str:
    """Why a contestant can't make a call: ``"out of memory"``, ``"failed"`` (a peer; it is printed why), or ``""``."""
    try:
        call()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory"
    except Exception as error:
        if name not in PEERS:
            raise
        print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr)
        return "failed"
    return ""


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
