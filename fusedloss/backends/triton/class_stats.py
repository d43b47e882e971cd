"""Sums and squares of features by class on a GPU: one pass over the features, without float atomics.

A stable sort of the labels brings the rows of a class together, and programs take segments of equally many of them: one
class with most of the rows, or rows that come sorted, cost what even ones do. The running statistics move in the same
pass where a program holds whole rows. ``class_kernels`` says how; nothing waits for the device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedloss.backends.reference import class_stats as reference
from fusedloss.backends.reference.class_stats import moments as moments
from fusedloss.core.checks import check_labels
from fusedloss.core.dtypes import compute_dtype

from . import class_kernels as kernels
from . import launch

# Steps under way where few programs wait for memory: more registers than that spill.
_FEW_STEPS = 2
_ALIGNED = 16  # the one multiple that Triton looks for
# Fewer segments than this are added one by one.
_FEW_SEGMENTS = 16
_LABELS_AT_ONCE, _CLASSES_AT_ONCE = 1024, 128
_KEY_WARPS = 4
_WIDEST_KEY = torch.iinfo(torch.int16).max


class _Pass(NamedTuple):
    """The launches of one call: what all of them read, and their tile."""

    features: kernels.Features
    rows: kernels.Rows
    faults: kernels.Faults
    segments: int
    tile: launch.FeatureTile
    device: torch.device
    item_size: int

    def start(self, kernel: Any, programs: int, arguments: tuple[Any, ...], **constants: Any) -> None:
        tile = self.tile
        blocks = 1 if kernel is kernels.check_kernel else self.features.blocks
        launch.start(
            kernel, (programs, blocks), arguments, self.device, tile.warps, tile.stages, BLOCK=tile.block, **constants
        )

    @property
    def lanes(self) -> int:
        """Rows that the threads of a program read at once, 16 bytes each."""
        together = 32 * self.tile.warps * 16 // self.item_size
        return max(1, min(self.tile.rows, together // self.tile.block))


def class_stats(
    features: Tensor, labels: Tensor, shift: Tensor, seen: Tensor, ignore_index: int, per_feature: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row count, sum and square of each class's features about its shift; the contract is the reference's."""
    num_classes, width = shift.shape
    own_shift = shift.contiguous()
    call = _prepare(features, labels, num_classes, ignore_index)
    blocks = call.features.blocks
    count, total = seen.new_zeros(num_classes), shift.new_zeros(num_classes, width)
    square = shift.new_zeros(num_classes, width if per_feature else blocks)
    _sum(call, kernels.State(own_shift, seen.contiguous(), total, square, count), per_feature, shift)
    if own_shift is not shift:
        shift.copy_(own_shift)
    if not per_feature:
        square = square[:, 0] if blocks == 1 else square.sum(1, dtype=torch.float64).to(shift.dtype)
    return count, total, square, call.faults.skipped


def update_class_stats(
    count: Tensor, mean: Tensor, scatter: Tensor, variance: Tensor | None, rows: Tensor, shift: Tensor | None,
    sums: Tensor, squares: Tensor, momentum: float | None,
) -> None:  # fmt: skip
    """Moves running statistics by the sums of a batch; the contract is the reference's."""
    about = mean if shift is None else shift
    if not _fit(count, mean, scatter, variance, rows, about, sums, squares) or about.dtype != mean.dtype:
        reference.update_class_stats(count, mean, scatter, variance, rows, shift, sums, squares, momentum)
        return
    num_classes, width = mean.shape
    tile = launch.feature_tile(width, len(rows), mean.dtype, mean.device)
    state = kernels.State(mean, count, sums, squares, rows, scatter, variance, _bits(momentum))
    launch.start(
        kernels.update_kernel, (num_classes,), (state, about, width), mean.device, tile.warps,
        PER_FEATURE=variance is not None, T=launch.triton_dtype(mean.dtype), BLOCK=tile.block,
    )  # fmt: skip


def update_from_rows(
    features: Tensor, labels: Tensor, count: Tensor, mean: Tensor, scatter: Tensor, variance: Tensor | None,
    ignore_index: int, momentum: float | None,
) -> Tensor:  # fmt: skip
    """Moves running statistics by the rows of a batch; the contract is the reference's."""
    num_classes, width = mean.shape
    tile = launch.feature_tile(width, len(features), features.dtype, features.device)
    if tile.block < width or mean.dtype != compute_dtype(features.dtype) or not _fit(count, mean, scatter, variance):
        arguments = (features, labels, count, mean, scatter, variance, ignore_index, momentum)
        return reference.update_by_sums(class_stats, update_class_stats, *arguments)
    call = _prepare(features, labels, num_classes, ignore_index)
    state = kernels.State(mean, count, scatter=scatter, variance=variance, momentum=_bits(momentum))
    _sum(call, state, variance is not None, mean)
    return call.faults.skipped  # type: ignore[no-any-return]


def row_magnitudes(rows: Tensor) -> Tensor:
    magnitudes: Tensor = torch.linalg.vector_norm(rows, 1, dim=1, dtype=compute_dtype(rows.dtype))
    return magnitudes


def _fit(*parts: Tensor | None) -> bool:
    return all(part is None or part.is_contiguous() for part in parts)


def _bits(momentum: float | None) -> int | None:
    return None if momentum is None else launch.float64_bits(momentum)


def _prepare(features: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> _Pass:
    """The rows sorted by class, and room to say which are left out."""
    if labels.device.type == "cpu":
        check_labels(labels, num_classes, ignore_index)
    num_rows, width = features.shape
    device = features.device
    tile = launch.feature_tile(width, num_rows, features.dtype, device)
    keys = labels.new_empty(num_rows, dtype=torch.int16 if num_classes <= _WIDEST_KEY else torch.int32)
    launch.start(
        kernels.key_kernel, (triton.cdiv(num_rows, _LABELS_AT_ONCE),),
        (labels, labels.stride(0), keys, num_rows, num_classes, ignore_index), device, _KEY_WARPS,
        BLOCK=_LABELS_AT_ONCE,
    )  # fmt: skip
    keys, order = keys.sort(stable=True)
    first_row = labels.new_empty(num_classes + 1)
    launch.start(
        kernels.bounds_kernel, (triton.cdiv(num_classes + 1, _CLASSES_AT_ONCE),),
        (keys, first_row, num_rows, num_classes, num_rows.bit_length()), device, _KEY_WARPS, BLOCK=_CLASSES_AT_ONCE,
    )  # fmt: skip
    segments = triton.cdiv(num_rows, tile.chunk)
    dropped, from_end, faulty, skipped = labels.new_zeros(2 * num_classes + segments + 1).split(
        (num_classes, num_classes, segments, 1)
    )
    blocks = triton.cdiv(width, tile.block)
    align = math.gcd(width, features.stride(0), _ALIGNED)
    view = kernels.Features(
        features, features.stride(0) // align, features.stride(1), width // align, blocks, tl.constexpr(align)
    )
    return _Pass(
        view,
        kernels.Rows(order, keys, first_row, num_rows, num_classes, tile.chunk),
        kernels.Faults(faulty, keys.new_empty(num_rows, dtype=torch.int8), dropped, from_end, skipped[0]),
        segments, tile, device, features.element_size(),
    )  # fmt: skip


def _sum(call: _Pass, state: kernels.State, per_feature: bool, like: Tensor) -> None:
    """Goes through the rows, again through segments with rows that are left out, and adds what spans segments."""
    features, rows, faults, segments, tile, *_ = call
    width = like.shape[1]
    square_width = width if per_feature else features.blocks
    grouped = segments >= _FEW_SEGMENTS
    group = triton.next_power_of_2(math.isqrt(segments)) if grouped else segments + 1
    groups = segments // group
    parts = kernels.Parts(
        like.new_empty(2 * segments, width), like.new_empty(2 * segments, square_width),
        like.new_empty(groups, width, dtype=torch.float64),
        like.new_empty(groups, square_width, dtype=torch.float64), group,
    )  # fmt: skip
    compute, lanes = launch.triton_dtype(like.dtype), call.lanes
    steps = tile.rows // lanes
    sizes = {"PER_FEATURE": per_feature, "LANES": lanes, "UNROLL": steps}
    arguments = (features, rows, faults, parts, state)
    call.start(kernels.sum_kernel, segments, arguments, REPAIR=False, T=compute, **sizes)
    call.start(kernels.check_kernel, segments, (features, rows, faults), T=compute, LANES=lanes)
    call.start(kernels.sum_kernel, segments, arguments, REPAIR=True, T=compute, **sizes)
    sizes["UNROLL"] = min(_FEW_STEPS, steps)
    call.start(kernels.group_kernel, groups, (features, rows, parts), **sizes)
    call.start(kernels.class_kernel, max(0, segments - 1), arguments, T=compute, **sizes)
