"""Count, sum and square of the features of each class; no gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedloss.ops.library import answer, library

library.define(
    "class_stats(Tensor features, Tensor labels, Tensor(a!) shift, Tensor seen, int ignore_index,"
    " bool per_feature) -> (Tensor, Tensor, Tensor)"
)
answer("class_stats", "class_stats")


@torch.library.register_fake("fusedloss::class_stats", lib=library)
def _(features, labels, shift, seen, ignore_index, per_feature):
    square = torch.empty_like(shift) if per_feature else shift.new_empty(shift.shape[0])
    return torch.empty_like(seen), torch.empty_like(shift), square


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
