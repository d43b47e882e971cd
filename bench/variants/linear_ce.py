"""A linear head: the kernels over single rows; its logits go through softmax_ce's."""

from __future__ import annotations

import torch

from bench.variants import DTYPES, ROWS, Variant, variant

_CLASSES = 1000


def linear_rows(dtype: str, width: int, *, cosines: bool = False) -> None:
    """Lengths, projection, products and the label's gradients."""
    from fusedloss.backends.triton import linear_rows

    stored = DTYPES[dtype]
    gradient = torch.float64 if dtype == "f64" else torch.float32
    double = torch.empty(ROWS, dtype=torch.float64)
    x, w = torch.empty(ROWS, width, dtype=stored), torch.empty(_CLASSES, width, dtype=stored)
    x_norm, w_norm = (double, torch.empty(_CLASSES, dtype=torch.float64)) if cosines else (None, None)
    pairs = linear_rows.Pairs(x, w, torch.zeros(ROWS, dtype=torch.int64), width, x_norm, w_norm, double)
    linear_rows.target_products(pairs, ROWS)
    linear_rows.add_label_gradients(pairs, double, x.to(gradient), w.to(gradient))
    if cosines:
        linear_rows.row_norms(w)
        linear_rows.project_rows(x, double, x.to(gradient), True)


def variants(quick: bool) -> list[Variant]:
    return [
        variant(linear_rows, dtype, width, cosines=cosines)
        for dtype in (("f32",) if quick else DTYPES)
        for width in ((512,) if quick else (100, 512, 2048))
        for cosines in ((True,) if quick else (False, True))
    ]
