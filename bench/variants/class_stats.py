"""Class statistics, for each type and with each kind of sum."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch

from bench.variants import DTYPES, ROWS, ShapeClass, Variant, compute_dtype, variant

TUNED = ("float32", "bfloat16")
_TUNED_BYTES = 2**28  # several times the caches


def class_stats(dtype: str, width: int, *, per_feature: bool) -> None:
    from fusedloss.backends.triton.class_stats import class_stats

    features, labels, (count, mean, *_) = _batch(dtype, width, per_feature)
    class_stats(features, labels, mean, count, -100, per_feature)


def update_class_stats(dtype: str, width: int, *, per_feature: bool) -> None:
    from fusedloss.backends.triton.class_stats import update_class_stats

    _, _, (count, mean, scatter, variance) = _batch(dtype, width, per_feature)
    squares = torch.empty_like(count, dtype=mean.dtype) if variance is None else torch.empty_like(variance)
    update_class_stats(count, mean, scatter, variance, count.clone(), None, torch.empty_like(mean), squares, 0.1)


def update_from_rows(dtype: str, width: int, *, per_feature: bool) -> None:
    from fusedloss.backends.triton.class_stats import update_from_rows

    features, labels, state = _batch(dtype, width, per_feature)
    update_from_rows(features, labels, *state, -100, 0.1)


def _batch(dtype: str, width: int, per_feature: bool) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Features, labels, and a state: count, mean, scatter and perhaps variance."""
    classes = 10
    mean = torch.empty(classes, width, dtype=compute_dtype(dtype))
    state = (torch.empty(classes, dtype=torch.int64), mean, torch.empty(classes, dtype=torch.float64))
    labels = torch.zeros(ROWS, dtype=torch.int64)
    features = torch.empty(ROWS, width, dtype=DTYPES[dtype])
    return features, labels, (*state, torch.empty_like(mean) if per_feature else None)


def variants(quick: bool) -> list[Variant]:
    if quick:
        return [
            variant(class_stats, "bf16", 2048, per_feature=True),
            variant(update_class_stats, "f32", 1024, per_feature=True),
            variant(update_from_rows, "bf16", 2048, per_feature=True),
            variant(update_from_rows, "f32", 1024, per_feature=False),
        ]
    calls = (class_stats, update_class_stats, update_from_rows)
    found = [
        variant(call, dtype, 1000, per_feature=each) for call in calls for dtype in DTYPES for each in (False, True)
    ]
    found += [variant(update_from_rows, dtype, 2048, per_feature=True) for dtype in ("f32", "bf16")]
    return [*found, variant(update_from_rows, "f32", 64, per_feature=True)]


def _call(
    device: torch.device, rows: int, width: int, dtype: torch.dtype
) -> Callable[[], tuple[torch.Tensor, ...]]:  # fmt: skip
    from fusedloss.backends.triton.class_stats import update_from_rows

    classes = min(1000, rows)
    features = torch.randn(rows, width, device=device).to(dtype)
    labels = torch.randint(classes, (rows,), device=device)
    mean = torch.zeros(classes, width, device=device, dtype=torch.float64 if dtype == torch.float64 else None)
    count = torch.ones(classes, dtype=torch.int64, device=device)
    scatter = torch.zeros(classes, dtype=torch.float64, device=device)

    def call() -> tuple[torch.Tensor, ...]:
        # Every call starts from the same state: results are compared.
        state = (count.clone(), mean.clone(), scatter.clone())
        return (update_from_rows(features, labels, *state, None, -100, 0.1), *state[1:])

    return call


def shape_classes(dtype: torch.dtype, small: bool) -> list[ShapeClass]:
    from fusedloss.backends.triton import tuning

    found = []
    for name in tuning.DEVICES[tuning.DEFAULT]["tiles"]["class_stats"][str(dtype).removeprefix("torch.")]:
        width = int(name)
        rows = 6 if small else _TUNED_BYTES // (width * dtype.itemsize)
        sizes = product((4, 8, 16, 32, 64, 128, 256), (128, 256, 512), (4, 8))
        candidates = [(rows, width, chunk, warps, 1) for rows, chunk, warps in sizes if rows * width <= 8192]
        found.append(ShapeClass(name, partial(_call, rows=rows, width=width, dtype=dtype), candidates))
    return [each._replace(candidates=each.candidates[:2]) for each in found[:1]] if small else found
