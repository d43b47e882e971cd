"""Softmax cross-entropy, its statistics and their sweep: with and without each option, and in tiles of each size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch

from bench.variants import DTYPES, ROWS, ShapeClass, Variant, compute_dtype, variant
from fusedloss.core.operands import (
    LogitInputs,
    RowInputs,
    SavedStatistics,
    SoftmaxMask,
    StatisticsGrads,
    StatisticsOptions,
)
from fusedloss.core.row_loss import RowOptions

TUNED = ("float32", "bfloat16")
# One number of classes for each kind of tile, and odd ones, whose loads can't be wide.
_CLASSES = (10, 100, 1000, 4000, 8000, 100000)
_ODD_CLASSES = (101, 2047, 4095, 8191)
_LONG = (1000, 100000)
# What changes the logits or the row beyond its sums.
_EXTRAS = ("cap", "override", "penalty")
_TUNED_BYTES = 2**28  # several times the caches
_LAYOUTS = ("transposed", "positions")


class _Call:
    """Tensors of one call, left as they are allocated; `extras` are words of _EXTRAS."""

    def __init__(
        self, dtype: str, num_classes: int, target: str, terms: bool = True, layout: str = "rows", extras: str = ""
    ) -> None:
        logits = _logits(DTYPES[dtype], num_classes, layout)
        compute = compute_dtype(dtype)
        rows = logits.shape[:1] + logits.shape[2:]
        self.row = torch.empty(rows, dtype=compute)
        labels = torch.zeros(rows, dtype=torch.int64) if target == "labels" else torch.empty_like(logits)
        classes = [torch.empty(num_classes, dtype=compute) if terms else None for _ in range(3)]
        override = self.row if "override" in extras else None
        cap = 30.0 if "cap" in extras else 0.0
        self.inputs = LogitInputs(logits, labels, *classes, override, override, cap)
        self.penalty = self.row if "penalty" in extras else None


def _logits(dtype: torch.dtype, num_classes: int, layout: str) -> torch.Tensor:
    if layout == "rows":
        return torch.empty(ROWS, num_classes, dtype=dtype)
    if layout == "transposed":
        return torch.empty(num_classes, ROWS, dtype=dtype).t()
    return torch.empty(2, num_classes, ROWS, dtype=dtype)


def softmax_ce(
    dtype: str, num_classes: int, *, target: str = "labels", terms: bool = True, options: bool = True,
    columns: bool = True, layout: str = "rows", extras: str = "",
) -> None:  # fmt: skip
    from fusedloss.backends.triton.softmax_ce import softmax_ce

    call = _Call(dtype, num_classes, target, terms, layout, extras)
    per_row, override = call.row if options else None, call.inputs.target_override is not None
    labels, penalty = target == "labels", call.penalty is not None
    of_row = RowOptions(
        focal_gamma=2.0 if options and labels else 0.0,
        poly_epsilon=1.0 if options and labels and penalty else 0.0,
        z_loss=1e-4 if options else 0.0,
        penalty_margin=1.0,
        penalty_mix=float(options),
    )
    mask = SoftmaxMask(True, columns, override, options, penalty)
    softmax_ce(call.inputs, RowInputs(per_row, per_row, call.penalty), of_row, not options, mask)


def softmax_stats(dtype: str, num_classes: int, *, target: str = "labels", extras: str = "") -> None:
    from fusedloss.backends.triton.softmax_ce import softmax_stats

    call = _Call(dtype, num_classes, target, extras=extras)
    options = StatisticsOptions(1.0, True, call.penalty is not None, True)
    softmax_stats(call.inputs._replace(target_override_grad=None), options)


def softmax_stats_backward(
    dtype: str, num_classes: int, *, target: str = "labels", columns: bool = True, extras: str = ""
) -> None:
    from fusedloss.backends.triton.softmax_ce import softmax_stats_backward

    call = _Call(dtype, num_classes, target, extras=extras)
    row, override = call.row, call.inputs.target_override is not None
    grads = StatisticsGrads(row, row, row, row, row, call.penalty)
    softmax_stats_backward(
        call.inputs, SavedStatistics(row, row, row), 1.0, grads, SoftmaxMask(True, columns, override)
    )


def scale_in_place(dtype: str) -> None:
    from fusedloss.backends.triton.softmax_ce import scale_in_place

    scale_in_place(torch.empty(ROWS, 10, dtype=DTYPES[dtype]), torch.empty((), dtype=compute_dtype(dtype)))


def variants(quick: bool) -> list[Variant]:
    return _quick() if quick else [*_plain(), *_odd(), *_with_extras()]


def _quick() -> list[Variant]:
    found = []
    for target in ("labels", "probabilities"):
        extras = "cap override penalty" if target == "labels" else "cap penalty"
        found += [
            variant(softmax_ce, "bf16", 1000, target=target),
            variant(softmax_ce, "bf16", 1000, target=target, extras=extras),
            variant(softmax_stats, "f32", 1000, target=target, extras=extras),
            variant(softmax_stats_backward, "f32", 100000, target=target, extras=extras),
        ]
    return [
        *found,
        variant(softmax_ce, "f32", 8000, columns=False),
        variant(softmax_ce, "f32", 8000, columns=False, extras="cap override penalty"),
        variant(softmax_ce, "f32", 100000, columns=False),
        variant(softmax_ce, "f64", 2047),
        variant(scale_in_place, "bf16"),
    ]


def _plain() -> list[Variant]:
    found = []
    for dtype in DTYPES:
        for classes in _CLASSES:
            found.append(variant(softmax_ce, dtype, classes))
            if dtype in ("f32", "bf16"):
                found.append(variant(softmax_ce, dtype, classes, terms=False, options=False, columns=False))
        found += [variant(softmax_ce, dtype, classes, columns=False) for classes in (8000, 100000)]
        found.append(variant(scale_in_place, dtype))
    for dtype in ("f32", "bf16", "f64"):
        for target in ("labels", "probabilities"):
            for classes in _LONG:
                found.append(variant(softmax_stats, dtype, classes, target=target))
                found.append(variant(softmax_stats_backward, dtype, classes, target=target))
        found += [variant(softmax_ce, dtype, classes, target="probabilities") for classes in (1000, 4000, 8000, 100000)]
        found.append(variant(softmax_ce, dtype, 8000, target="probabilities", columns=False))
    return found


def _odd() -> list[Variant]:
    found = []
    for dtype, most in (("f32", 8191), ("bf16", 8191), ("f64", 4095)):
        sizes = [classes for classes in _ODD_CLASSES if classes <= most]
        found += [variant(softmax_ce, dtype, classes, columns=classes < most) for classes in sizes]
    for layout in _LAYOUTS:
        found += [variant(softmax_ce, "f32", classes, layout=layout) for classes in (20, 1000)]
    return found


def _with_extras() -> list[Variant]:
    """Options alone, and all of them with all others, at every kind of tile."""
    found = []
    every = " ".join(_EXTRAS)
    for dtype, sizes in (("f32", (1000, 4095, 100000)), ("bf16", (100, 8191, 100000)), ("f64", (1000, 4095, 100000))):
        for classes in sizes:
            for extras in _EXTRAS:
                found.append(variant(softmax_ce, dtype, classes, options=False, columns=False, extras=extras))
            for columns in (False, True):
                found.append(variant(softmax_ce, dtype, classes, columns=columns, extras=every))
                found.append(variant(softmax_stats_backward, dtype, classes, columns=columns, extras=every))
            found.append(variant(softmax_ce, dtype, classes, target="probabilities", extras="cap penalty"))
            found.append(variant(softmax_stats, dtype, classes, extras=every))
    return [*found, *(variant(softmax_ce, "f32", 1000, layout=layout, extras=every) for layout in _LAYOUTS)]


def _timed(
    device: torch.device, rows: int, num_classes: int, dtype: torch.dtype, columns: bool = False, strided: bool = False,
    cap: float = 0.0,
) -> Callable[[], tuple[torch.Tensor, ...]]:  # fmt: skip
    """Forward and gradient under a class temperature, which the column sums are of."""
    from fusedloss.backends.triton.softmax_ce import softmax_ce

    shape = (num_classes, rows) if strided else (rows, num_classes)
    logits = torch.randn(shape, device=device, dtype=dtype)
    target = torch.randint(num_classes, (rows,), device=device)
    scale = torch.rand(num_classes, device=device) + 0.5
    inputs = LogitInputs(logits.t() if strided else logits, target, scale, soft_cap=cap)
    mask = SoftmaxMask(logits=True, affine=columns)

    def call() -> tuple[torch.Tensor, ...]:
        loss, row_loss, grads = softmax_ce(inputs, RowInputs(), RowOptions(), True, mask)
        return loss, row_loss, *grads

    return call


def shape_classes(dtype: torch.dtype, small: bool) -> list[ShapeClass]:
    def timed(name: str, num_classes: int, candidates: list[tuple[int, ...]], **keywords: Any) -> ShapeClass:
        rows = 3 if small else _TUNED_BYTES // (num_classes * dtype.itemsize)
        prepare = partial(_timed, rows=rows, num_classes=num_classes, dtype=dtype, **keywords)
        return ShapeClass(name, prepare, candidates[:2] if small else candidates)

    from fusedloss.backends.triton import tuning

    found = []
    for name in tuning.DEVICES[tuning.DEFAULT]["tiles"]["softmax_ce"][str(dtype).removeprefix("torch.")]:
        width = int(name.split()[0]) if name[0].isdigit() else 0
        if width:
            # Neither a power of two nor far below one: 100 for 128, 800 for 1024.
            columns = "columns" in name
            tiles = _one_block_tiles(width) if columns else _held_tiles(width, dtype.itemsize)
            found.append(timed(name, width * 25 // 32, tiles, columns=columns))
    found.append(timed("loop", 200 if small else 100000, _loop_tiles()))
    found.append(timed("loop extras", 200 if small else 100000, _loop_tiles(), cap=30.0))
    sizes = product((16, 32, 64), (32, 64, 128), (4, 8))
    found.append(timed("strided", 100, [(*size, 1) for size in sizes], strided=True))
    sizes = product((1, 2, 4, 8), (256, 512, 1024, 2048), (4, 8))
    wide = 200 if small else 100000
    found.append(timed("columns", wide, [(*size, 1) for size in sizes if size[0] * size[1] <= 4096], columns=True))
    return found[:2] + found[-1:] if small else found


def _held_tiles(width: int, itemsize: int) -> list[tuple[int, ...]]:
    """Blocks of part of a warp's reach, with as many rows as the program then covers, up to blocks of all its warps."""
    reach = 32 * 16 // itemsize
    sizes = product((1, 2, 4, 8, 16, 32), (16 << shift for shift in range(12)))
    found = []
    for warps, block in sizes:
        rows, blocks = max(1, warps * reach // block), -(-width // block)
        values = rows * block * blocks // (32 * warps)
        if block <= min(width, warps * reach) and blocks <= 16 and 4 <= values <= 64:
            found.append((rows, block, warps, 1))
    return found


def _one_block_tiles(width: int) -> list[tuple[int, ...]]:
    """One row or several side by side; 2 to 32 values a thread."""
    sizes = product((1, 2, 4, 8, 16, 32, 64, 128, 256), (1, 2, 4, 8, 16))
    return [
        (rows, width, warps, 1)
        for rows, warps in sizes
        if 512 <= rows * width <= max(4096, width) and 2 <= rows * width // (32 * warps) <= 32
    ]


def _loop_tiles() -> list[tuple[int, ...]]:
    # More stages change nothing: no load of these loops is asynchronous.
    sizes = product((1024, 2048, 4096, 8192, 16384), (4, 8, 16, 32))
    return [(1, block, warps, 1) for block, warps in sizes if 4 <= block // (32 * warps) <= 16]
