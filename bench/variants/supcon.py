"""Supervised contrast: labels or a mask, with weights and without, rows of length 1 and of any."""

from __future__ import annotations

import torch

from bench.variants import DTYPES, ROWS, Variant, variant

_WIDTHS = (512, 100)
_ANCHORS, _LEARNED = ROWS - 8, ROWS - 4


class _Tensors:
    def __init__(self, dtype: str, width: int, mask: bool, weights: bool):
        self.features = torch.empty(ROWS, width, dtype=DTYPES[dtype])
        self.codes = torch.zeros(ROWS, dtype=torch.int32)
        self.mask = torch.empty(ROWS, ROWS, dtype=torch.bool) if mask else None
        self.weights = self.features.new_empty(3, ROWS) if weights else None
        self.row = self.features.new_empty(_ANCHORS)
        self.temperature = self.features.new_empty(())

    def inputs(self) -> tuple[torch.Tensor | None, ...]:
        return self.features, self.codes, self.mask, self.weights, self.row, self.temperature


def supcon_stats(dtype: str, width: int, *, mask: bool = False, weights: bool = False, unit: bool = True) -> None:
    from fusedloss.backends.triton.supcon import supcon_stats

    supcon_stats(*_Tensors(dtype, width, mask, weights).inputs(), _ANCHORS, unit)


def supcon_sweep(
    dtype: str, width: int, *, mask: bool = False, weights: bool = False, unit: bool = True, temperature: bool = True
) -> None:
    from fusedloss.backends.triton.supcon import supcon_sweep

    made = _Tensors(dtype, width, mask, weights)
    supcon_sweep(*made.inputs(), *(made.row,) * 3, _ANCHORS, _LEARNED, unit, [True, temperature])


def variants(quick: bool) -> list[Variant]:
    if quick:
        return [
            variant(function, dtype, 128, weights=True, unit=unit)
            for function in (supcon_stats, supcon_sweep)
            for dtype, unit in (("f32", True), ("f32", False), ("f64", True))
        ]
    found = []
    for dtype in ("f32", "f64"):
        for unit in (True, False):
            for options in ({}, {"weights": True}, {"mask": True}):
                found.append(variant(supcon_stats, dtype, 128, unit=unit, **options))
                found.append(variant(supcon_sweep, dtype, 128, unit=unit, **options))
        for width in _WIDTHS:
            found += [variant(supcon_stats, dtype, width), variant(supcon_sweep, dtype, width, temperature=False)]
    return found
