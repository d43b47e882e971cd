"""The kernels of supervised contrast, and what they read.

A similarity z is <x_i, x_j> / T, of 16-bit rows in units of log 2. A column that is nobody's contrast has z = -inf; the
pairs of a row with itself are left out in the tiles on the diagonal, which are the only ones that look for them.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from fusedloss.backends.reference.supcon import IGNORED
from fusedloss.core.dtypes import compute_dtype

from .launch import triton_dtype

_IGNORED = tl.constexpr(IGNORED)
_NO_CODE = tl.constexpr(-3)  # no column has it
_LOG2_E = tl.constexpr(math.log2(math.e))
# Over a range of 2 / T = 40, exp(s - 1 / T) and its reciprocal times a gradient of any loss are ordinary numbers.
_LEAST_T = tl.constexpr(1 / 20)


class Rows(NamedTuple):
    """Features (row, column) at features + row * width + column, and who is whose positive; None costs nothing."""

    features: Any
    count: Any  # M
    width: Any  # D
    inverse: Any  # float32 (M,), of 16-bit rows: what makes a product of them that of their directions
    codes: Any  # int32 (M,), with labels
    mask: Any  # uint8 (B, B), in place of codes
    samples: Any  # B, with a mask
    weights: Any  # (3, M), or None
    temperature: Any  # ()
    anchors: Any  # A


class Sums(NamedTuple):
    """What the first kernel writes, (A,) each; per_positive is read."""

    loss: Any
    shift: Any
    sum: Any
    per_positive: Any


class Coefficients(NamedTuple):
    """What the second kernel multiplies exp(z - shift) and the mean over positives by, (M,) each."""

    shift: Any
    softmax: Any
    positive: Any
    moment: Any  # (A,): sum of gradient * (z - shift) over the anchor's own contrasts, or None


class Spec(NamedTuple):
    """What a kernel is compiled for."""

    dtype: Any  # of sums
    dot: Any  # of what is multiplied
    slope: Any  # what gradients of similarities are rounded to before they are
    precision: Any
    log2: Any  # whether similarities are in units of log 2
    common: Any  # whether all shifts may be one, as 1 / T says
    same: Any  # whether <x_i, x_j> and <x_j, x_i> may stand for each other
    whole: Any  # whether a step is all features, so that the rows of a program stay where they are
    rows: Any
    columns: Any
    step: Any
    block: Any


@functools.lru_cache(256)
def spec_of(*, dtype: torch.dtype, **constants: Any) -> Spec:
    """The Spec for features of `dtype`."""
    sums = triton_dtype(compute_dtype(dtype))
    narrow = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtype, sums)
    # The interpreter's NumPy multiplies no bfloat16.
    dot = tl.float32 if isinstance(sums_kernel, InterpretedFunction) and narrow is not sums else narrow
    given = {"dtype": sums, "dot": dot, "slope": narrow, **constants}
    return Spec(*(tl.constexpr(given[name]) for name in Spec._fields))


class Side(NamedTuple):
    """Rows or columns of a tile: row start + lane. Weights are 1 where there are none: Triton 3.6 returns no None."""

    start: Any
    lane: Any
    code: Any
    bias: Any  # -inf for what is no contrast, else 0
    inverse: Any
    negative: Any
    as_positive: Any
    share: Any


@triton.jit
def side_of(rows, start, SIZE: tl.constexpr, spec):
    lane = tl.arange(0, SIZE)
    # Addresses are a scalar and a lane, which costs less than an index for each.
    inside = lane < rows.count - start
    if rows.mask is None:
        code = tl.load(rows.codes + start + lane, mask=inside, other=_IGNORED)
        bias = tl.where(code == _IGNORED, float("-inf"), 0.0).to(spec.dtype)
    else:
        code = lane
        bias = tl.where(inside, 0.0, float("-inf")).to(spec.dtype)
    one = inside.to(spec.dtype)
    inverse, negative, as_positive, share = one, one, one, one
    if rows.inverse is not None:
        inverse = tl.load(rows.inverse + start + lane, mask=inside, other=0.0)
    if rows.weights is not None:
        negative = tl.load(rows.weights + start + lane, mask=inside, other=0.0)
        as_positive = tl.load(rows.weights + rows.count + start + lane, mask=inside, other=0.0)
        share = tl.load(rows.weights + 2 * rows.count + start + lane, mask=inside, other=0.0)
    return Side(start, lane, code, bias, inverse, negative, as_positive, share)


@triton.jit
def read_rows(rows, start, dims, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    place = rows.features + tl.cast(start, tl.int64) * rows.width
    inside = (lane < rows.count - start)[:, None] & (dims < rows.width)[None, :]
    return tl.load(place + lane[:, None] * rows.width + dims[None, :], mask=inside, other=0.0)


@triton.jit
def products(rows, left, right, ROWS: tl.constexpr, COLUMNS: tl.constexpr, spec):
    """<x_i, x_j> of the rows from left and from right on, summed over the features in the same order for every tile."""
    total = tl.zeros([ROWS, COLUMNS], spec.dtype)
    for start in range(0, rows.width, spec.step):
        dims = start + tl.arange(0, spec.step)
        a = read_rows(rows, left, dims, ROWS).to(spec.dot)
        b = read_rows(rows, right, dims, COLUMNS).to(spec.dot)
        total = tl.dot(a, tl.trans(b), total, input_precision=spec.precision, out_dtype=spec.dtype)
    return total


@triton.jit
def similarities(product, row, column, temperature, rows, MASKED: tl.constexpr, spec):
    """z of a tile; with MASKED -inf in columns that are no contrasts."""
    if rows.inverse is not None:
        z = product * column.inverse[None, :] * (row.inverse * (_LOG2_E / temperature))[:, None]
    else:
        z = product / temperature
    if MASKED:
        z = z + column.bias[None, :]
    return z


@triton.jit
def exponential(z, spec):
    if spec.log2:
        return tl.exp2(z)
    else:
        return tl.exp(z)


@triton.jit
def positives(rows, row, column):
    """Whether column j is a positive of row i, on the diagonal too."""
    if rows.mask is not None:
        i, j = row.start + row.lane, column.start + column.lane
        known = (i < rows.anchors)[:, None] & (j < rows.count)[None, :]
        place = (i % rows.samples).to(tl.int64)[:, None] * rows.samples + (j % rows.samples)[None, :]
        return tl.load(rows.mask + place, mask=known, other=0) != 0
    else:
        return tl.where(row.code >= 0, row.code, _NO_CODE)[:, None] == column.code[None, :]


@triton.jit
def same_row(row, column):
    return (row.lane + (row.start - column.start))[:, None] == column.lane[None, :]


@triton.jit
def weight_of(column, positive):
    """Weight of each column in the sums of exp of rows that it is or isn't a positive of."""
    return tl.where(positive, column.as_positive[None, :], column.negative[None, :])


@triton.jit
def share_of(column):
    return column.share


@triton.jit
def shift_of(top):
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def add_tile(top, total, reference, of_positives, first_tile, on_diagonal, z, row, column, rows, spec):
    """Largest z, sum of exp(z - shift), and sum over the positives of z - reference, with those of one more tile."""
    candidates = z
    if on_diagonal:
        candidates = tl.where(same_row(row, column), float("-inf"), z)
    if rows.weights is not None:
        weight = weight_of(column, positives(rows, row, column))
        candidates = tl.where(weight > 0, candidates, float("-inf"))
    before, top = shift_of(top), tl.maximum(top, tl.max(candidates, 1))
    shift = shift_of(top)
    e = exponential(candidates - shift[:, None], spec)
    if rows.weights is not None:
        e = e * weight
    total = total * exponential(before - shift, spec) + tl.sum(e, 1)
    reference = tl.where(first_tile, shift, reference)
    relative = z - reference[:, None]
    if rows.weights is not None:
        relative = relative * share_of(column)[None, :]
    if on_diagonal:
        relative = tl.where(same_row(row, column), 0.0, relative)
    of_positives += tl.sum(tl.where(positives(rows, row, column), relative, 0.0), 1)
    return top, total, reference, of_positives


@triton.jit
def sums_kernel(rows, sums, spec):
    """Loss, largest similarity and sum of exp of some anchors.

    The mean over positives is taken of what they are beyond a reference, so that sums of many keep their digits.
    """
    first = tl.program_id(0) * spec.rows
    left = first + tl.arange(0, spec.rows)
    row = side_of(rows, first, spec.rows, spec)
    temperature = tl.load(rows.temperature)
    # A 0 that the compiler can't see: Triton 3.6 fails on loops that add reductions to constants.
    zero = (left < 0).to(spec.dtype)
    top, total, reference, of_positives = zero - float("inf"), zero, zero, zero
    if spec.whole:
        dims = tl.arange(0, spec.step)
        kept = read_rows(rows, first, dims, spec.rows).to(spec.dot)
    for start in range(0, rows.count, spec.columns):
        column = side_of(rows, start, spec.columns, spec)
        if spec.whole:
            x = read_rows(rows, start, dims, spec.columns).to(spec.dot)
            product = tl.dot(kept, tl.trans(x), out_dtype=spec.dtype)
        else:
            product = products(rows, first, start, spec.rows, spec.columns, spec)
        z = similarities(product, row, column, temperature, rows, True, spec)
        on_diagonal = (start < first + spec.rows) & (start + spec.columns > first)
        top, total, reference, of_positives = add_tile(
            top, total, reference, of_positives, start == 0, on_diagonal, z, row, column, rows, spec
        )
    inside = left < rows.anchors
    per_positive = tl.load(sums.per_positive + left, mask=inside, other=0.0)
    shift = shift_of(top)
    mean = of_positives * per_positive + (reference - shift)
    unit = 1.0
    if spec.log2:
        unit = 1 / _LOG2_E
    loss = tl.where(per_positive > 0, tl.log(total) - mean * unit, 0.0)
    tl.store(sums.loss + left, loss, mask=inside)
    tl.store(sums.shift + left, shift * unit, mask=inside)
    tl.store(sums.sum + left, total, mask=inside)


@triton.jit
def scale_kernel(rows, norms, codes, scaled, inverse, count, width, padded, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """scaled (count, padded) is the rows times a power of two that makes them 1 to 2 long, so that products of rows of
    any length are ordinary numbers, with zeros beyond `width`; inverse (count,) is 1 / length, 0 for ignored rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < count
    norm = tl.load(norms + row, mask=valid, other=1.0)
    exponent = (norm.to(tl.int64, bitcast=True) >> 52) & 0x7FF
    # Neither an infinite length, of zeros, nor NaN scales a row.
    scale = (tl.where(exponent == 0x7FF, 1023, 2046 - exponent) << 52).to(tl.float64, bitcast=True)
    kept = tl.load(codes + row, mask=valid, other=_IGNORED) != _IGNORED
    tl.store(inverse + row, tl.where(kept, 1.0 / (norm * scale), 0.0).to(tl.float32), mask=valid)
    for first in range(0, padded, BLOCK):
        dims = first + tl.arange(0, BLOCK)
        x = tl.load(rows + row[:, None] * width + dims[None, :],
                    mask=valid[:, None] & (dims < width)[None, :], other=0.0)  # fmt: skip
        moved = (x.to(tl.float64) * scale[:, None]).to(tl.float32).to(x.dtype)
        tl.store(scaled + row[:, None] * padded + dims[None, :], moved,
                 mask=valid[:, None] & (dims < padded)[None, :])  # fmt: skip


@triton.jit
def coefficient_kernel(shift, total, grad_loss, per_positive, temperature, anchors, count, made,
                       COMMON: tl.constexpr, LOG2: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """made (3, count): see Coefficients; 0 for rows that are no anchors or have no positive.

    With COMMON one shift serves all anchors where 1 / T allows: then both directions of a pair share exp(z - shift).
    """
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = index < anchors
    t = tl.load(temperature)
    own = tl.load(shift + index, mask=inside, other=0.0)
    share = tl.load(per_positive + index, mask=inside, other=0.0)
    upstream = tl.load(grad_loss + index, mask=inside & (share > 0), other=0.0) / t
    softmax = tl.where(upstream == 0, 0.0, upstream / tl.load(total + index, mask=inside, other=1.0))
    if COMMON:
        softmax = tl.where(t >= _LEAST_T, softmax * tl.exp(1 / t - own), softmax)
        own = tl.where(t >= _LEAST_T, 1 / t, own)
    if LOG2:
        own = own * _LOG2_E
    tl.store(made + index, own, mask=index < count)
    tl.store(made + count + index, softmax, mask=index < count)
    tl.store(made + 2 * count + index, upstream * share, mask=index < count)


class Slopes(NamedTuple):
    """Coefficients of rows or columns of a tile; a common shift serves all of them."""

    softmax: Any
    positive: Any


@triton.jit
def slopes_of(coefficients, start, lane, count):
    inside = lane < count - start
    return Slopes(
        tl.load(coefficients.softmax + start + lane, mask=inside, other=0.0),
        tl.load(coefficients.positive + start + lane, mask=inside, other=0.0),
    )


@triton.jit
def shift_of_columns(coefficients, column, rows):
    inside = column.lane < rows.count - column.start
    return tl.load(coefficients.shift + column.start + column.lane, mask=inside, other=0.0)[None, :]


@triton.jit
def similarity_grads(e, of_back, relative, on_diagonal, row, column, forth, other, rows, MOMENT: tl.constexpr):
    """dL/dz in units of 1 / T of a tile's pairs, both directions together; with MOMENT each row's moment of its own.

    `e` and `of_back` are exp(z - shift) of either direction, `relative` is z - shift.
    """
    positive = positives(rows, row, column)
    also = positive
    if rows.mask is not None:
        also = tl.trans(positives(rows, column, row))
    moment = forth.softmax * 0.0
    if (rows.weights is None) and (rows.mask is None) and (not MOMENT):
        grad = e * forth.softmax[:, None] + of_back * other.softmax[None, :]
        grad = grad - tl.where(positive, forth.positive[:, None] + other.positive[None, :], 0.0)
    else:
        e, of_back = e * forth.softmax[:, None], of_back * other.softmax[None, :]
        of_positive = tl.broadcast_to(forth.positive[:, None], e.shape)
        of_also = tl.broadcast_to(other.positive[None, :], e.shape)
        if rows.weights is not None:
            e = e * weight_of(column, positive)
            of_back = of_back * tl.where(also, row.as_positive[:, None], row.negative[:, None])
            of_positive, of_also = of_positive * share_of(column)[None, :], of_also * share_of(row)[:, None]
        e = e - tl.where(positive, of_positive, 0.0)
        grad = e + of_back - tl.where(also, of_also, 0.0)
        if MOMENT:
            if on_diagonal:
                e = tl.where(same_row(row, column), 0.0, e)
            # An anchor's gradients add up to 0, so that any reference will do: one near the values keeps the digits.
            moment = tl.sum(tl.where(e == 0, 0.0, e * relative), 1)
    if on_diagonal:
        grad = tl.where(same_row(row, column), 0.0, grad)
    return grad, moment


@triton.jit
def row_gradients(rows, coefficients, first, temperature, COMMON: tl.constexpr, spec):
    """The gradients of some rows in some features, and their moments; COMMON says that all shifts are one."""
    dims = tl.program_id(1) * spec.block + tl.arange(0, spec.block)
    row = side_of(rows, first, spec.rows, spec)
    forth = slopes_of(coefficients, first, row.lane, rows.count)
    shift = tl.load(coefficients.shift + first + row.lane, mask=row.lane < rows.count - first, other=0.0)
    total = tl.zeros([spec.rows, spec.block], spec.dtype)
    moment = (row.lane < 0).to(spec.dtype)
    MOMENT: tl.constexpr = coefficients.moment is not None
    # A column of 16-bit rows that is no contrast is multiplied by an inverse of 0.
    MASKED: tl.constexpr = MOMENT or rows.inverse is None
    if spec.whole:
        kept = read_rows(rows, first, dims, spec.rows).to(spec.dot)
    # Rows that are no anchors get their gradient from anchors alone.
    stop = tl.where(first < rows.anchors, rows.count, rows.anchors)
    for start in range(0, stop, spec.columns):
        column = side_of(rows, start, spec.columns, spec)
        other = slopes_of(coefficients, start, column.lane, rows.count)
        if spec.whole:
            x = read_rows(rows, start, dims, spec.columns).to(spec.dot)
            product = tl.dot(kept, tl.trans(x), out_dtype=spec.dtype)
        else:
            product = products(rows, first, start, spec.rows, spec.columns, spec)
        z = similarities(product, row, column, temperature, rows, MASKED, spec)
        relative = z - shift[:, None]
        if spec.same:
            e = exponential(relative, spec)
            of_back = e
            if not COMMON:
                of_back = exponential(z - shift_of_columns(coefficients, column, rows), spec)
        else:
            product = products(rows, start, first, spec.columns, spec.rows, spec)
            back = tl.trans(similarities(product, column, row, temperature, rows, MASKED, spec))
            back -= shift_of_columns(coefficients, column, rows)
            # What rounds to more than the largest of its row must not count for more.
            e = exponential(tl.minimum(relative, 0.0, propagate_nan=tl.PropagateNan.ALL), spec)
            of_back = exponential(tl.minimum(back, 0.0, propagate_nan=tl.PropagateNan.ALL), spec)
        on_diagonal = (start < first + spec.rows) & (start + spec.columns > first)
        g, added = similarity_grads(e, of_back, relative, on_diagonal, row, column, forth, other, rows, MOMENT)
        if MOMENT:
            moment += added
        if rows.inverse is not None:
            g = g * column.inverse[None, :]
        if not spec.whole:
            x = read_rows(rows, start, dims, spec.columns).to(spec.dot)
        total = tl.dot(g.to(spec.slope).to(spec.dot), x, total, input_precision=spec.precision, out_dtype=spec.dtype)
    # An ignored row was nobody's contrast.
    return tl.where((row.bias == 0)[:, None], total, 0.0), moment


@triton.jit
def gradient_kernel(rows, coefficients, grad, num_grad_rows, spec):
    """The gradient of some rows in some features.

    Where <x_i, x_j> is not for <x_j, x_i> too (square tiles), the similarities of the way back are computed as the
    first kernel did, to the bit: the largest of an anchor must be its shift, where similarities are so large that a
    rounding changes exp by factors.
    """
    first = tl.program_id(0) * spec.rows
    temperature = tl.load(rows.temperature)
    if spec.common:
        # Two loops: in one, what both ways share would be kept in registers beside what differs.
        if temperature >= _LEAST_T:
            total, moment = row_gradients(rows, coefficients, first, temperature, True, spec)
        else:
            total, moment = row_gradients(rows, coefficients, first, temperature, False, spec)
    else:
        total, moment = row_gradients(rows, coefficients, first, temperature, False, spec)
    left = first + tl.arange(0, spec.rows)
    dims = tl.program_id(1) * spec.block + tl.arange(0, spec.block)
    place = grad + left.to(tl.int64)[:, None] * rows.width + dims[None, :]
    tl.store(place, total, mask=(left < num_grad_rows)[:, None] & (dims < rows.width)[None, :])
    if coefficients.moment is not None:
        if tl.program_id(1) == 0:
            tl.store(coefficients.moment + left, moment, mask=left < rows.anchors)
