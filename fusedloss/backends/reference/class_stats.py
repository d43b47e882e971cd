"""Sums and squares of features by class in plain PyTorch: the contract of every backend of class_stats."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedloss.core.checks import check_labels as check_labels

_ROWS_AT_ONCE = 4096


def class_stats(
    features: Tensor, labels: Tensor, shift: Tensor, seen: Tensor, ignore_index: int, per_feature: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Row count, sum and square of the features of each class, about a shift of that class.

    Over the rows i with labels[i] = c:  ``count_c = Σ 1``,  ``sum_c = Σ (f_i - shift_c)``  and
    ``square_c = Σ |f_i - shift_c|²`` (``per_feature``: ``square_cd = Σ (f_id - shift_cd)²``).

    Where ``seen[c] == 0`` and the batch holds class c there is no mean to use as a shift: the first row of
    class c, in the order of the batch, is first written to ``shift[c]`` (widened, so exact). This is the only
    write to an argument.

    Args:
        features: ``(B, D)``, float32, float64, bfloat16 or float16, any strides; B may be 0. Widened to T,
            float64 for float64 features and float32 for the others, before anything is subtracted.
        labels: int64 ``(B,)``, any stride. Rows labelled `ignore_index` are left out, even if it lies in
            [0, K).
        shift: ``(K, D)`` in T, contiguous. Changed in place as said above.
        seen: int64 ``(K,)``, contiguous: rows of each class seen before; only whether it is 0 counts.
        ignore_index: the label that is left out.
        per_feature: one square per feature in place of one per class.

    Returns:
        count int64 ``(K,)``; sum ``(K, D)`` in T; square ``(K,)`` in T, ``(K, D)`` with `per_feature`. An
        absent class has zeros. Sums are accumulated so that their error does not grow with the number of
        rows, and rounded to T once. A NaN or infinite feature reaches its own class alone.

    Raises:
        IndexError: on the CPU, a label outside [0, K) that is not `ignore_index`; it names the first such
            row, and `shift` is unchanged. On other devices such a row is the caller's to find.
    """
    num_classes, width = shift.shape
    if labels.device.type == "cpu":
        check_labels(labels, num_classes, ignore_index)
    # Ignored rows go to one more class, dropped at the end, so that no shape depends on values.
    slot = torch.where(labels == ignore_index, num_classes, labels)
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
    total, square = (found[:num_classes].to(shift.dtype) for found in (total, square))
    return count[:num_classes].clone(), total.contiguous(), square.contiguous()


def advance(
    state: tuple[Tensor, Tensor, Tensor, Tensor | None], rows: Tensor, shift: Tensor, sums: Tensor, squares: Tensor,
    momentum: float | None,
) -> None:  # fmt: skip
    """Moves running statistics, in place, by what ``class_stats`` found of a batch.

    `shift` is the mean but for rows of new classes; with n rows of a class, ``deviation = sum / n``,
    ``square = squares / n`` and weight w (n over all rows seen, or `momentum`, 1 for a new class, 0 for an absent
    one) this is Chan's step ``mean = shift + w deviation`` and
    ``scatter += w (square - w |deviation|² - scatter)``, which subtracts nothing large.

    Args:
        state: count int64 ``(K,)``, mean ``(K, D)``, scatter float64 ``(K,)``, variance ``(K, D)`` or None.
        rows, sums, squares: what class_stats returned; may be overwritten.
        shift: ``(K, D)`` as class_stats left it; may be the mean itself.
        momentum: weight of the batch; None where every row counts the same.
    """
    count, mean, scatter, variance = state
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
    moved = shift.addcmul_(deviation, column)
    if moved is not mean:
        mean.copy_(moved)
    count.copy_(total)


def row_magnitudes(rows: Tensor) -> Tensor:
    """``sum_d |x_id|`` of rows ``(B, D)``, added in float64 and rounded once; see ``ops.compute_dtype``."""
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(rows, 1, dim=1, dtype=torch.float64).to(dtype)


def moments(values: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor:
    """Count, mean and mean squared deviation, ``(3,)`` in float64, of the values ``(B,)`` whose label is kept.

    Without any the last two are 0. What is left out does not count even where it is NaN.
    """
    kept = torch.ones_like(values, dtype=torch.bool) if labels is None else labels != ignore_index
    count = kept.sum().double()
    wide = torch.where(kept, values.double(), 0.0)
    mean = wide.sum() / count.clamp(min=1)
    square = torch.where(kept, wide - mean, 0.0).square().sum() / count.clamp(min=1)
    return torch.stack([count, mean, square])


def _start_new_classes(features: Tensor, slot: Tensor, shift: Tensor, new: Tensor) -> None:
    rows = torch.arange(len(slot), device=slot.device)
    first = torch.full((len(shift) + 1,), len(slot) - 1, device=slot.device)
    first.scatter_reduce_(0, slot, rows, "amin")
    provisional = features.index_select(0, first[:-1]).to(shift.dtype)
    shift.copy_(torch.where(new.unsqueeze(1), provisional, shift))
