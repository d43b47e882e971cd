"""The softmax kernels: sweeps over tiles of rows, made of the pieces in ``blocks`` and a row function.

Rows that fit in registers are read once. Longer ones are read twice by the same program, so that the second
read finds in the cache what the first left there. Column sums of long rows take a kernel whose programs own
classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .blocks import read_block, read_label, rows_of_tile
from .rows import Scalars
from .slopes import add_columns, load_slopes, slope_of_block, store_slopes, write_columns, write_gradient
from .sums import add_block, add_hinge, no_hinge, no_sums


class Sizes(NamedTuple):
    """Counts of one launch; the number of classes is in units of ALIGN."""

    class_units: int
    rows: int
    inner: int
    inner_tiles: int
    tiles: int
    tiles_per_program: int


class Written(NamedTuple):
    """Slopes and logits of a tile."""

    slope: Any
    x: Any


@triton.jit
def tile_in_registers(
    tile, inputs, outputs, saved, arguments, row_view, sizes, ignore_index, scalars, ROW: tl.constexpr,
    TOP: tl.constexpr, CAP: tl.constexpr, SUMS: tl.constexpr, UNIFORM: tl.constexpr, PREDICTION: tl.constexpr,
    T: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Rows of one block: sums, hinge, row function and gradient from one read of the logits."""
    num_classes = sizes.class_units * ALIGN
    SOFT: tl.constexpr = inputs.labels is None
    STAND_IN: tl.constexpr = inputs.target_override is not None
    rows = rows_of_tile(tile, sizes.inner_tiles, sizes.inner, row_view, ROWS)
    label = read_label(inputs, rows, num_classes, ignore_index, scalars.soft_cap, CAP, T, ALIGN)
    classes = tl.arange(0, BLOCK)
    block = read_block(inputs, rows, label, classes, num_classes, scalars.soft_cap, CAP, T, ALIGN)
    sums = no_sums(rows, T)
    if SUMS:
        sums = add_block(sums, block, label, classes, SOFT, STAND_IN, UNIFORM, PREDICTION)
    hinge = None
    if TOP is not None:
        hinge = no_hinge(TOP(rows, sums, label, arguments, STAND_IN), rows, scalars.penalty_margin, T)
        hinge = add_hinge(hinge, block, classes, num_classes, T)
    slopes = ROW(rows, sums, hinge, label, num_classes, scalars, arguments, T, SOFT, STAND_IN, UNIFORM)
    if saved.slopes is not None:
        store_slopes(saved, slopes, rows, sizes.rows, T)
    slope = slope_of_block(slopes, block, label, classes, SOFT, STAND_IN, UNIFORM, TOP is not None)
    if outputs.gradient is not None:
        write_gradient(
            inputs, outputs, slope, block, label, slopes, rows, classes, num_classes, scalars.soft_cap,
            CAP, T, ALIGN,
        )  # fmt: skip
    return Written(slope, block.x)


@triton.jit
def tile_in_steps(
    tile, inputs, outputs, saved, arguments, row_view, sizes, ignore_index, scalars, ROW: tl.constexpr,
    TOP: tl.constexpr, CAP: tl.constexpr, SUMS: tl.constexpr, UNIFORM: tl.constexpr, PREDICTION: tl.constexpr,
    T: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Longer rows, block by block: a pass for the sums, one for a hinge, and another for the gradient."""
    num_classes = sizes.class_units * ALIGN
    SOFT: tl.constexpr = inputs.labels is None
    STAND_IN: tl.constexpr = inputs.target_override is not None
    rows = rows_of_tile(tile, sizes.inner_tiles, sizes.inner, row_view, ROWS)
    label = read_label(inputs, rows, num_classes, ignore_index, scalars.soft_cap, CAP, T, ALIGN)
    sums = no_sums(rows, T)
    if SUMS:
        for start in range(0, num_classes, BLOCK):
            classes = start + tl.arange(0, BLOCK)
            block = read_block(inputs, rows, label, classes, num_classes, scalars.soft_cap, CAP, T, ALIGN)
            sums = add_block(sums, block, label, classes, SOFT, STAND_IN, UNIFORM, PREDICTION)
    hinge = None
    if TOP is not None:
        hinge = no_hinge(TOP(rows, sums, label, arguments, STAND_IN), rows, scalars.penalty_margin, T)
        for start in range(0, num_classes, BLOCK):
            classes = start + tl.arange(0, BLOCK)
            block = read_block(inputs, rows, label, classes, num_classes, scalars.soft_cap, CAP, T, ALIGN)
            hinge = add_hinge(hinge, block, classes, num_classes, T)
    slopes = ROW(rows, sums, hinge, label, num_classes, scalars, arguments, T, SOFT, STAND_IN, UNIFORM)
    if saved.slopes is not None:
        store_slopes(saved, slopes, rows, sizes.rows, T)
    if outputs.gradient is not None:
        for start in range(0, num_classes, BLOCK):
            classes = start + tl.arange(0, BLOCK)
            block = read_block(inputs, rows, label, classes, num_classes, scalars.soft_cap, CAP, T, ALIGN)
            slope = slope_of_block(slopes, block, label, classes, SOFT, STAND_IN, UNIFORM, TOP is not None)
            write_gradient(
                inputs, outputs, slope, block, label, slopes, rows, classes, num_classes, scalars.soft_cap,
                CAP, T, ALIGN,
            )  # fmt: skip


@triton.jit
def row_kernel(
    inputs, outputs, saved, arguments, row_view, sizes, ignore_index, smoothing: tl.float64,
    focal_gamma: tl.float64, z_loss: tl.float64, soft_cap: tl.float64, penalty: tl.float64,
    penalty_margin: tl.float64, penalty_share: tl.float64, penalty_mix: tl.float64, ROW: tl.constexpr,
    TOP: tl.constexpr, CAP: tl.constexpr, SUMS: tl.constexpr, UNIFORM: tl.constexpr, PREDICTION: tl.constexpr,
    T: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One tile per program, or a run of tiles where the program keeps column sums.

    ROW is the row function; TOP finds the maximum that a hinge hangs from, CAP caps logits: None where absent.
    """
    scalars = Scalars(
        smoothing, focal_gamma, z_loss, soft_cap, penalty, penalty_margin, penalty_share, penalty_mix
    )  # fmt: skip
    program = tl.program_id(0)
    if not ONE_BLOCK:
        tile_in_steps(
            program, inputs, outputs, saved, arguments, row_view, sizes, ignore_index, scalars, ROW, TOP, CAP,
            SUMS, UNIFORM, PREDICTION, T, ROWS, BLOCK, ALIGN,
        )  # fmt: skip
    elif outputs.scale is None:
        tile_in_registers(
            program, inputs, outputs, saved, arguments, row_view, sizes, ignore_index, scalars, ROW, TOP, CAP,
            SUMS, UNIFORM, PREDICTION, T, ROWS, BLOCK, ALIGN,
        )  # fmt: skip
    else:
        scale_sum = tl.zeros([ROWS, BLOCK], T)
        bias_sum = tl.zeros([ROWS, BLOCK], T)
        first = program * sizes.tiles_per_program
        for tile in range(first, tl.minimum(first + sizes.tiles_per_program, sizes.tiles)):
            written = tile_in_registers(
                tile, inputs, outputs, saved, arguments, row_view, sizes, ignore_index, scalars, ROW, TOP, CAP,
                SUMS, UNIFORM, PREDICTION, T, ROWS, BLOCK, ALIGN,
            )  # fmt: skip
            scale_sum, bias_sum = add_columns(scale_sum, bias_sum, written.slope, written.x)
        write_columns(outputs, scale_sum, bias_sum, program, tl.arange(0, BLOCK), sizes.class_units * ALIGN)


@triton.jit
def column_kernel(
    inputs, outputs, saved, row_view, sizes, ignore_index, soft_cap: tl.float64, CAP: tl.constexpr,
    UNIFORM: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Gradient and column sums of a block of classes over a run of tiles, from the slopes of row_kernel."""
    num_classes = sizes.class_units * ALIGN
    SOFT: tl.constexpr = inputs.labels is None
    STAND_IN: tl.constexpr = inputs.target_override is not None
    classes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale_sum = tl.zeros([ROWS, BLOCK], T)
    bias_sum = tl.zeros([ROWS, BLOCK], T)
    first = tl.program_id(0) * sizes.tiles_per_program
    for tile in range(first, tl.minimum(first + sizes.tiles_per_program, sizes.tiles)):
        rows = rows_of_tile(tile, sizes.inner_tiles, sizes.inner, row_view, ROWS)
        label = read_label(inputs, rows, num_classes, ignore_index, soft_cap, CAP, T, ALIGN)
        slopes = load_slopes(saved, rows, sizes.rows)
        block = read_block(inputs, rows, label, classes, num_classes, soft_cap, CAP, T, ALIGN)
        slope = slope_of_block(slopes, block, label, classes, SOFT, STAND_IN, UNIFORM, saved.hinge is not None)
        scale_sum, bias_sum = add_columns(scale_sum, bias_sum, slope, block.x)
        if outputs.gradient is not None:
            write_gradient(
                inputs, outputs, slope, block, label, slopes, rows, classes, num_classes, soft_cap, CAP, T,
                ALIGN,
            )  # fmt: skip
    write_columns(outputs, scale_sum, bias_sum, tl.program_id(0), classes, num_classes)


@triton.jit(debug=True)
def label_kernel(labels, weights, class_weight, row_view, sizes, num_classes, ignore_index, T: tl.constexpr,
                 ROWS: tl.constexpr):  # fmt: skip
    """What each row adds to the mean's denominator; a label out of range fails a device assertion."""
    rows = rows_of_tile(tl.program_id(0), sizes.inner_tiles, sizes.inner, row_view, ROWS)
    place = labels.pointer + rows.outer * labels.outer_step + rows.inner * labels.inner_step
    label = tl.load(place, mask=rows.valid, other=0)
    kept = rows.valid & (label != ignore_index)
    inside = kept & (label >= 0) & (label < num_classes)
    tl.device_assert(inside | (kept == 0), "target: a label is outside [0, number of classes)")
    if weights is not None:
        weight = inside.to(T)
        if class_weight is not None:
            weight = tl.load(class_weight + label, mask=inside, other=0.0)
        tl.store(weights + rows.index, weight, mask=rows.valid)


@triton.jit
def scale_kernel(gradient, factor, count, T: tl.constexpr, BLOCK: tl.constexpr):
    scale = tl.load(factor).to(T)
    if scale != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(gradient + place, mask=place < count, other=0.0).to(T) * scale
        tl.store(gradient + place, value.to(gradient.dtype.element_ty), mask=place < count)
