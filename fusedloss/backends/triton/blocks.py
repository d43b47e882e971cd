"""What the softmax kernels read: the tensors of a call, the rows of a tile, their labels, and blocks of classes."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl


class Inputs(NamedTuple):
    """LogitInputs as kernels read them, with strides; a missing tensor is None and costs nothing.

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
    target_override: Any  # one value per row, in place of z at the label
    target_override_grad: Any  # d target_override / dx of the label
    soft_cap: Any  # see ``number``
    ignore_index: Any


class Spec(NamedTuple):
    """What a softmax kernel is compiled for: its functions, and constants."""

    row: Any  # turns a row's sums into GradCoefficients, and stores what else it computes; see ``softmax_rows``
    top: Any  # finds the maximum of the hinge; None without a hinge
    soft: Any  # whether targets are probabilities
    override: Any  # whether there is a target_override
    sums: Any  # whether the row function reads sums over the classes
    smooth_loss: Any
    prediction: Any
    dtype: Any  # what is computed in
    reduced: Any  # whether the losses of all rows are added up
    mean: Any  # whether that sum is divided by the sum of the rows' weights
    rows: Any  # of a tile
    block: Any  # classes of a tile
    chunks: Any  # blocks of a row that are held in registers; 0: rows are read block by block, twice
    wide: Any  # whether registers hold what is computed with, and not what is stored
    align: Any  # see ``layout``
    flat: Any  # whether all rows are one run, so that no division finds a tile's place


@functools.lru_cache(1024)
def spec_of(*, dtype: tl.dtype, rows: int, row: Any = None, top: Any = None, **constants: int) -> Spec:
    """The Spec, with False for what isn't given: Triton takes functions of a tuple and what is marked as constants."""
    given = {"dtype": dtype, "rows": rows, **constants}
    return Spec(row, top, *(tl.constexpr(given.get(name, False)) for name in Spec._fields[2:]))


class Rows(NamedTuple):
    """The rows of a tile: where they lie, and their place in tensors of one value per row."""

    outer: Any
    inner: Any
    index: Any
    valid: Any


class Label(NamedTuple):
    """The rows' labels (-1 where there is none), their logits and weights; which rows are kept or have a bad label.

    With a target_override, that is `logit`, `override_grad` its derivative in x, and z itself is `plain`.
    No field is None where there is none: Triton 3.6 returns no None.
    """

    index: Any
    logit: Any
    weight: Any
    kept: Any
    bad: Any
    plain: Any
    override_grad: Any


class Weights(NamedTuple):
    """Class weights w of a block, and w * q (w with labels)."""

    weight: Any
    soft: Any


class Block(NamedTuple):
    """One tile: c(x), z (-inf beyond the last class), class weights w, and w * q (w with labels)."""

    x: Any
    z: Any
    weight: Any
    soft: Any


@triton.jit
def number(bits, T: tl.constexpr):
    """A number that was passed as the bits of a float64 (``launch.float64_bits``), or 0 for None, as (1,) values."""
    if bits is None:
        return tl.zeros([1], T)
    else:
        return tl.full([1], bits.to(tl.float64, bitcast=True), T)


@triton.jit
def rows_of_tile(tile, sizes, row_view, ROWS: tl.constexpr, FLAT: tl.constexpr):
    # The interpreter counts in Python's integers.
    tile = tl.program_id(0) * 0 + tile
    if FLAT:
        outer = tile.to(tl.int64) * 0
        inner = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    else:
        outer = (tile // sizes.inner_tiles).to(tl.int64)
        inner = (tile % sizes.inner_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = outer * row_view.outer_step + inner * row_view.inner_step
    if ROWS == 1:
        # No tile lies behind the last row: loads need no mask for it.
        return Rows(outer, inner, index, tl.full([1], True, tl.int1))
    else:
        return Rows(outer, inner, index, inner < sizes.inner)


@triton.jit
def addresses(pointer, outer_step, inner_step, class_step, rows, classes, ALIGN: tl.constexpr):
    offsets = (rows.outer * outer_step + rows.inner * inner_step) * ALIGN
    return pointer + offsets[:, None] + (classes.to(tl.int64) * class_step)[None, :]


@triton.jit
def tanh(x, T: tl.constexpr):
    if T == tl.float64:
        e = tl.exp(-2.0 * tl.abs(x))
        # 1 - e from e and its own logarithm: the rounding of e cancels.
        difference = 1.0 - e
        inner = (difference > 0) & (e > 0)
        grown = tl.where(inner, difference * (-2.0 * tl.abs(x)) / tl.log(tl.where(inner, e, 0.5)), difference)
        size = tl.where(difference == 0, tl.abs(x), grown / (2.0 - grown))
        return tl.where(x < 0, -size, size)
    else:
        # 2^(-2.88 x) = exp(-2 x), and the reciprocal of 1 + e by its square, of which no range has to be cared for.
        e = tl.exp2(tl.minimum(x * -2.885390081777927, 60.0))
        size = (1.0 - e) * tl.rsqrt((1.0 + e) * (1.0 + e))
        # Nearer to 0 the difference from 1 has lost digits; a polynomial has them to 1.2 units in the last place.
        square = x * x
        p = tl.fma(square, -0.04914847, 0.13299824)
        p = tl.fma(square, p, -0.33332664)
        # NaN is not large.
        return tl.where(tl.abs(x) >= 0.35, size, tl.fma(x * square, p, x))


@triton.jit
def tanh_cap(x, soft_cap, T: tl.constexpr):
    """c(x) = soft_cap * tanh(x / soft_cap)."""
    cap = number(soft_cap, T)
    return cap * tanh(x * (1.0 / cap), T)


@triton.jit
def load_some(place, mask, other, WHOLE: tl.constexpr, PASS: tl.constexpr = 0):
    """WHOLE: all of it, without a mask. Loads of one PASS over a row may share what they load, others not."""
    # Held from one pass to the next, values of classes would take all registers. Near loads of the same are hits.
    modifier: tl.constexpr = ".ca" if PASS == 1 else ""
    eviction: tl.constexpr = "evict_last" if PASS > 1 else ""
    if WHOLE:
        return tl.load(place, cache_modifier=modifier, eviction_policy=eviction)
    else:
        return tl.load(place, mask=mask, other=other, cache_modifier=modifier, eviction_policy=eviction)


@triton.jit
def affine(x, scale, bias, places, mask, WHOLE: tl.constexpr, PASS: tl.constexpr = 0):
    """scale x + bias, of the classes at these places."""
    # One rounding: the label's logit, read on its own, must equal the one in its block to the last bit.
    z = x
    if scale is not None:
        a = load_some(scale + places, mask, 1.0, WHOLE, PASS)
        if bias is not None:
            b = load_some(bias + places, mask, 0.0, WHOLE, PASS)
            z = tl.fma(x, tl.broadcast_to(a, x.shape), tl.broadcast_to(b, x.shape))
        else:
            z = x * a
    else:
        if bias is not None:
            z = x + load_some(bias + places, mask, 0.0, WHOLE, PASS)
    return z


@triton.jit
def classes_of(start, spec):
    """The classes of the block that begins at class `start`."""
    return start + tl.arange(0, spec.block)


@triton.jit
def class_places(start, spec):
    """Where the values of a block's classes lie, (1, block); by rows too where a row is held in registers."""
    classes = classes_of(start, spec)
    if spec.chunks > 0:
        # In the layout of the logits: values of classes need no exchange between threads.
        return tl.broadcast_to(classes[None, :], [spec.rows, spec.block])
    else:
        return classes[None, :]


@triton.jit
def is_class(index, start, spec):
    """Where a block has the rows' classes `index`."""
    if spec.chunks > 0:
        # `start` is known: one difference serves all blocks, where each would have its own numbers of classes.
        return index[:, None] - tl.arange(0, spec.block)[None, :] == start
    else:
        return index[:, None] == classes_of(start, spec)[None, :]


@triton.jit
def is_label(start, label, spec):
    return is_class(label.index, start, spec)


@triton.jit
def load_rows(place, rows, start, num_classes, spec, WHOLE: tl.constexpr):
    """What is stored at a block of a tile, 0 beyond its rows and classes."""
    if WHOLE:
        return tl.load(place, mask=rows.valid[:, None], other=0.0)
    else:
        inside = classes_of(start, spec) < num_classes
        return tl.load(place, mask=rows.valid[:, None] & inside[None, :], other=0.0)


@triton.jit
def load_logits(inputs, rows, start, num_classes, spec, WHOLE: tl.constexpr):
    classes = classes_of(start, spec)
    place = addresses(inputs.logits, inputs.outer_step, inputs.inner_step, inputs.class_step, rows, classes, spec.align)
    return load_rows(place, rows, start, num_classes, spec, WHOLE)


@triton.jit
def load_probabilities(inputs, rows, start, num_classes, spec, WHOLE: tl.constexpr):
    classes = classes_of(start, spec)
    place = addresses(inputs.probabilities, inputs.soft_outer_step, inputs.soft_inner_step,
                      inputs.soft_class_step, rows, classes, spec.align)  # fmt: skip
    return load_rows(place, rows, start, num_classes, spec, WHOLE)


@triton.jit
def class_weights(inputs, probabilities, start, num_classes, spec, WHOLE: tl.constexpr, PASS: tl.constexpr = 0):
    places = class_places(start, spec)
    inside = places < num_classes
    weight = inside.to(spec.dtype)
    if inputs.class_weight is not None:
        weight = load_some(inputs.class_weight + places, inside, 0.0, WHOLE, PASS)
    soft = weight
    if spec.soft:
        soft = probabilities.to(spec.dtype) * weight
    return Weights(weight, soft)


@triton.jit
def block_of(
    logits, probabilities, inputs, label, start, num_classes, spec, WHOLE: tl.constexpr, PASS: tl.constexpr = 0
):  # fmt: skip
    """The block of stored values; WHOLE says that all its classes exist, and only spec.soft reads probabilities."""
    x = logits.to(spec.dtype)
    if inputs.soft_cap is not None:
        x = tanh_cap(x, inputs.soft_cap, spec.dtype)
    places = class_places(start, spec)
    inside = places < num_classes
    z = affine(x, inputs.scale, inputs.bias, places, inside, WHOLE, PASS)
    if not WHOLE:
        z = tl.where(inside, z, float("-inf"))
    if inputs.target_override is not None:
        z = tl.where(is_label(start, label, spec), label.logit[:, None], z)
    weights = class_weights(inputs, probabilities, start, num_classes, spec, WHOLE, PASS)
    return Block(x, z, weights.weight, weights.soft)


@triton.jit
def read_block(inputs, rows, label, start, num_classes, spec):
    """A block that may be the last of its rows."""
    logits = load_logits(inputs, rows, start, num_classes, spec, False)
    probabilities = logits
    if spec.soft:
        probabilities = load_probabilities(inputs, rows, start, num_classes, spec, False)
    return block_of(logits, probabilities, inputs, label, start, num_classes, spec, False)


@triton.jit
def read_label(inputs, rows, num_classes, spec):
    if inputs.labels is None:
        none = tl.zeros(rows.valid.shape, spec.dtype)
        return Label(none.to(tl.int32) - 1, none, none, rows.valid, none != 0, none, none)
    else:
        place = inputs.labels + rows.outer * inputs.label_outer_step + rows.inner * inputs.label_inner_step
        label = tl.load(place, mask=rows.valid, other=0)
        kept = rows.valid & (label != inputs.ignore_index)
        # In 64 bits 2^32 is out of range, not class 0. A row with such a label gets NaN and reads nothing.
        inside = kept & (label >= 0) & (label < num_classes)
        offsets = (rows.outer * inputs.outer_step + rows.inner * inputs.inner_step) * spec.align
        x = tl.load(inputs.logits + offsets + label * inputs.class_step, mask=inside, other=0.0).to(spec.dtype)
        if inputs.soft_cap is not None:
            x = tanh_cap(x, inputs.soft_cap, spec.dtype)
        logit = affine(x, inputs.scale, inputs.bias, label, inside, False)
        weight = inside.to(spec.dtype)
        if inputs.class_weight is not None:
            weight = tl.load(inputs.class_weight + label, mask=inside, other=0.0)
        plain = logit
        if inputs.target_override is not None:
            # A row without a label has no class apart from the others.
            plain = tl.where(inside, logit, float("-inf"))
            logit = tl.load(inputs.target_override + rows.index, mask=inside, other=float("-inf"))
        override_grad = logit
        if inputs.target_override_grad is not None:
            override_grad = tl.load(inputs.target_override_grad + rows.index, mask=inside, other=0.0)
        index = tl.where(inside, label, -1).to(tl.int32)
        return Label(index, logit, weight, kept, kept & (inside == 0), plain, override_grad)
