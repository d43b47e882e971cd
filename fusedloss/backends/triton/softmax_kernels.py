"""The softmax kernels: sweeps over tiles of rows, made of the pieces in ``blocks`` and a row function.

Rows that fit in registers are read once. Longer ones are read twice by the same program, so that the second
read finds in the cache what the first left there. Column sums of long rows take a kernel whose programs own
classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .blocks import (
    Slopes,
    add_block,
    add_columns,
    no_sums,
    read_block,
    read_label,
    rows_of_tile,
    slope_of_block,
    write_gradient,
)
from .rows import Scalars


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
def store_slopes(pointer, slopes, rows, row_count, T: tl.constexpr):
    place = pointer + rows.index
    tl.store(place, slopes.shift, mask=rows.valid)
    tl.store(place + row_count, slopes.softmax, mask=rows.valid)
    tl.store(place + 2 * row_count, slopes.uniform, mask=rows.valid)
    tl.store(place + 3 * row_count, slopes.at_target, mask=rows.valid)
    tl.store(place + 4 * row_count, slopes.kept.to(T), mask=rows.valid)


@triton.jit
def load_slopes(pointer, rows, row_count):
    place = pointer + rows.index
    shift = tl.load(place, mask=rows.valid, other=0.0)
    softmax = tl.load(place + row_count, mask=rows.valid, other=0.0)
    uniform = tl.load(place + 2 * row_count, mask=rows.valid, other=0.0)
    at_target = tl.load(place + 3 * row_count, mask=rows.valid, other=0.0)
    kept = tl.load(place + 4 * row_count, mask=rows.valid, other=0.0) != 0
    return Slopes(shift, softmax, uniform, at_target, kept)


@triton.jit
def tile_in_registers(
    tile, inputs, outputs, saved_slopes, arguments, row_view, sizes, ignore_index, scalars, ROW: tl.constexpr,
    SUMS: tl.constexpr, UNIFORM: tl.constexpr, PREDICTION: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Rows of one block: sums, row function and gradient from one read of the logits."""
    num_classes = sizes.class_units * ALIGN
    rows = rows_of_tile(tile, sizes.inner_tiles, sizes.inner, row_view, ROWS)
    label = read_label(inputs, rows, num_classes, ignore_index, T, ALIGN)
    classes = tl.arange(0, BLOCK)
    block = read_block(inputs, rows, classes, num_classes, T, ALIGN)
    sums = no_sums(rows, T)
    if SUMS:
        sums = add_block(sums, block, label, classes, inputs.labels is None, UNIFORM, PREDICTION)
    slopes = ROW(rows, sums, label, num_classes, scalars, arguments, T, inputs.labels is None, UNIFORM)
    if saved_slopes is not None:
        store_slopes(saved_slopes, slopes, rows, sizes.rows, T)
    slope = slope_of_block(slopes, block, label, classes, inputs.labels is None, UNIFORM)
    if outputs.gradient is not None:
        write_gradient(outputs, slope, inputs.scale, rows, classes, num_classes, ALIGN)
    return Written(slope, block.x)


@triton.jit
def tile_in_steps(tile, inputs, outputs, saved_slopes, arguments, row_view, sizes, ignore_index, scalars,
                  ROW: tl.constexpr, SUMS: tl.constexpr, UNIFORM: tl.constexpr, PREDICTION: tl.constexpr,
                  T: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """Longer rows, block by block: a pass for the sums, and another for the gradient."""
    num_classes = sizes.class_units * ALIGN
    rows = rows_of_tile(tile, sizes.inner_tiles, sizes.inner, row_view, ROWS)
    label = read_label(inputs, rows, num_classes, ignore_index, T, ALIGN)
    sums = no_sums(rows, T)
    if SUMS:
        for start in range(0, num_classes, BLOCK):
            classes = start + tl.arange(0, BLOCK)
            block = read_block(inputs, rows, classes, num_classes, T, ALIGN)
            sums = add_block(sums, block, label, classes, inputs.labels is None, UNIFORM, PREDICTION)
    slopes = ROW(rows, sums, label, num_classes, scalars, arguments, T, inputs.labels is None, UNIFORM)
    if saved_slopes is not None:
        store_slopes(saved_slopes, slopes, rows, sizes.rows, T)
    if outputs.gradient is not None:
        for start in range(0, num_classes, BLOCK):
            classes = start + tl.arange(0, BLOCK)
            block = read_block(inputs, rows, classes, num_classes, T, ALIGN)
            slope = slope_of_block(slopes, block, label, classes, inputs.labels is None, UNIFORM)
            write_gradient(outputs, slope, inputs.scale, rows, classes, num_classes, ALIGN)


@triton.jit
def write_columns(outputs, scale_sum, bias_sum, part, classes, num_classes):
    place = part.to(tl.int64) * num_classes + classes
    tl.store(outputs.scale + place, tl.sum(scale_sum, 0), mask=classes < num_classes)
    tl.store(outputs.bias + place, tl.sum(bias_sum, 0), mask=classes < num_classes)


@triton.jit
def row_kernel(
    inputs, outputs, saved_slopes, arguments, row_view, sizes, ignore_index, smoothing: tl.float64,
    focal_gamma: tl.float64, z_loss: tl.float64, ROW: tl.constexpr, SUMS: tl.constexpr, UNIFORM: tl.constexpr,
    PREDICTION: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One tile per program, or a run of tiles where the program keeps column sums."""
    scalars = Scalars(smoothing, focal_gamma, z_loss)
    program = tl.program_id(0)
    if not ONE_BLOCK:
        tile_in_steps(
            program, inputs, outputs, saved_slopes, arguments, row_view, sizes, ignore_index, scalars, ROW,
            SUMS, UNIFORM, PREDICTION, T, ROWS, BLOCK, ALIGN,
        )  # fmt: skip
    elif outputs.scale is None:
        tile_in_registers(
            program, inputs, outputs, saved_slopes, arguments, row_view, sizes, ignore_index, scalars, ROW,
            SUMS, UNIFORM, PREDICTION, T, ROWS, BLOCK, ALIGN,
        )  # fmt: skip
    else:
        scale_sum = tl.zeros([ROWS, BLOCK], T)
        bias_sum = tl.zeros([ROWS, BLOCK], T)
        first = program * sizes.tiles_per_program
        for tile in range(first, tl.minimum(first + sizes.tiles_per_program, sizes.tiles)):
            written = tile_in_registers(
                tile, inputs, outputs, saved_slopes, arguments, row_view, sizes, ignore_index, scalars, ROW,
                SUMS, UNIFORM, PREDICTION, T, ROWS, BLOCK, ALIGN,
            )  # fmt: skip
            scale_sum, bias_sum = add_columns(scale_sum, bias_sum, written.slope, written.x)
        write_columns(outputs, scale_sum, bias_sum, program, tl.arange(0, BLOCK), sizes.class_units * ALIGN)


@triton.jit
def column_kernel(
    inputs, outputs, saved_slopes, row_view, sizes, ignore_index, UNIFORM: tl.constexpr, T: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Gradient and column sums of a block of classes over a run of tiles, from the slopes of row_kernel."""
    num_classes = sizes.class_units * ALIGN
    classes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale_sum = tl.zeros([ROWS, BLOCK], T)
    bias_sum = tl.zeros([ROWS, BLOCK], T)
    first = tl.program_id(0) * sizes.tiles_per_program
    for tile in range(first, tl.minimum(first + sizes.tiles_per_program, sizes.tiles)):
        rows = rows_of_tile(tile, sizes.inner_tiles, sizes.inner, row_view, ROWS)
        label = read_label(inputs, rows, num_classes, ignore_index, T, ALIGN)
        slopes = load_slopes(saved_slopes, rows, sizes.rows)
        block = read_block(inputs, rows, classes, num_classes, T, ALIGN)
        slope = slope_of_block(slopes, block, label, classes, inputs.labels is None, UNIFORM)
        scale_sum, bias_sum = add_columns(scale_sum, bias_sum, slope, block.x)
        if outputs.gradient is not None:
            write_gradient(outputs, slope, inputs.scale, rows, classes, num_classes, ALIGN)
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
