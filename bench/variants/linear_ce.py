"""A linear head: tiles of 16-bit heads with every option, and the kernels over single rows."""

from __future__ import annotations

import torch

from bench.variants import DTYPES, ROWS, Variant, variant

_CLASSES = 1000


def linear_tiles(dtype: str, width: int, *, options: bool = False) -> None:
    """Sums, the input's gradient and the weight's; `options` are all that a head may have."""
    from fusedloss.backends.triton import linear_tiles

    operand, per_row, per_class = DTYPES[dtype], torch.empty(ROWS), torch.empty(_CLASSES)
    some = (lambda tensor: tensor) if options else (lambda tensor: None)
    head = linear_tiles.Head(
        torch.empty(ROWS, width, dtype=operand),
        torch.empty(_CLASSES, width, dtype=operand),
        ROWS,
        _CLASSES,
        width,
        torch.zeros(ROWS, dtype=torch.int64),
        some(per_class),
        some(per_class),
        some(per_class),
        some(per_row),
    )
    rows = linear_tiles.RowCoefficients(*(per_row,) * 5)
    linear_tiles.tile_sums(head, options)
    linear_tiles.input_gradient(head, rows, options)
    linear_tiles.weight_gradient(head, rows, options, True, options)


def linear_rows(dtype: str, width: int, *, cosines: bool = False) -> None:
    """Projection, products and the label's gradients."""
    from fusedloss.backends.triton import linear_rows

    stored = DTYPES[dtype]
    gradient = torch.float64 if dtype == "f64" else torch.float32
    double = torch.empty(ROWS, dtype=torch.float64)
    x, w = torch.empty(ROWS, width, dtype=stored), torch.empty(_CLASSES, width, dtype=stored)
    x_norm, w_norm = (double, torch.empty(_CLASSES, dtype=torch.float64)) if cosines else (None, None)
    pairs = linear_rows.Pairs(x, w, torch.zeros(ROWS, dtype=torch.int64), width, x_norm, w_norm, double)
    linear_rows.label_products(pairs, ROWS)
    linear_rows.add_label_gradients(pairs, double, x.to(gradient), w.to(gradient))
    if cosines:
        linear_rows.project_rows(x, double, x.to(gradient), True)


def variants(quick: bool) -> list[Variant]:
    widths = (512,) if quick else (64, 100, 256, 512)
    found = [
        variant(linear_tiles, dtype, width, options=options)
        for dtype in ("bf16", "f16")
        for width in widths
        for options in ((True,) if quick else (False, True))
    ]
    return found + [
        variant(linear_rows, dtype, width, cosines=cosines)
        for dtype in (("f32",) if quick else DTYPES)
        for width in ((512,) if quick else (100, 512, 2048))
        for cosines in ((True,) if quick else (False, True))
    ]
