"""What the softmax kernels do with a block of logits: read it, add it to its rows' sums, write its slope."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Inputs(NamedTuple):
    """z = scale * x + bias and the target, with their steps; a missing tensor is None and costs nothing.

    Flat, like every tuple that a kernel gets: Triton 3.6 forgets the constants of nested ones inside loops.
    """

    logits: Any
    outer_step: Any
    inner_step: Any
    class_step: Any
    probabilities: Any  # None with labels
    soft_outer_step: Any
    soft_inner_step: Any
    soft_class_step: Any
    labels: Any  # None with probabilities
    label_outer_step: Any
    label_inner_step: Any
    scale: Any
    bias: Any
    class_weight: Any


class Outputs(NamedTuple):
    """Where the slopes go: the gradient with its steps, and per-program column sums for scale and bias."""

    gradient: Any
    outer_step: Any
    inner_step: Any
    class_step: Any
    scale: Any
    bias: Any


class Rows(NamedTuple):
    """The rows of a tile: where they lie, and their place in tensors of one value per row."""

    outer: Any
    inner: Any
    index: Any
    valid: Any


class Label(NamedTuple):
    """The rows' labels (-1 where there is none), their logits and weights; which rows count or are bad."""

    index: Any
    logit: Any
    weight: Any
    kept: Any
    bad: Any


class Block(NamedTuple):
    """One tile: x, z (-inf beyond the last class), class weights w, and w * q (w with labels)."""

    x: Any
    z: Any
    weight: Any
    soft: Any


class RowSums(NamedTuple):
    """What a pass over the classes leaves; shift is top, or 0 where top is -inf."""

    top: Any  # max_j z_j
    rest: Any  # sum of exp(z_j - shift), without the label
    weight: Any  # sum of w_j
    uniform: Any  # sum of w_j (shift - z_j)
    soft_weight: Any  # sum of w_j q_j
    soft: Any  # sum of w_j q_j (shift - z_j)
    first_top: Any  # first j with z_j = top
    first_nan: Any


class Slopes(NamedTuple):
    """dL/dz_j = softmax * exp(z_j - shift) - uniform * w_j - at_target * w_j q_j; zero where not kept.

    With labels the slope at the label is `at_target`, and elsewhere it has no part in it.
    """

    shift: Any
    softmax: Any
    uniform: Any
    at_target: Any
    kept: Any


NO_CLASS = tl.constexpr(2147483647)


@triton.jit
def rows_of_tile(tile, inner_tiles, inner_count, row_view, ROWS: tl.constexpr):
    outer = (tile // inner_tiles).to(tl.int64)
    inner = (tile % inner_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = outer * row_view.outer_step + inner * row_view.inner_step
    return Rows(outer, inner, index, inner < inner_count)


@triton.jit
def addresses(pointer, outer_step, inner_step, class_step, rows, classes, ALIGN: tl.constexpr):
    offsets = (rows.outer * outer_step + rows.inner * inner_step) * ALIGN
    return pointer + offsets[:, None] + (classes.to(tl.int64) * class_step)[None, :]


@triton.jit
def shift_of(top):
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def affine(x, scale, bias, classes, mask):
    # One rounding: the label's logit, read on its own, must equal the one in its block to the last bit.
    z = x
    if scale is not None:
        a = tl.load(scale + classes, mask=mask, other=1.0)
        if bias is not None:
            b = tl.load(bias + classes, mask=mask, other=0.0)
            z = tl.fma(x, tl.broadcast_to(a, x.shape), tl.broadcast_to(b, x.shape))
        else:
            z = x * a
    else:
        if bias is not None:
            z = x + tl.load(bias + classes, mask=mask, other=0.0)
    return z


@triton.jit
def read_block(inputs, rows, classes, num_classes, T: tl.constexpr, ALIGN: tl.constexpr):
    inside = (classes < num_classes)[None, :]
    mask = rows.valid[:, None] & inside
    place = addresses(inputs.logits, inputs.outer_step, inputs.inner_step, inputs.class_step, rows, classes, ALIGN)
    x = tl.load(place, mask=mask, other=0.0).to(T)
    z = tl.where(inside, affine(x, inputs.scale, inputs.bias, classes[None, :], inside), float("-inf"))
    weight = inside.to(T)
    if inputs.class_weight is not None:
        weight = tl.load(inputs.class_weight + classes[None, :], mask=inside, other=0.0)
    soft = weight
    if inputs.probabilities is not None:
        place = addresses(inputs.probabilities, inputs.soft_outer_step, inputs.soft_inner_step,
                          inputs.soft_class_step, rows, classes, ALIGN)  # fmt: skip
        soft = tl.load(place, mask=mask, other=0.0).to(T) * weight
    return Block(x, z, weight, soft)


@triton.jit
def read_label(inputs, rows, num_classes, ignore_index, T: tl.constexpr, ALIGN: tl.constexpr):
    if inputs.labels is None:
        none = tl.zeros(rows.valid.shape, T)
        return Label(none.to(tl.int32) - 1, none, none, rows.valid, none != 0)
    else:
        place = inputs.labels + rows.outer * inputs.label_outer_step + rows.inner * inputs.label_inner_step
        label = tl.load(place, mask=rows.valid, other=0)
        kept = rows.valid & (label != ignore_index)
        # In 64 bits 2^32 is out of range, not class 0. A row with such a label gets NaN and reads nothing.
        inside = kept & (label >= 0) & (label < num_classes)
        offsets = (rows.outer * inputs.outer_step + rows.inner * inputs.inner_step) * ALIGN
        x = tl.load(inputs.logits + offsets + label * inputs.class_step, mask=inside, other=0.0).to(T)
        logit = affine(x, inputs.scale, inputs.bias, label, inside)
        weight = inside.to(T)
        if inputs.class_weight is not None:
            weight = tl.load(inputs.class_weight + label, mask=inside, other=0.0)
        index = tl.where(inside, label, -1).to(tl.int32)
        return Label(index, logit, weight, kept, kept & (inside == 0))


@triton.jit
def no_sums(rows, T: tl.constexpr):
    # A 0 that the compiler can't see: Triton 3.6 fails on loops that add reductions to constants.
    first = (rows.inner < 0).to(tl.int32)
    zero = first.to(T)
    return RowSums(zero - float("inf"), zero, zero, zero, zero, zero, first, first + NO_CLASS)


@triton.jit
def differences(weight, z, shift):
    # A weight of 0 counts 0 even where z is -inf.
    return tl.where(weight == 0, 0.0, weight * (shift[:, None] - z))


@triton.jit
def add_block(sums, block, label, classes, SOFT: tl.constexpr, UNIFORM: tl.constexpr, PREDICTION: tl.constexpr):
    """The sums of a row after one more block of its classes, all about the new maximum."""
    block_top = tl.max(block.z, 1)
    top = tl.maximum(sums.top, block_top)
    shift = shift_of(top)
    moved = shift - shift_of(sums.top)
    e = tl.exp(block.z - shift[:, None])
    if not SOFT:
        e = tl.where(classes[None, :] == label.index[:, None], 0.0, e)
    rest = sums.rest * tl.exp(sums.top - shift) + tl.sum(e, 1)
    weight, uniform, soft_weight, soft = sums.weight, sums.uniform, sums.soft_weight, sums.soft
    if UNIFORM:
        uniform = uniform + moved * weight + tl.sum(differences(block.weight, block.z, shift), 1)
        weight = weight + tl.sum(block.weight, 1)
    if SOFT:
        soft = soft + moved * soft_weight + tl.sum(differences(block.soft, block.z, shift), 1)
        soft_weight = soft_weight + tl.sum(block.soft, 1)
    first_top, first_nan = sums.first_top, sums.first_nan
    if PREDICTION:
        at_top = tl.min(tl.where(block.z == block_top[:, None], classes[None, :], NO_CLASS), 1)
        first_top = tl.where(block_top > sums.top, at_top, first_top)
        at_nan = tl.min(tl.where(block.z != block.z, classes[None, :], NO_CLASS), 1)
        first_nan = tl.minimum(first_nan, at_nan)
    return RowSums(top, rest, weight, uniform, soft_weight, soft, first_top, first_nan)


@triton.jit
def slope_of_block(slopes, block, label, classes, SOFT: tl.constexpr, UNIFORM: tl.constexpr):
    slope = tl.exp(block.z - slopes.shift[:, None]) * slopes.softmax[:, None]
    if UNIFORM:
        slope -= block.weight * slopes.uniform[:, None]
    if SOFT:
        slope -= block.soft * slopes.at_target[:, None]
    else:
        slope = tl.where(classes[None, :] == label.index[:, None], slopes.at_target[:, None], slope)
    return tl.where(slopes.kept[:, None], slope, 0.0)


@triton.jit
def write_gradient(outputs, slope, scale, rows, classes, num_classes, ALIGN: tl.constexpr):
    inside = (classes < num_classes)[None, :]
    if scale is not None:
        slope = slope * tl.load(scale + classes[None, :], mask=inside, other=0.0)
    place = addresses(
        outputs.gradient, outputs.outer_step, outputs.inner_step, outputs.class_step, rows, classes, ALIGN
    )
    tl.store(place, slope.to(outputs.gradient.dtype.element_ty), mask=rows.valid[:, None] & inside)


@triton.jit
def add_columns(scale_sum, bias_sum, slope, x):
    # A slope of 0 adds 0 even where x is -inf.
    return scale_sum + tl.where(slope == 0, 0.0, slope * x), bias_sum + slope
