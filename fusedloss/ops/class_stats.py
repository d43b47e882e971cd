"""Statistics of features, without gradients: those of each class, and those of the rows' norms.

``class_stats``         count, sum and square of each class; ``update_class_stats`` moves running statistics by them.
``row_magnitudes``      the sum of |x| of each row; ``moments`` count, mean and squared deviation of one number per row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedloss import backends
from fusedloss.ops.library import compute_dtype, library

FEATURE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LABEL_DTYPES = (torch.int64, torch.int32, torch.uint8)
_PLAIN = (Tensor, torch.nn.Parameter)


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
    return ClassTensors(*_run_class_stats(features, labels, shift, seen, ignore_index, per_feature))


def update_class_stats(state: ClassState, batch: ClassTensors, shift: Tensor | None, momentum: float | None) -> None:
    """Moves `state` in place by the sums of a batch about `shift` (None: the mean); overwrites sums and squares."""
    _run_update(*state, batch.count, shift, batch.sum, batch.square, momentum)


def row_magnitudes(rows: Tensor) -> Tensor:
    """``sum_d |x_id|`` of rows ``(B, D)``: ``(B,)`` in float32, float64 for float64 rows."""
    return _run_row_magnitudes(rows.detach())


def moments(values: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor:
    """``(4,)`` in float64: count, mean and mean squared deviation of the values kept ``(B,)``, and how many were left
    out because they are not finite."""
    return _run_moments(values.detach(), labels, ignore_index)


def _check_class_stats(
    features: Tensor, labels: Tensor, shift: Tensor, seen: Tensor, ignore_index: int, per_feature: bool
) -> None:
    _check_tensor("features", features, FEATURE_DTYPES, "(B, D) with D of at least 1", features.dim() == 2)
    num_rows, width = features.shape
    _check_tensor("labels", labels, (torch.int64,), f"({num_rows},)", labels.shape == (num_rows,))
    _check_tensor("seen", seen, (torch.int64,), "(K,)", seen.dim() == 1)
    expected = (seen.shape[0], width)
    _check_tensor("shift", shift, (compute_dtype(features.dtype),), f"(K, D) = {expected}", shift.shape == expected)
    if width < 1:
        raise ValueError(f"features must have at least one column; got shape {tuple(features.shape)}")
    _check_devices(features=features, labels=labels, shift=shift, seen=seen)


def _check_update(
    count: Tensor, mean: Tensor, scatter: Tensor, variance: Tensor | None, rows: Tensor, shift: Tensor | None,
    sums: Tensor, squares: Tensor, momentum: float | None,
) -> None:  # fmt: skip
    floats = (torch.float32, torch.float64)
    _check_tensor("mean", mean, floats, "(K, D)", mean.dim() == 2)
    classes, size = mean.shape[:1], mean.shape
    _check_tensor("count", count, (torch.int64,), f"(K,) = {tuple(classes)}", count.shape == classes)
    _check_tensor("scatter", scatter, (torch.float64,), f"(K,) = {tuple(classes)}", scatter.shape == classes)
    if variance is not None:
        _check_tensor("variance", variance, (mean.dtype,), f"(K, D) = {tuple(size)}", variance.shape == size)
    _check_tensor("rows", rows, (torch.int64,), f"(K,) = {tuple(classes)}", rows.shape == classes)
    for name, value in (("shift", mean if shift is None else shift), ("sums", sums)):
        _check_tensor(name, value, floats, f"(K, D) = {tuple(size)}", value.shape == size)
    expected = classes if variance is None else size
    _check_tensor("squares", squares, floats, f"{tuple(expected)}", squares.shape == expected)
    if momentum is not None and not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must be None or in [0, 1]; got {momentum}")
    _check_devices(mean=mean, count=count, scatter=scatter, variance=variance, rows=rows, shift=shift, sums=sums,
                   squares=squares)  # fmt: skip


def _check_row_magnitudes(rows: Tensor) -> None:
    _check_tensor("rows", rows, FEATURE_DTYPES, "(B, D)", rows.dim() == 2)


def _check_moments(values: Tensor, labels: Tensor | None, ignore_index: int) -> None:
    _check_tensor("values", values, FEATURE_DTYPES, "(B,)", values.dim() == 1)
    if labels is not None:
        shape = values.shape
        _check_tensor("labels", labels, LABEL_DTYPES, f"({shape[0]},)", labels.shape == shape)
        _check_devices(values=values, labels=labels)


def _check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: str, has_shape: bool) -> None:
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {allowed}; got {tensor.dtype}")
    if not has_shape:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}")


def _check_devices(**tensors: Tensor | None) -> None:
    (first, expected), *others = tensors.items()
    assert expected is not None
    for name, tensor in others:
        if tensor is not None and tensor.device != expected.device:
            raise ValueError(f"{name} must be on the device of {first}, {expected.device}; got {tensor.device}")


def _fake_class_stats(
    features: Tensor, labels: Tensor, shift: Tensor, seen: Tensor, ignore_index: int, per_feature: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    square = shift.new_empty(shift.shape if per_feature else shift.shape[:1])
    return seen.new_empty(seen.shape), shift.new_empty(shift.shape), square, seen.new_empty(())


def _fake_row_magnitudes(rows: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], dtype=compute_dtype(rows.dtype))


def _fake_moments(values: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor:
    return values.new_empty(4, dtype=torch.float64)


def _is_plain(argument: object) -> bool:
    """Whether the dispatcher would only pass the argument on to its device's kernel."""
    if not isinstance(argument, Tensor):
        return True
    return type(argument) in _PLAIN and not argument.is_neg() and (argument.is_cpu or argument.is_cuda)


def _operation(function: str, schema: str, check: Callable[..., None], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines an operation for every device; returns it with a short way for plain tensors (9 of 35 us)."""
    library.define(function + schema)

    def run(*arguments: Any) -> Any:
        check(*arguments)
        return backends.kernel("class_stats", function, arguments[0].device.type)(*arguments)

    def run_fake(*arguments: Any) -> Any:
        check(*arguments)
        return fake(*arguments)

    for device in ("CPU", "CUDA"):
        library.impl(function, run, device)
    torch.library.register_fake(f"fusedloss::{function}", run_fake, lib=library)

    def call(*arguments: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._are_functorch_transforms_active()
            or not all(map(_is_plain, arguments))
        ):
            return getattr(torch.ops.fusedloss, function).default(*arguments)
        return run(*arguments)

    return call


_run_class_stats = _operation(
    "class_stats",
    "(Tensor features, Tensor labels, Tensor(a!) shift, Tensor seen, int ignore_index, bool per_feature)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _check_class_stats,
    _fake_class_stats,
)
_run_update = _operation(
    "update_class_stats",
    "(Tensor(a!) count, Tensor(b!) mean, Tensor(c!) scatter, Tensor(d!)? variance, Tensor rows, Tensor? shift,"
    " Tensor(e!) sums, Tensor(f!) squares, float? momentum) -> ()",
    _check_update,
    lambda *arguments: None,
)
_run_row_magnitudes = _operation(
    "row_magnitudes", "(Tensor rows) -> Tensor", _check_row_magnitudes, _fake_row_magnitudes
)
_run_moments = _operation(
    "moments", "(Tensor values, Tensor? labels, int ignore_index) -> Tensor", _check_moments, _fake_moments
)
