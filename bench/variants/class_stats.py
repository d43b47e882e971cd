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

    labels, classes = torch.zeros(ROWS, dtype=torch.int64), 10
    features, shift = torch.empty(ROWS, width, dtype=DTYPES[dtype]), torch.empty(classes, width)
    class_stats(features, labels, shift.to(compute_dtype(dtype)), labels[:classes], -100, per_feature)


def variants(quick: bool) -> list[Variant]:
    if quick:
        return [
            variant(class_stats, "bf16", 1024, per_feature=True),
            variant(class_stats, "f32", 1024, per_feature=False),
        ]
    found = [variant(class_stats, dtype, 1000, per_feature=each) for dtype in DTYPES for each in (False, True)]
    return [*found, variant(class_stats, "f32", 64, per_feature=True)]


def _call(
    device: torch.device, rows: int, width: int, dtype: torch.dtype
) -> Callable[[], tuple[torch.Tensor, ...]]:  # fmt: skip
    from fusedloss.backends.triton.class_stats import class_stats

    classes = min(1000, rows)
    features = torch.randn(rows, width, device=device).to(dtype)
    labels = torch.randint(classes, (rows,), device=device)
    shift = torch.zeros(classes, width, device=device, dtype=torch.float64 if dtype == torch.float64 else None)
    seen = torch.ones(classes, dtype=torch.int64, device=device)
    return lambda: class_stats(features, labels, shift, seen, -100, False)


def shape_classes(dtype: torch.dtype, small: bool) -> list[ShapeClass]:
    from fusedloss.backends.triton import tuning

    found = []
    for name in tuning.DEVICES[tuning.DEFAULT]["tiles"]["class_stats"][str(dtype).removeprefix("torch.")]:
        width = int(name)
        rows = 6 if small else _TUNED_BYTES // (width * dtype.itemsize)
        sizes = product((4, 8, 16, 32, 64), (128, 256, 512), (4, 8))
        candidates = [(rows, width, chunk, warps, 1) for rows, chunk, warps in sizes if rows * width <= 8192]
        found.append(ShapeClass(name, partial(_call, rows=rows, width=width, dtype=dtype), candidates))
    return [each._replace(candidates=each.candidates[:2]) for each in found[:1]] if small else found
