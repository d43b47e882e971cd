"""Supervised contrast: labels or a mask, with weights and without, rows of length 1 and of any."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.variants import DTYPES, ROWS, ShapeClass, Variant, compute_dtype, limited, variant
from fusedloss.core.operands import SavedAnchors, SupConInputs, SupConMask

TUNED = ("float32", "bfloat16")
_WIDTHS = (512, 256, 100, 64, 20)
_ANCHORS, _NUM_GRAD_ROWS = ROWS - 8, ROWS - 4
_TIMED_ROWS, _TIMED_CLASSES = 8192, 100
# Rows, columns, features of a step and of a block, warps, stages.
_TILES = {
    "sums": (
        (64, 64, 32, 64, 4, 2), (128, 64, 32, 64, 8, 2), (64, 128, 32, 64, 8, 2), (128, 128, 32, 64, 8, 2),
        (64, 32, 32, 64, 4, 3), (64, 64, 64, 64, 4, 2), (128, 128, 16, 64, 8, 3),
    ),
    "gradient": (
        (64, 32, 32, 128, 8, 2), (64, 64, 32, 128, 8, 2), (64, 32, 32, 256, 8, 1), (128, 32, 32, 128, 8, 1),
        (32, 32, 32, 256, 4, 2), (64, 64, 32, 256, 8, 1), (64, 32, 32, 64, 4, 2),
    ),
    # These have to be square.
    "any": (
        (32, 32, 16, 64, 4, 2), (32, 32, 32, 64, 4, 1), (64, 64, 16, 64, 8, 1), (64, 64, 32, 128, 8, 1),
        (16, 16, 32, 128, 4, 1),
    ),
}  # fmt: skip
# Of 16 bits: a step and a block as wide as the rows keep those of a program in shared memory.
_HALF_TILES = {
    "sums": (
        (64, 64, 128, 128, 4, 2), (64, 64, 128, 128, 4, 3), (128, 64, 128, 128, 8, 3), (128, 128, 128, 128, 8, 2),
        (128, 32, 128, 128, 8, 3), (128, 64, 64, 64, 8, 3), (128, 128, 64, 64, 8, 3),
    ),
    "gradient": (
        (64, 64, 128, 128, 4, 2), (128, 64, 128, 128, 8, 2), (128, 32, 128, 128, 8, 3), (128, 64, 128, 128, 16, 2),
        (64, 64, 64, 256, 8, 3), (128, 64, 64, 128, 8, 3), (64, 32, 64, 256, 8, 3),
    ),
}  # fmt: skip


def _inputs(dtype: str, width: int, mask: bool, weights: bool, unit: bool) -> SupConInputs:
    features = torch.empty(ROWS, width, dtype=DTYPES[dtype])
    like = torch.empty(0, dtype=compute_dtype(dtype))
    return SupConInputs(
        features,
        torch.zeros(ROWS, dtype=torch.int32),
        torch.empty(ROWS, ROWS, dtype=torch.bool) if mask else None,
        like.new_empty(3, ROWS) if weights else None,
        like.new_empty(_ANCHORS),
        like.new_empty(()),
        _NUM_GRAD_ROWS,
        unit,
        None if features.dtype == like.dtype else torch.empty(ROWS, dtype=torch.float64),
    )


def supcon_stats(dtype: str, width: int, *, mask: bool = False, weights: bool = False, unit: bool = True) -> None:
    from fusedloss.backends.triton.supcon import supcon_stats

    supcon_stats(_inputs(dtype, width, mask, weights, unit))


def supcon_backward(
    dtype: str, width: int, *, mask: bool = False, weights: bool = False, unit: bool = True, temperature: bool = True
) -> None:
    from fusedloss.backends.triton.supcon import supcon_backward

    inputs = _inputs(dtype, width, mask, weights, unit)
    row = inputs.per_positive
    supcon_backward(inputs, SavedAnchors(row, row), row, SupConMask(True, temperature))


def variants(quick: bool) -> list[Variant]:
    if quick:
        return [
            variant(function, dtype, 128, weights=True, unit=unit)
            for function in (supcon_stats, supcon_backward)
            for dtype, unit in (("f32", True), ("f32", False), ("bf16", True), ("f64", True))
        ]
    found = []
    for dtype in ("f32", "bf16", "f64"):
        for unit in (True, False) if dtype != "bf16" else (True,):
            for options in ({}, {"weights": True}, {"mask": True}):
                found.append(variant(supcon_stats, dtype, 128, unit=unit, **options))
                found.append(variant(supcon_backward, dtype, 128, unit=unit, **options))
        for width in _WIDTHS:
            found += [variant(supcon_stats, dtype, width), variant(supcon_backward, dtype, width, temperature=False)]
    return [*found, variant(supcon_stats, "f16", 128), variant(supcon_backward, "f16", 128, temperature=False)]


def _call(
    device: torch.device, kernel: str, rows: int, width: int, dtype: torch.dtype
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """One kernel over rows of length 1, or both over rows of any; with class weights or a mask where tiles differ."""
    from fusedloss.backends.triton.supcon import supcon_backward, supcon_stats

    kind, _, more = kernel.partition(" ")
    unit, wide = kind != "any", torch.promote_types(dtype, torch.float32)
    features = torch.nn.functional.normalize(torch.randn(rows, width, device=device, dtype=wide)).to(dtype)
    codes = (torch.arange(rows, device=device) % min(_TIMED_CLASSES, rows // 2)).int()
    positives = torch.bincount(codes)[codes] - 1
    temperature = torch.full((), 0.1, device=device, dtype=wide)
    per_positive = (1 / positives).to(wide)
    norms = None if dtype == wide else torch.linalg.vector_norm(features.double(), dim=1)
    mask = (codes.unsqueeze(1) == codes) if more == "mask" else None
    weights = torch.ones(3, rows, device=device, dtype=wide) if more == "extras" else None
    inputs = SupConInputs(features, codes, mask, weights, per_positive, temperature, rows, unit, norms)
    _, *saved = supcon_stats(inputs)
    grad_loss = torch.full_like(per_positive, 1 / rows)

    def sums() -> tuple[torch.Tensor, ...]:
        return supcon_stats(inputs)

    def gradient() -> tuple[torch.Tensor, ...]:
        return tuple(supcon_backward(inputs, SavedAnchors(*saved), grad_loss, SupConMask(features=True)))

    return {"sums": sums, "gradient": gradient, "any": lambda: (*sums(), *gradient())}[kind]


def shape_classes(dtype: torch.dtype, small: bool) -> list[ShapeClass]:
    from fusedloss.backends.triton import tuning

    found, tiles = [], _TILES if dtype == torch.float32 else _HALF_TILES
    for name in reversed(tuning.DEVICES[tuning.DEFAULT]["tiles"]["supcon"][str(dtype).removeprefix("torch.")]):
        kernel, size = name.rsplit(" ", 1)
        rows, width = 40 if small else _TIMED_ROWS, int(size)
        prepare = partial(_call, kernel=kernel, rows=rows, width=width, dtype=dtype)
        found.append(ShapeClass(name, prepare, limited(tiles[kernel.split()[0]], width)))
    if small:
        return [each._replace(candidates=each.candidates[:1]) for each in found if each.name.endswith(" 32")]
    return found
