"""Statistics of features, without gradients: those of each class, and those of the rows' norms.

``class_stats``     count, sum and square of each class; ``advance`` moves running statistics by them.
``row_magnitudes``  the sum of |x| of each row; ``moments`` count, mean and squared deviation of one number per row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedloss import backends
from fusedloss.backends.reference import class_stats as reference
from fusedloss.core.dtypes import compute_dtype
from fusedloss.ops.library import answer, call, library

library.define(
    "class_stats(Tensor features, Tensor labels, Tensor(a!) shift, Tensor seen, int ignore_index,"
    " bool per_feature) -> (Tensor, Tensor, Tensor)"
)
library.define("row_magnitudes(Tensor rows) -> Tensor")
library.define("moments(Tensor values, Tensor? labels, int ignore_index) -> Tensor")
for _function in ("class_stats", "row_magnitudes", "moments"):
    answer("class_stats", _function)


@torch.library.register_fake("fusedloss::class_stats", lib=library)
def _(features, labels, shift, seen, ignore_index, per_feature):
    square = torch.empty_like(shift) if per_feature else shift.new_empty(shift.shape[0])
    return torch.empty_like(seen), torch.empty_like(shift), square


@torch.library.register_fake("fusedloss::row_magnitudes", lib=library)
def _(rows):
    return rows.new_empty(rows.shape[0], dtype=compute_dtype(rows.dtype))


@torch.library.register_fake("fusedloss::moments", lib=library)
def _(values, labels, ignore_index):
    return values.new_empty(3, dtype=torch.float64)


class ClassTensors(NamedTuple):
    """What class_stats returns; see the reference for the formulas."""

    count: Tensor  # type: ignore[assignment]  # tuple has a method of this name
    sum: Tensor
    square: Tensor


def class_stats(
    features: Tensor, labels: Tensor, shift: Tensor, seen: Tensor, ignore_index: int, per_feature: bool
) -> ClassTensors:
    """Sums by class about `shift`; that of a class never seen before is first set to a row of the class."""
    return ClassTensors(
        *torch.ops.fusedloss.class_stats.default(features, labels, shift, seen, ignore_index, per_feature)
    )


class ClassState(NamedTuple):
    """Running statistics: count int64 (K,), mean (K, D), scatter float64 (K,), and perhaps variance (K, D)."""

    count: Tensor  # type: ignore[assignment]
    mean: Tensor
    scatter: Tensor
    variance: Tensor | None


def advance(state: ClassState, found: ClassTensors, shift: Tensor, momentum: float | None) -> None:
    """Moves the state in place by what class_stats `found` about `shift`; see the reference for the formulas."""
    if torch.compiler.is_compiling():
        reference.advance(state, found.count, shift, found.sum, found.square, momentum)
    else:
        move = backends.kernel("class_stats", "advance", state.mean.device.type)
        move(state, found.count, shift, found.sum, found.square, momentum)


def row_magnitudes(rows: Tensor) -> Tensor:
    """``sum_d |x_id|`` of rows ``(B, D)``: ``(B,)`` in float32, float64 for float64 rows."""
    return call("class_stats", "row_magnitudes", rows.detach())


def moments(values: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor:
    """``(3,)`` in float64: count, mean and mean squared deviation of the values ``(B,)`` whose label is kept."""
    return call("class_stats", "moments", values.detach(), labels, ignore_index)
