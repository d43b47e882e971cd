"""The softmax kernels: sweeps over tiles of rows, made of the pieces in ``blocks`` and a row function.

Rows that fit in registers are read once and held as they are stored, in blocks of one warp's reach where that suffices:
whole rows then go to warps, and no barrier is needed. Longer rows are read twice by the same program, so that the
second read finds in the cache what the first left there. Column sums of long rows take a kernel whose programs own
classes. Programs are as many as a GPU runs at a time, and take one tile after another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .blocks import (
    Block,
    block_of,
    class_weights,
    classes_of,
    load_logits,
    load_probabilities,
    read_block,
    read_label,
    rows_of_tile,
)
from .grad_logits import (
    add_columns,
    exp_of_block,
    grad_of_block,
    load_coefficients,
    store_coefficients,
    write_columns,
    write_grad,
)
from .statistics import (
    NO_CLASS,
    HingeSums,
    RowSums,
    add_block,
    add_hinge,
    block_sums,
    hinge_sums,
    no_hinge,
    no_sums,
    shift_of,
    without_label,
)


class Sizes(NamedTuple):
    """Counts of one launch; the number of classes is in units of ALIGN."""

    class_units: int
    rows: int
    inner: int
    inner_tiles: int
    tiles: int


class Bounds(NamedTuple):
    """Which labels there are."""

    num_classes: int
    ignore_index: int


class HeldSums(NamedTuple):
    """RowSums of rows held in registers; exp(z - shift) of every block, 0 at labels, or () where it isn't kept."""

    sums: Any
    exps: Any


class Written(NamedTuple):
    """dL/dz and the logits of a tile of one block, and the losses of its rows as they count in the sum."""

    grad: Any
    x: Any
    loss: Any


# Programs of label_kernel, each of which leaves a sum of weights; the programs of row_kernel leave theirs behind these.
PARTS = tl.constexpr(64)
PARTS_AT_ONCE = tl.constexpr(1024)


@triton.jit
def load_held(inputs, rows, num_classes, spec):
    """What is stored of the rows: the logits of all blocks, then the probabilities."""
    stored = ()
    for i in tl.static_range(spec.chunks):
        start = i * spec.block
        block = load_logits(inputs, rows, start, num_classes, spec, i < spec.chunks - 1)
        stored = stored + (block,)  # type: ignore[assignment]
    if spec.soft:
        for i in tl.static_range(spec.chunks):
            start = i * spec.block
            block = load_probabilities(inputs, rows, start, num_classes, spec, i < spec.chunks - 1)
            stored = stored + (block,)  # type: ignore[assignment]
    return stored


@triton.jit
def held_of(stored, inputs, label, num_classes, spec):
    """What is held of the rows: with spec.wide the capped logits and then z of all blocks, before the probabilities."""
    held = stored
    if spec.wide:
        xs, zs, probabilities = (), (), ()
        for i in tl.static_range(spec.chunks):
            start = i * spec.block
            block = block_of(
                stored[i], stored[i], inputs, label, start, num_classes, spec, i < spec.chunks - 1
            )  # fmt: skip
            xs, zs = xs + (block.x,), zs + (block.z,)  # type: ignore[assignment]
            if spec.soft:
                probabilities = probabilities + (stored[spec.chunks + i],)  # type: ignore[assignment]
        held = xs + zs + probabilities
    return held


@triton.jit
def held_block(i: tl.constexpr, held, inputs, label, num_classes, spec, PASS: tl.constexpr):
    """Block i of rows that are held in registers; see ``load_some`` for PASS."""
    start = i * spec.block
    whole: tl.constexpr = i < spec.chunks - 1
    at: tl.constexpr = spec.chunks + (spec.chunks if spec.wide else 0) + i if spec.soft else i
    if spec.wide:
        weights = class_weights(inputs, held[at], start, num_classes, spec, whole, PASS)
        return Block(held[i], held[spec.chunks + i], weights.weight, weights.soft)
    else:
        return block_of(held[i], held[at], inputs, label, start, num_classes, spec, whole, PASS)


@triton.jit
def sum_of_weights(inputs, num_classes, spec):
    """The sum of the class weights w, for rows held in registers."""
    if inputs.class_weight is None:
        return tl.zeros([1], spec.dtype) + num_classes
    else:
        weight = tl.zeros([spec.block], spec.dtype)
        for i in tl.static_range(spec.chunks):
            classes = classes_of(i * spec.block, spec)
            weight += tl.load(inputs.class_weight + classes, mask=classes < num_classes, other=0.0)
        return tl.zeros([1], spec.dtype) + tl.sum(weight, 0)


@triton.jit
def sums_of_held(held, inputs, label, num_classes, weight_sum, spec):
    """The rows' sums: added up class by class over the blocks, and over threads once."""
    top = tl.full([spec.rows, spec.block], float("-inf"), spec.dtype)
    # From the last block on: in this order the widest rows with values of classes fit into registers.
    for i in tl.static_range(spec.chunks - 1, -1, -1):
        start = i * spec.block
        block = held_block(i, held, inputs, label, num_classes, spec, 0)
        top = tl.maximum(top, without_label(block, label, start, spec))
    row_top = tl.max(top, 1)
    if spec.override and not spec.prediction:
        # The sums are about the maximum of all classes, as the gradient is.
        row_top = tl.maximum(row_top, label.logit)
    shift = shift_of(row_top)
    exps = ()
    others = tl.zeros([spec.rows, spec.block], spec.dtype)
    smooth, soft_weight, soft = others, others, others
    first_top = tl.full([spec.rows, spec.block], NO_CLASS, tl.int32)
    first_nan = first_top
    for i in tl.static_range(spec.chunks - 1, -1, -1):
        start = i * spec.block
        block = held_block(i, held, inputs, label, num_classes, spec, 1)
        z = without_label(block, label, start, spec)
        added = block_sums(block, z, shift, label, start, spec)
        others += added.others
        if spec.reduced:
            exps = (added.others,) + exps  # type: ignore[assignment]
        if spec.smooth_loss:
            smooth += added.smooth
        if spec.soft:
            soft_weight += added.soft_weight
            soft += added.soft
        if spec.prediction:
            classes = classes_of(start, spec)
            first_top = tl.minimum(first_top, tl.where(z == row_top[:, None], classes[None, :], NO_CLASS))
            first_nan = tl.minimum(first_nan, tl.where(z != z, classes[None, :], NO_CLASS))
    none = tl.zeros([spec.rows], spec.dtype)
    of_weight, of_smooth, of_soft_weight, of_soft = none, none, none, none
    if spec.smooth_loss:
        of_weight, of_smooth = none + weight_sum, tl.sum(smooth, 1)
    if spec.soft:
        of_soft_weight, of_soft = tl.sum(soft_weight, 1), tl.sum(soft, 1)
    of_first_top, of_first_nan = none.to(tl.int32), none.to(tl.int32)
    if spec.prediction:
        of_first_top, of_first_nan = tl.min(first_top, 1), tl.min(first_nan, 1)
    sums = RowSums(row_top, tl.sum(others, 1), of_weight, of_smooth, of_soft_weight, of_soft, of_first_top,
                   of_first_nan)  # fmt: skip
    return HeldSums(sums, exps)


@triton.jit
def hinge_of_held(hinge, held, inputs, label, num_classes, spec):
    total = tl.zeros([spec.rows, spec.block], spec.dtype)
    violations = total
    first = tl.full([spec.rows, spec.block], spec.chunks, tl.int32)
    # From the last block on, so that the first at the maximum stays.
    for i in tl.static_range(spec.chunks - 1, -1, -1):
        start = i * spec.block
        block = held_block(i, held, inputs, label, num_classes, spec, 2)
        added = hinge_sums(hinge, block, start, num_classes, spec, i < spec.chunks - 1)
        total += added.total
        violations += added.violations
        first = tl.where(added.at_top, i, first)
    first = tl.where(first < spec.chunks, first * spec.block + tl.arange(0, spec.block)[None, :], NO_CLASS)
    return HingeSums(hinge.top, hinge.threshold, tl.sum(total, 1), tl.sum(violations, 1), tl.min(first, 1))


@triton.jit
def tile_in_registers(
    tile, inputs, outputs, saved, row_tensors, denominator, weight_sum, row_view, sizes, options, spec
):  # fmt: skip
    """Rows that are read once: sums, hinge, row function and gradient from what registers hold."""
    num_classes = sizes.class_units * spec.align
    rows = rows_of_tile(tile, sizes, row_view, spec.rows, spec.flat)
    stored = load_held(inputs, rows, num_classes, spec)
    label = read_label(inputs, rows, num_classes, spec)
    held = held_of(stored, inputs, label, num_classes, spec)
    sums = no_sums(rows, spec.dtype)
    exps = ()
    if spec.sums:
        found = sums_of_held(held, inputs, label, num_classes, weight_sum, spec)
        sums, exps = found.sums, found.exps
    hinge = None
    if spec.top is not None:
        hinge = no_hinge(spec.top(rows, sums, label, row_tensors, spec), rows, options.penalty_margin, spec.dtype)
        hinge = hinge_of_held(hinge, held, inputs, label, num_classes, spec)
    coefficients = spec.row(rows, sums, hinge, label, num_classes, denominator, options, row_tensors, spec)
    if saved.coefficients is not None:
        store_coefficients(saved, coefficients, rows, sizes.rows, spec.dtype)
    if outputs.grad_logits is not None:
        for i in tl.static_range(spec.chunks):
            start = i * spec.block
            block = held_block(i, held, inputs, label, num_classes, spec, 3)
            # The loss's own coefficients are about the shift of its sums.
            e = exps[i] if spec.reduced else exp_of_block(coefficients, block, spec)
            grad = grad_of_block(coefficients, block, e, label, start, spec)
            write_grad(
                inputs, outputs, grad, block, label, coefficients, rows, start, num_classes, spec, i < spec.chunks - 1
            )  # fmt: skip
    if outputs.grad_scale is not None:
        # Beside column sums, rows are one block.
        block = held_block(0, held, inputs, label, num_classes, spec, 3)
        e = exps[0] if spec.reduced else exp_of_block(coefficients, block, spec)  # type: ignore[misc]
        grad = grad_of_block(coefficients, block, e, label, 0, spec)
        return Written(tl.where(coefficients.kept[:, None], grad, 0.0), block.x, coefficients.loss)
    else:
        return Written(coefficients.loss, coefficients.loss, coefficients.loss)


@triton.jit
def tile_in_steps(
    tile, inputs, outputs, saved, row_tensors, denominator, row_view, sizes, options, spec
):  # fmt: skip
    """Longer rows, block by block: a pass for the sums, one for a hinge, and another for the gradient."""
    num_classes = sizes.class_units * spec.align
    rows = rows_of_tile(tile, sizes, row_view, spec.rows, spec.flat)
    label = read_label(inputs, rows, num_classes, spec)
    sums = no_sums(rows, spec.dtype)
    if spec.sums:
        for start in range(0, num_classes, spec.block):
            block = read_block(inputs, rows, label, start, num_classes, spec)
            sums = add_block(sums, block, label, start, spec)
    hinge = None
    if spec.top is not None:
        hinge = no_hinge(spec.top(rows, sums, label, row_tensors, spec), rows, options.penalty_margin, spec.dtype)
        for start in range(0, num_classes, spec.block):
            block = read_block(inputs, rows, label, start, num_classes, spec)
            hinge = add_hinge(hinge, block, start, num_classes, spec)
    coefficients = spec.row(rows, sums, hinge, label, num_classes, denominator, options, row_tensors, spec)
    if saved.coefficients is not None:
        store_coefficients(saved, coefficients, rows, sizes.rows, spec.dtype)
    if outputs.grad_logits is not None:
        for start in range(0, num_classes, spec.block):
            block = read_block(inputs, rows, label, start, num_classes, spec)
            e = exp_of_block(coefficients, block, spec)
            grad = grad_of_block(coefficients, block, e, label, start, spec)
            write_grad(inputs, outputs, grad, block, label, coefficients, rows, start, num_classes, spec)
    return coefficients.loss


@triton.jit
def denominator_of(row_tensors, spec):
    """What the sum of the losses is divided by."""
    if spec.mean:
        return tl.sum(tl.load(row_tensors.parts + tl.arange(0, PARTS)), 0)
    else:
        return 1.0


@triton.jit
def finish_loss(row_tensors, total, spec):
    """Leaves what this program's rows add to the loss; the last program to come adds all up, in a fixed order."""
    programs = tl.num_programs(0)
    parts = row_tensors.parts + PARTS
    tl.store(parts + tl.program_id(0), tl.sum(total, 0))
    tl.debug_barrier()
    if tl.atomic_add(row_tensors.finished, 1, sem="acq_rel") == programs - 1:
        sums = tl.zeros([PARTS_AT_ONCE], spec.dtype)
        for start in range(0, programs, PARTS_AT_ONCE):
            places = start + tl.arange(0, PARTS_AT_ONCE)
            # Written by other multiprocessors: not to be found in this one's cache.
            sums += tl.load(parts + places, mask=places < programs, other=0.0, cache_modifier=".cg")
        loss = tl.sum(sums, 0)
        if spec.mean:
            # Read again rather than held all the while.
            denominator = denominator_of(row_tensors, spec)
            # Torch's smoothed loss is 0 / 0 too where no kept row has weight.
            loss = tl.where(denominator == 0, float("nan"), loss / denominator)
        tl.store(row_tensors.loss, loss)


# Triton's launcher has an `options` of its own.
@triton.jit(do_not_specialize=["row_options"])
def row_kernel(inputs, outputs, saved, row_tensors, row_view, sizes, row_options, spec):
    """Each program takes one tile after another, and keeps column sums where rows are one block."""
    total = tl.zeros([spec.rows], spec.dtype)
    denominator = denominator_of(row_tensors, spec)
    weight_sum = tl.zeros([1], spec.dtype)
    if spec.chunks > 0 and spec.smooth_loss:
        weight_sum = sum_of_weights(inputs, sizes.class_units * spec.align, spec)
    scale_sum = tl.zeros([spec.rows, spec.block], spec.dtype)
    bias_sum = tl.zeros([spec.rows, spec.block], spec.dtype)
    for tile in range(tl.program_id(0), sizes.tiles, tl.num_programs(0)):
        if spec.chunks > 0:
            written = tile_in_registers(
                tile, inputs, outputs, saved, row_tensors, denominator, weight_sum, row_view, sizes, row_options, spec
            )  # fmt: skip
            total += written.loss
            if outputs.grad_scale is not None:
                scale_sum, bias_sum = add_columns(scale_sum, bias_sum, written.grad, written.x)
        else:
            total += tile_in_steps(
                tile, inputs, outputs, saved, row_tensors, denominator, row_view, sizes, row_options, spec
            )  # fmt: skip
    if outputs.grad_scale is not None:
        classes = tl.arange(0, spec.block)
        write_columns(outputs, scale_sum, bias_sum, tl.program_id(0), classes, sizes.class_units * spec.align)
    if spec.reduced:
        finish_loss(row_tensors, total, spec)


@triton.jit
def column_kernel(inputs, outputs, saved, row_view, sizes, spec):
    """Gradient and column sums of a block of classes over many tiles, from the coefficients of row_kernel."""
    num_classes = sizes.class_units * spec.align
    start = tl.program_id(1) * spec.block
    scale_sum = tl.zeros([spec.rows, spec.block], spec.dtype)
    bias_sum = tl.zeros([spec.rows, spec.block], spec.dtype)
    for tile in range(tl.program_id(0), sizes.tiles, tl.num_programs(0)):
        rows = rows_of_tile(tile, sizes, row_view, spec.rows, spec.flat)
        label = read_label(inputs, rows, num_classes, spec)
        coefficients = load_coefficients(saved, rows, sizes.rows)
        block = read_block(inputs, rows, label, start, num_classes, spec)
        grad = grad_of_block(coefficients, block, exp_of_block(coefficients, block, spec), label, start, spec)
        kept_grad = tl.where(coefficients.kept[:, None], grad, 0.0)
        scale_sum, bias_sum = add_columns(scale_sum, bias_sum, kept_grad, block.x)
        if outputs.grad_logits is not None:
            write_grad(inputs, outputs, grad, block, label, coefficients, rows, start, num_classes, spec)
    write_columns(outputs, scale_sum, bias_sum, tl.program_id(0), classes_of(start, spec), num_classes)


@triton.jit(debug=True)
def label_kernel(labels, parts, finished, class_weight, row_view, sizes, bounds, T: tl.constexpr, ROWS: tl.constexpr):
    """What rows add to the mean's denominator, in PARTS sums; a label out of range fails a device assertion."""
    total = tl.zeros([ROWS], T)
    for tile in range(tl.program_id(0), sizes.tiles, tl.num_programs(0)):
        rows = rows_of_tile(tile, sizes, row_view, ROWS, False)
        weight = rows.valid.to(T)
        if labels is not None:
            place = labels.pointer + rows.outer * labels.outer_step + rows.inner * labels.inner_step
            label = tl.load(place, mask=rows.valid, other=0)
            kept = rows.valid & (label != bounds.ignore_index)
            inside = kept & (label >= 0) & (label < bounds.num_classes)
            tl.device_assert(inside | (kept == 0), "target: a label is outside [0, number of classes)")
            weight = inside.to(T)
            if class_weight is not None:
                weight = tl.load(class_weight + label, mask=inside, other=0.0)
        total += weight
    if parts is not None:
        tl.store(parts + tl.program_id(0), tl.sum(total, 0))
    if finished is not None:
        if tl.program_id(0) == 0:
            tl.store(finished, 0)


@triton.jit
def scale_kernel(gradient, factor, count, T: tl.constexpr, BLOCK: tl.constexpr):
    scale = tl.load(factor).to(T)
    if scale != 1.0:
        for block in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
            # In 64 bits; the interpreter counts in Python's integers.
            place = (tl.program_id(0).to(tl.int64) * 0 + block) * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(gradient + place, mask=place < count, other=0.0).to(T) * scale
            tl.store(gradient + place, value.to(gradient.dtype.element_ty), mask=place < count)
