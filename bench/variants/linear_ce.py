"""A linear head: tiles of 16-bit heads with every option, and the kernels over single rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.variants import DTYPES, ROWS, ShapeClass, Variant, limited, variant
from fusedloss.core.operands import LinearInputs, LinearMask, RowInputs, SavedStatistics, StatisticsGrads
from fusedloss.core.row_loss import RowOptions

TUNED = ("bfloat16",)
_CLASSES = 1000
_TIMED_ROWS, _TIMED_CLASSES = 4096, 16384
# Rows, columns, features of a step and of a block, warps, stages: sizes that hold the tensor cores of sm_80 to sm_100.
_TILES = {
    "sums": (
        (64, 64, 64, 64, 4, 2), (64, 128, 64, 64, 4, 3), (128, 64, 64, 64, 4, 3), (128, 128, 64, 64, 8, 3),
        (128, 128, 32, 64, 8, 4), (128, 256, 64, 64, 8, 3), (64, 256, 64, 64, 8, 3),
    ),
    "input": (
        (64, 64, 64, 256, 8, 2), (64, 64, 64, 128, 4, 2), (128, 64, 64, 128, 8, 2), (64, 128, 64, 128, 8, 2),
        (128, 64, 64, 256, 8, 2), (64, 64, 64, 512, 8, 2), (128, 128, 64, 128, 8, 2),
    ),
    "weight": (
        (32, 64, 32, 256, 8, 2), (64, 64, 64, 128, 4, 2), (64, 128, 64, 128, 8, 2), (128, 64, 64, 128, 8, 2),
        (64, 128, 64, 256, 8, 2), (64, 64, 64, 512, 8, 2), (128, 128, 64, 128, 8, 2),
    ),
}  # fmt: skip
_WIDTHS_OF_HEADS = (128, 256, 512, 1024)


def linear_tiles(dtype: str, width: int, *, options: bool = False) -> None:
    """Sums, the input's gradient and the weight's; `options` are all that a head may have."""
    from fusedloss.backends.triton import linear_tiles
    from fusedloss.backends.triton.linear_coefficients import row_coefficients

    operand, per_row, per_class = DTYPES[dtype], torch.empty(ROWS), torch.empty(_CLASSES)
    some = (lambda tensor: tensor) if options else (lambda tensor: None)
    x, w = torch.empty(ROWS, width, dtype=operand), torch.empty(_CLASSES, width, dtype=operand)
    of_head = (*map(some, (per_class,) * 3), some(per_row))
    head = linear_tiles.Head(x, w, ROWS, _CLASSES, width, torch.zeros(ROWS, dtype=torch.int64), *of_head)
    saved = SavedStatistics(per_row, per_row, per_row)
    grads = StatisticsGrads(per_row, per_row, per_row, some(per_row), per_row)
    override_grad = torch.empty(ROWS, dtype=torch.float64) if options else None
    weight_sum = torch.empty((), dtype=torch.float64) if options else None
    linear_tiles.tile_sums(head, options)
    rows = row_coefficients(head, saved, grads, weight_sum, override_grad)
    linear_tiles.grad_input(head, rows, options)
    linear_tiles.grad_weight(head, rows, options, True, options)


def linear_rows(dtype: str, width: int, *, cosines: bool = False) -> None:
    """Projection, products and the label's gradients."""
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
        linear_rows.project_rows(x, double, x.to(gradient), True)


def variants(quick: bool) -> list[Variant]:
    widths = (512,) if quick else (20, 64, 100, 256, 512)
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


def _tiled(
    device: torch.device, kernel: str, rows: int, classes: int, width: int, dtype: torch.dtype
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """One kernel of a plain head."""
    from fusedloss.backends.triton import linear_tiles

    x = torch.randn(rows, width, device=device).to(dtype)
    w = (torch.randn(classes, width, device=device) / width**0.5).to(dtype)
    labels = torch.randint(classes, (rows,), device=device)
    head = linear_tiles.Head(x, w, rows, classes, width, labels, None, None, None, None)
    top, others, _, label_z = linear_tiles.tile_sums(head, False)
    shift = torch.maximum(top, label_z)
    row_sum = (top - shift).exp() * others + (label_z - shift).exp()
    share = torch.full_like(shift, 1 / rows)
    target = share * ((label_z - shift).exp() / row_sum - 1)
    coefficients = linear_tiles.RowCoefficients(shift, share / row_sum, torch.zeros_like(share), target, target)
    calls: dict[str, Callable[[], tuple[torch.Tensor, ...]]] = {
        "sums": lambda: (linear_tiles.tile_sums(head, False),),
        "input": lambda: (linear_tiles.grad_input(head, coefficients, False),),
        "weight": lambda: linear_tiles.grad_weight(head, coefficients, False, True, False)[:1],  # type: ignore
    }
    return calls[kernel]


def _heads(
    device: torch.device, rows: int, classes: int, widths: tuple[int, ...], dtype: torch.dtype
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Loss and gradients of heads of several widths in turn: the sum is least where each goes the faster way."""
    from fusedloss.backends.triton.linear_ce import linear_ce

    heads = []
    for width in widths:
        x = torch.randn(rows, width, device=device).to(dtype)
        w = (torch.randn(classes, width, device=device) / width**0.5).to(dtype)
        heads.append(LinearInputs(x, w, torch.randint(classes, (rows,), device=device)))
    mask = LinearMask(input=True, weight=True)

    def call() -> tuple[torch.Tensor, ...]:
        results = [linear_ce(head, RowInputs(), RowOptions(), True, mask) for head in heads]
        return tuple(tensor for loss, row_loss, grads in results for tensor in (loss, row_loss, *grads))

    return call


def shape_classes(dtype: torch.dtype, small: bool) -> list[ShapeClass]:
    from fusedloss.backends.triton import tuning

    rows, classes = (5, 40) if small else (_TIMED_ROWS, _TIMED_CLASSES)
    found = []
    # The widest first: they are the slowest, should the time run out.
    for name in reversed(tuning.DEVICES[tuning.DEFAULT]["tiles"]["linear_ce"][str(dtype).removeprefix("torch.")]):
        kernel, size = name.split()
        if kernel in _TILES:
            width = int(size)
            prepare = partial(_tiled, kernel=kernel, rows=rows, classes=classes, width=width, dtype=dtype)
            found.append(ShapeClass(name, prepare, limited(_TILES[kernel], width)))
    # Last, in the tiles that were found.
    widths = (20, 40) if small else _WIDTHS_OF_HEADS
    prepare = partial(_heads, rows=rows, classes=classes, widths=widths, dtype=dtype)
    choice = ShapeClass("widest tiled", prepare, [(0,), *((width,) for width in widths)])
    if small:
        some = [each for each in found if each.name.endswith(" 32")]
        return [each._replace(candidates=each.candidates[:1]) for each in some] + [choice]
    return [*found, choice]
