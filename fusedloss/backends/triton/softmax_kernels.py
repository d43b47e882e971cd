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
from .grad_logits import add_columns, grad_of_block, load_coefficients, store_coefficients, write_columns, write_grad
from .statistics import add_block, add_hinge, no_hinge, no_sums


class Sizes(NamedTuple):
    """Counts of one launch; the number of classes is in units of ALIGN."""

    class_units: int
    rows: int
    inner: int
    inner_tiles: int
    tiles: int
    tiles_per_program: int


class Written(NamedTuple):
    """dL/dz and the logits of a tile."""

    grad: Any
    x: Any


@triton.jit
def tile_in_registers(tile, inputs, outputs, saved, row_tensors, row_view, sizes, options, spec):
    """Rows of one block: sums, hinge, row function and gradient from one read of the logits."""
    num_classes = sizes.class_units * spec.align
    rows = rows_of_tile(tile, sizes, row_view, spec.rows)
    label = read_label(inputs, rows, num_classes, spec)
    classes = tl.arange(0, spec.block)
    block = read_block(inputs, rows, label, classes, num_classes, spec)
    sums = no_sums(rows, spec.dtype)
    if spec.sums:
        sums = add_block(sums, block, label, classes, spec)
    hinge = None
    if spec.top is not None:
        hinge = no_hinge(spec.top(rows, sums, label, row_tensors, spec), rows, options.penalty_margin, spec.dtype)
        hinge = add_hinge(hinge, block, classes, num_classes, spec.dtype)
    coefficients = spec.row(rows, sums, hinge, label, num_classes, options, row_tensors, spec)
    if saved.coefficients is not None:
        store_coefficients(saved, coefficients, rows, sizes.rows, spec.dtype)
    grad = grad_of_block(coefficients, block, label, classes, spec)
    if outputs.grad_logits is not None:
        write_grad(inputs, outputs, grad, block, label, coefficients, rows, classes, num_classes, spec)
    return Written(grad, block.x)


@triton.jit
def tile_in_steps(tile, inputs, outputs, saved, row_tensors, row_view, sizes, options, spec):
    """Longer rows, block by block: a pass for the sums, one for a hinge, and another for the gradient."""
    num_classes = sizes.class_units * spec.align
    rows = rows_of_tile(tile, sizes, row_view, spec.rows)
    label = read_label(inputs, rows, num_classes, spec)
    sums = no_sums(rows, spec.dtype)
    if spec.sums:
        for start in range(0, num_classes, spec.block):
            classes = start + tl.arange(0, spec.block)
            block = read_block(inputs, rows, label, classes, num_classes, spec)
            sums = add_block(sums, block, label, classes, spec)
    hinge = None
    if spec.top is not None:
        hinge = no_hinge(spec.top(rows, sums, label, row_tensors, spec), rows, options.penalty_margin, spec.dtype)
        for start in range(0, num_classes, spec.block):
            classes = start + tl.arange(0, spec.block)
            block = read_block(inputs, rows, label, classes, num_classes, spec)
            hinge = add_hinge(hinge, block, classes, num_classes, spec.dtype)
    coefficients = spec.row(rows, sums, hinge, label, num_classes, options, row_tensors, spec)
    if saved.coefficients is not None:
        store_coefficients(saved, coefficients, rows, sizes.rows, spec.dtype)
    if outputs.grad_logits is not None:
        for start in range(0, num_classes, spec.block):
            classes = start + tl.arange(0, spec.block)
            block = read_block(inputs, rows, label, classes, num_classes, spec)
            grad = grad_of_block(coefficients, block, label, classes, spec)
            write_grad(inputs, outputs, grad, block, label, coefficients, rows, classes, num_classes, spec)


# Triton's launcher has an `options` of its own.
@triton.jit(do_not_specialize=["row_options"])
def row_kernel(inputs, outputs, saved, row_tensors, row_view, sizes, row_options, spec):
    """One tile per program, or a run of tiles where the program keeps column sums."""
    program = tl.program_id(0)
    if not spec.one_block:
        tile_in_steps(program, inputs, outputs, saved, row_tensors, row_view, sizes, row_options, spec)
    elif outputs.grad_scale is None:
        tile_in_registers(program, inputs, outputs, saved, row_tensors, row_view, sizes, row_options, spec)
    else:
        scale_sum = tl.zeros([spec.rows, spec.block], spec.dtype)
        bias_sum = tl.zeros([spec.rows, spec.block], spec.dtype)
        first = program * sizes.tiles_per_program
        for tile in range(first, tl.minimum(first + sizes.tiles_per_program, sizes.tiles)):
            written = tile_in_registers(
                tile, inputs, outputs, saved, row_tensors, row_view, sizes, row_options, spec
            )  # fmt: skip
            scale_sum, bias_sum = add_columns(scale_sum, bias_sum, written.grad, written.x)
        write_columns(outputs, scale_sum, bias_sum, program, tl.arange(0, spec.block), sizes.class_units * spec.align)


@triton.jit
def column_kernel(inputs, outputs, saved, row_view, sizes, spec):
    """Gradient and column sums of a block of classes over a run of tiles, from the coefficients of row_kernel."""
    num_classes = sizes.class_units * spec.align
    classes = tl.program_id(1) * spec.block + tl.arange(0, spec.block)
    scale_sum = tl.zeros([spec.rows, spec.block], spec.dtype)
    bias_sum = tl.zeros([spec.rows, spec.block], spec.dtype)
    first = tl.program_id(0) * sizes.tiles_per_program
    for tile in range(first, tl.minimum(first + sizes.tiles_per_program, sizes.tiles)):
        rows = rows_of_tile(tile, sizes, row_view, spec.rows)
        label = read_label(inputs, rows, num_classes, spec)
        coefficients = load_coefficients(saved, rows, sizes.rows)
        block = read_block(inputs, rows, label, classes, num_classes, spec)
        grad = grad_of_block(coefficients, block, label, classes, spec)
        scale_sum, bias_sum = add_columns(scale_sum, bias_sum, grad, block.x)
        if outputs.grad_logits is not None:
            write_grad(inputs, outputs, grad, block, label, coefficients, rows, classes, num_classes, spec)
    write_columns(outputs, scale_sum, bias_sum, tl.program_id(0), classes, num_classes)


@triton.jit(debug=True)
def label_kernel(
    labels, weights, class_weight, row_view, sizes, num_classes, ignore_index, T: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """What each row adds to the mean's denominator; a label out of range fails a device assertion."""
    rows = rows_of_tile(tl.program_id(0), sizes, row_view, ROWS)
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
