"""Sums and squares of features by class in plain PyTorch: the contract of every backend of class_stats."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fusedloss.core.checks import check_labels
from fusedloss.core.dtypes import compute_dtype

# Rows with larger values are left out. Twin of kLargestValue in csrc/class_stats.h.
LARGEST_VALUE = 2.0**50
_ROWS_AT_ONCE = 4096


def class_stats(
    features: Tensor, labels: Tensor, shift: Tensor, seen: Tensor, ignore_index: int, per_feature: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row count, sum and square of the features of each class, about a shift of that class.

    Over the rows i with labels[i] = c:  ``count_c = Σ 1``,  ``sum_c = Σ (f_i - shift_c)``  and
    ``square_c = Σ |f_i - shift_c|²`` (``per_feature``: ``square_cd = Σ (f_id - shift_cd)²``).

    A row with a value that is not finite, or larger than 2^50 in magnitude, is left out, for one such row would spoil
    running statistics for good; how many of the rows kept so far were left out is returned.

    Where ``seen[c] == 0`` and the batch holds class c there is no mean to use as a shift: the first row of
    class c that is not left out, in the order of the batch, is first written to ``shift[c]`` (widened, so exact).
    This is the only write to an argument.

    Args:
        features: ``(B, D)``, float32, float64, bfloat16 or float16, any strides; B may be 0. Widened to T,
            float64 for float64 features and float32 for the others, before anything is subtracted.
        labels: int64 ``(B,)``, any stride. Rows labelled `ignore_index` are left out, even if it lies in
            [0, K).
        shift: ``(K, D)`` in T, any strides. Changed in place as said above.
        seen: int64 ``(K,)``: rows of each class seen before; only whether it is 0 counts.
        ignore_index: the label that is left out.
        per_feature: one square per feature in place of one per class.

    Returns:
        count int64 ``(K,)``; sum ``(K, D)`` in T; square ``(K,)`` in T, ``(K, D)`` with `per_feature`; the number of
        rows that are labelled in [0, K) and were left out, int64 ``()``. A class without rows has zeros. Sums are
        accumulated so that their error does not grow with the number of rows, and rounded to T once.

    Raises:
        IndexError: on the CPU, a label outside [0, K) that is not `ignore_index`; it names the first such
            row, and `shift` is unchanged. On other devices such a row is the caller's to find.
    """
    num_classes, width = shift.shape
    if labels.device.type == "cpu":
        check_labels(labels, num_classes, ignore_index)
    labelled = labels != ignore_index
    usable = usable_rows(features)
    # Rows left out go to one more class, dropped at the end, so that no shape depends on values.
    slot = torch.where(labelled & usable, labels, num_classes)
    count = torch.zeros(num_classes + 1, dtype=torch.int64, device=slot.device)
    count.index_add_(0, slot, torch.ones_like(slot))
    if len(features) and num_classes:
        _start_new_classes(features, slot, shift, (seen == 0) & (count[:num_classes] > 0))
    total = torch.zeros(num_classes + 1, width, dtype=torch.float64, device=shift.device)
    square = torch.zeros_like(total if per_feature else total[:, 0])
    padded_shift = torch.cat([shift, shift.new_zeros(1, width)])
    for rows, slots in zip(features.split(_ROWS_AT_ONCE), slot.split(_ROWS_AT_ONCE), strict=True):
        deviation = rows.to(torch.float64) - padded_shift[slots]
        total.index_add_(0, slots, deviation)
        squared = deviation.square()
        square.index_add_(0, slots, squared if per_feature else squared.sum(1))
    total, square = (sums[:num_classes].to(shift.dtype).contiguous() for sums in (total, square))
    return count[:num_classes].clone(), total, square, (labelled & ~usable).sum()


def usable_rows(features: Tensor) -> Tensor:
    """Which rows ``(B, D)`` hold finite values of at most LARGEST_VALUE alone: bool ``(B,)``."""
    largest: Tensor = torch.linalg.vector_norm(features, math.inf, dim=1, dtype=compute_dtype(features.dtype))
    return largest <= LARGEST_VALUE


def update_class_stats(
    count: Tensor, mean: Tensor, scatter: Tensor, variance: Tensor | None, rows: Tensor, shift: Tensor | None,
    sums: Tensor, squares: Tensor, momentum: float | None,
) -> None:  # fmt: skip
    """Moves running statistics, in place, by the sums that ``class_stats`` returned of a batch.

    `shift` is the mean but for rows of new classes; with n rows of a class, ``deviation = sum / n``,
    ``square = squares / n`` and weight w (n over all rows seen, or `momentum`, 1 for a new class, 0 for an absent
    one) this is Chan's step ``mean = shift + w deviation`` and
    ``scatter += w (square - w |deviation|² - scatter)``, which subtracts nothing large.

    Args:
        count: int64 ``(K,)``. mean: ``(K, D)``. scatter: float64 ``(K,)``. variance: ``(K, D)`` or None: the state.
        rows, sums, squares: of class_stats; the last two may be overwritten.
        shift: ``(K, D)`` as class_stats left it; None where that is the mean itself.
        momentum: weight of the batch; None where every row counts the same.
    """
    divisor = rows.clamp(min=1)
    deviation = sums.div_(divisor.unsqueeze(1))
    square = squares.div_(divisor if variance is None else divisor.unsqueeze(1))
    total = count + rows
    if momentum is None:
        weight = rows / total.clamp(min=1).double()
    else:
        weight = torch.full_like(scatter, momentum).masked_fill_(count == 0, 1.0)
        weight.mul_(rows > 0)
    column = weight.to(deviation.dtype).unsqueeze(1)
    if variance is None:
        distance = torch.linalg.vector_norm(deviation, dim=1).double().square()
    else:
        distances = deviation.square()
        distance = distances.sum(1, dtype=torch.float64)
        step = (square - distances.mul_(column)).sub_(variance).mul_(column)
        variance.add_(step).clamp_(min=0)
        square = square.sum(1, dtype=torch.float64)
    scatter.add_((square - weight * distance - scatter).mul_(weight)).clamp_(min=0)
    if shift is None:
        mean.addcmul_(deviation, column)
    else:
        mean.copy_(torch.addcmul(shift, deviation, column))
    count.copy_(total)


def update_from_rows(
    features: Tensor, labels: Tensor, count: Tensor, mean: Tensor, scatter: Tensor, variance: Tensor | None,
    ignore_index: int, momentum: float | None,
) -> Tensor:  # fmt: skip
    """Moves running statistics, in place, by the rows of a batch, about the mean; returns how many were left out.

    This is ``class_stats`` and ``update_class_stats`` of the same arguments, and what a backend may do in one pass.
    """
    arguments = (features, labels, count, mean, scatter, variance, ignore_index, momentum)
    return update_by_sums(class_stats, update_class_stats, *arguments)


def update_by_sums(
    class_stats: Callable[..., tuple[Tensor, ...]], update_class_stats: Callable[..., None], features: Tensor,
    labels: Tensor, count: Tensor, mean: Tensor, scatter: Tensor, variance: Tensor | None, ignore_index: int,
    momentum: float | None,
) -> Tensor:  # fmt: skip
    """``update_from_rows`` by a backend's two steps."""
    shift = mean.to(compute_dtype(features.dtype))
    rows, sums, squares, skipped = class_stats(features, labels, shift, count, ignore_index, variance is not None)
    about = None if shift is mean else shift
    update_class_stats(count, mean, scatter, variance, rows, about, sums, squares, momentum)
    return skipped


def row_magnitudes(rows: Tensor) -> Tensor:
    """``sum_d |x_id|`` of rows ``(B, D)``, added in float64 and rounded once; see ``ops.compute_dtype``."""
    magnitudes: Tensor = torch.linalg.vector_norm(rows, 1, dim=1, dtype=torch.float64)
    return magnitudes.to(compute_dtype(rows.dtype))


def moments(values: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor:
    """Count, mean and mean squared deviation of the values ``(B,)`` that are kept, and the number left out.

    Kept are those whose label is not `ignore_index` and that are finite and at most 2^50 in magnitude; without any,
    mean and squared deviation are 0. The number left out counts values that are labelled and not finite or too large.
    Returns ``(4,)`` in float64.
    """
    labelled = torch.ones_like(values, dtype=torch.bool) if labels is None else labels != ignore_index
    wide = values.double()
    usable = wide.abs() <= LARGEST_VALUE
    kept = labelled & usable
    count = kept.sum().double()
    wide = torch.where(kept, wide, 0.0)
    mean = wide.sum() / count.clamp(min=1)
    square = torch.where(kept, wide - mean, 0.0).square().sum() / count.clamp(min=1)
    return torch.stack([count, mean, square, (labelled & ~usable).sum().double()])


def _start_new_classes(features: Tensor, slot: Tensor, shift: Tensor, new: Tensor) -> None:
    rows = torch.arange(len(slot), device=slot.device)
    first = torch.full((len(shift) + 1,), len(slot) - 1, device=slot.device)
    first.scatter_reduce_(0, slot, rows, "amin")
    provisional = features.index_select(0, first[:-1]).to(shift.dtype)
    shift.copy_(torch.where(new.unsqueeze(1), provisional, shift))
