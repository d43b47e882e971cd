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


class Contest(NamedTuple):
    """A case with its tensors made: ``"fused"`` and its rivals, and a check that raises Mismatch."""

    calls: dict[str, Callable[[], Any]]
    check: Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One line of a table. ``work`` is bytes (limits ``"copy"``, ``"read"``) or operations (``"gemm"``)."""

    stem: str
    label: str
    work: float
    limit: str
    prepare: Callable[[torch.device], Contest]


def stems() -> list[str]:
    """The stems that have cases."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def cases_of(stem: str, small: bool) -> list[Case]:
    """The cases of one stem; `small` ones take seconds in Triton's interpreter."""
    return importlib.import_module(f"{__name__}.{stem}").cases(small)


def installed(package: str) -> bool:
    """Whether a rival's package is there."""
    return importlib.util.find_spec(package) is not None


def agree(found: Mapping[str, tuple[Tensor, ...]], truth: tuple[Tensor, ...], tolerance: float) -> None:
    """Raises Mismatch unless each contestant is as near to `truth` as eager, or within `tolerance` of its largest."""
    errors = {
        name: [float((one.double() - right).abs().max() / right.abs().max().clamp(min=1e-30)) for one, right in pairs]
        for name, values in found.items()
        for pairs in [list(zip(values, truth, strict=True))]
    }
    for name, each in errors.items():
        for error, allowed in zip(each, errors["eager"], strict=True):
            if not error <= max(tolerance, 1.1 * allowed):
                raise Mismatch(f"{name}: {each} from float64; eager: {errors['eager']}")
