"""Statistics of features, without gradients: those of each class, and those of the rows' norms.

``class_stats``         count, sum and square of each class; ``update_class_stats`` moves running statistics by them.
``update_from_rows``    both at once, where the sums are not needed for themselves.
``row_magnitudes``      the sum of |x| of each row; ``moments`` count, mean and squared deviation of one number per row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedloss import backends
from fusedloss.core.dtypes import FLOATING, LABELS, compute_dtype
from fusedloss.ops.checks import check_operand
from fusedloss.ops.library import define, is_direct

_STEM = "class_stats"


class ClassTensors(NamedTuple):
    """What class_stats returns; see the reference for the formulas."""

    count: Tensor  # type: ignore[assignment]  # tuple has a method of this name
    sum: Tensor
    square: Tensor
    skipped: Tensor


class ClassState(NamedTuple):
    """Running statistics: count int64 (K,), mean (K, D), scatter float64 (K,), and perhaps variance (K, D)."""

    count: Tensor  # type: ignore[assignment]
    mean: Tensor
    scatter: Tensor
    variance: Tensor | None


def class_stats(
    features: Tensor, labels: Tensor, shift: Tensor, seen: Tensor, ignore_index: int, per_feature: bool
) -> ClassTensors:
    """Sums by class about `shift`; that of a class never seen before is first set to a row of the class."""
    tensors = (features, labels, shift, seen)
    return ClassTensors(*_call("class_stats", tensors, ignore_index, per_feature))


def update_class_stats(state: ClassState, batch: ClassTensors, shift: Tensor | None, momentum: float | None) -> None:
    """Moves `state` in place by the sums of a batch about `shift` (None: the mean); may overwrite sums and squares."""
    _call("update_class_stats", (*state, batch.count, shift, batch.sum, batch.square), momentum)


def update_from_rows(
    state: ClassState, features: Tensor, labels: Tensor, ignore_index: int, momentum: float | None
) -> Tensor:
    """Moves `state` in place by rows about its mean; returns how many were left out, int64 ``()``."""
    return _call("update_from_rows", (features, labels, *state), ignore_index, momentum)  # type: ignore[no-any-return]


def row_magnitudes(rows: Tensor) -> Tensor:
    """``sum_d |x_id|`` of rows ``(B, D)``: ``(B,)`` in float32, float64 for float64 rows."""
    return _call("row_magnitudes", (rows.detach(),))  # type: ignore[no-any-return]


def moments(values: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor:
    """``(4,)`` in float64: count, mean and mean squared deviation of the values ``(B,)`` kept, and the number left out.

    Left out are values that are not finite; values labelled `ignore_index` count nowhere.
    """
    return _call("moments", (values.detach(), labels), ignore_index)  # type: ignore[no-any-return]


def _check_class_stats(
    features: Tensor, labels: Tensor, shift: Tensor, seen: Tensor, ignore_index: int, per_feature: bool
) -> None:
    _check_floating("features", features, 2, "(B, D)")
    num_rows, width = features.shape
    compute = compute_dtype(features.dtype)
    if _is_usual(labels, shift, seen, (num_rows, width), compute, features.device):
        return
    if width < 1:
        raise ValueError(f"features must have at least one column; got shape {tuple(features.shape)}")
    check_operand("labels", labels, (num_rows,), torch.int64, features)
    check_operand("seen", seen, tuple(seen.shape) if seen.dim() == 1 else ("K",), torch.int64, features)
    check_operand("shift", shift, (seen.shape[0], width), compute, features)


def _is_usual(
    labels: Tensor, shift: Tensor, seen: Tensor, size: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether the usual types, shapes and devices were given: faster than looking at each for a message."""
    return (
        size[1] > 0
        and labels.shape == size[:1]
        and (*seen.shape, size[1]) == shift.shape
        and labels.dtype == seen.dtype == torch.int64
        and shift.dtype == dtype
        and labels.device == shift.device == seen.device == device
    )


def _check_update(
    count: Tensor, mean: Tensor, scatter: Tensor, variance: Tensor | None, rows: Tensor, shift: Tensor | None,
    sums: Tensor, squares: Tensor, momentum: float | None,
) -> None:  # fmt: skip
    _check_mean(mean, momentum)
    if _is_consistent(count, mean, scatter, variance, rows, shift, sums, squares):
        return
    size, classes = tuple(mean.shape), tuple(mean.shape[:1])
    _check_state(count, mean, scatter, variance)
    check_operand("rows", rows, classes, torch.int64, mean)
    # Sums of float64 features move a float32 state.
    dtype = mean.dtype if sums.dtype == mean.dtype else torch.float64
    check_operand("sums", sums, size, dtype, mean)
    check_operand("shift", shift, size, dtype, mean)
    check_operand("squares", squares, classes if variance is None else size, dtype, mean)


def _check_mean(mean: Tensor, momentum: float | None) -> None:
    _check_floating("mean", mean, 2, "(K, D)")
    if momentum is not None and not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must be None or in [0, 1]; got {momentum}")


def _check_state(count: Tensor, mean: Tensor, scatter: Tensor, variance: Tensor | None) -> None:
    size, classes = tuple(mean.shape), tuple(mean.shape[:1])
    check_operand("count", count, classes, torch.int64, mean)
    check_operand("scatter", scatter, classes, torch.float64, mean)
    check_operand("variance", variance, size, mean.dtype, mean)


def _check_update_from_rows(
    features: Tensor, labels: Tensor, count: Tensor, mean: Tensor, scatter: Tensor, variance: Tensor | None,
    ignore_index: int, momentum: float | None,
) -> None:  # fmt: skip
    _check_mean(mean, momentum)
    _check_floating("features", features, 2, "(B, D)")
    if mean.dtype == torch.float64 and features.dtype != torch.float64:
        raise TypeError(f"features must be torch.float64, as mean is; got {features.dtype}")
    num_rows, width = features.shape
    if width < 1:
        raise ValueError(f"features must have at least one column; got shape {tuple(features.shape)}")
    if not _is_usual(labels, mean, count, (num_rows, width), mean.dtype, features.device):
        check_operand("labels", labels, (num_rows,), torch.int64, features)
        check_operand("mean", mean, (mean.shape[0], width), mean.dtype, features)
    _check_state(count, mean, scatter, variance)


def _is_consistent(
    count: Tensor, mean: Tensor, scatter: Tensor, variance: Tensor | None, rows: Tensor, shift: Tensor | None,
    sums: Tensor, squares: Tensor,
) -> bool:  # fmt: skip
    """Whether the usual types, shapes and devices were given: faster than looking at each for a message."""
    size, classes, dtype, device = mean.shape, mean.shape[:1], mean.dtype, mean.device
    return (
        count.shape == scatter.shape == rows.shape == classes
        and squares.shape == (classes if variance is None else size)
        and count.dtype == rows.dtype == torch.int64
        and scatter.dtype == torch.float64
        and squares.dtype == dtype
        and all(part is None or (part.shape == size and part.dtype == dtype) for part in (sums, shift, variance))
        and all(
            part is None or part.device == device for part in (count, scatter, variance, rows, shift, sums, squares)
        )
    )


def _check_row_magnitudes(rows: Tensor) -> None:
    _check_floating("rows", rows, 2, "(B, D)")


def _check_moments(values: Tensor, labels: Tensor | None, ignore_index: int) -> None:
    _check_floating("values", values, 1, "(B,)")
    if labels is not None:
        check_operand("labels", labels, tuple(values.shape), labels.dtype, values)
        if labels.dtype not in LABELS:
            raise TypeError(f"labels must be int64, int32 or uint8; got {labels.dtype}")


def _check_floating(name: str, tensor: Tensor, dimensions: int, shape: str) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16; got {tensor.dtype}")
    if tensor.dim() != dimensions:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}")


def _fake_class_stats(
    features: Tensor, labels: Tensor, shift: Tensor, seen: Tensor, ignore_index: int, per_feature: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    square = shift.new_empty(shift.shape if per_feature else shift.shape[:1])
    return seen.new_empty(seen.shape), shift.new_empty(shift.shape), square, seen.new_empty(())


def _fake_update_from_rows(features: Tensor, labels: Tensor, count: Tensor, *rest: Any) -> Tensor:
    return count.new_empty(())


def _fake_row_magnitudes(rows: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], dtype=compute_dtype(rows.dtype))


def _fake_moments(values: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor:
    return values.new_empty(4, dtype=torch.float64)


def _flat(*arguments: Any) -> tuple[Any, ...]:
    return arguments


_CHECKS: dict[str, Callable[..., None]] = {
    "class_stats": _check_class_stats,
    "update_class_stats": _check_update,
    "update_from_rows": _check_update_from_rows,
    "row_magnitudes": _check_row_magnitudes,
    "moments": _check_moments,
}


def _call(name: str, tensors: tuple[Any, ...], *settings: Any) -> Any:
    """The operation, straight from its kernel where the dispatcher would only pass plain tensors on."""
    if not is_direct(*tensors) or torch._C._are_functorch_transforms_active():
        return getattr(torch.ops.fusedloss, name).default(*tensors, *settings)
    _CHECKS[name](*tensors, *settings)
    return backends.kernel(_STEM, name, "cpu" if tensors[0].is_cpu else "cuda")(*tensors, *settings)


define(
    _STEM,
    "class_stats(Tensor features, Tensor labels, Tensor(a!) shift, Tensor seen, int ignore_index, bool per_feature)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    group=_flat,
    check=_check_class_stats,
    fake=_fake_class_stats,
)
define(
    _STEM,
    "update_class_stats(Tensor(a!) count, Tensor(b!) mean, Tensor(c!) scatter, Tensor(d!)? variance, Tensor rows,"
    " Tensor? shift, Tensor(e!) sums, Tensor(f!) squares, float? momentum) -> ()",
    group=_flat,
    check=_check_update,
    fake=lambda *arguments: None,
)
define(
    _STEM,
    "update_from_rows(Tensor features, Tensor labels, Tensor(a!) count, Tensor(b!) mean, Tensor(c!) scatter,"
    " Tensor(d!)? variance, int ignore_index, float? momentum) -> Tensor",
    group=_flat,
    check=_check_update_from_rows,
    fake=_fake_update_from_rows,
)
define(
    _STEM,
    "row_magnitudes(Tensor rows) -> Tensor",
    group=_flat,
    check=_check_row_magnitudes,
    fake=_fake_row_magnitudes,
)
define(
    _STEM,
    "moments(Tensor values, Tensor? labels, int ignore_index) -> Tensor",
    group=_flat,
    check=_check_moments,
    fake=_fake_moments,
)
