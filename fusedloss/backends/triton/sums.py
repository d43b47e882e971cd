"""What the softmax kernels gather over the classes of a row: the softmax's sums, and the hinge's in a second look."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .blocks import is_label


class RowSums(NamedTuple):
    """What a pass over the classes leaves; shift is top, or 0 where top is -inf.

    Where another number stands in for the label's logit, `top` and `first_top` leave the label out.
    """

    top: Any  # max_j z_j
    rest: Any  # sum of exp(z_j - shift), without the label
    weight: Any  # sum of w_j
    uniform: Any  # sum of w_j (shift - z_j)
    soft_weight: Any  # sum of w_j q_j
    soft: Any  # sum of w_j q_j (shift - z_j)
    first_top: Any  # first j with z_j = top
    first_nan: Any


class HingeSums(NamedTuple):
    """What a second pass leaves of the hinge sum_j relu(threshold - z_j), threshold = max z - margin."""

    top: Any
    threshold: Any
    total: Any
    violations: Any  # how many z_j lie below the threshold
    first: Any  # first j with z_j = top


NO_CLASS = tl.constexpr(2147483647)


@triton.jit
def shift_of(top):
    return tl.where(top == float("-inf"), 0.0, top)


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
def add_block(
    sums, block, label, classes, SOFT: tl.constexpr, STAND_IN: tl.constexpr, UNIFORM: tl.constexpr,
    PREDICTION: tl.constexpr,
):  # fmt: skip
    """The sums of a row after one more block of its classes, all about the new maximum."""
    z = block.z
    if STAND_IN:
        z = tl.where(is_label(classes, label), float("-inf"), z)
    block_top = tl.max(z, 1)
    top = tl.maximum(sums.top, block_top)
    shift = shift_of(top)
    moved = shift - shift_of(sums.top)
    e = tl.exp(z - shift[:, None])
    if not SOFT:
        e = tl.where(is_label(classes, label), 0.0, e)
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
        at_top = tl.min(tl.where(z == block_top[:, None], classes[None, :], NO_CLASS), 1)
        first_top = tl.where(block_top > sums.top, at_top, first_top)
        at_nan = tl.min(tl.where(z != z, classes[None, :], NO_CLASS), 1)
        first_nan = tl.minimum(first_nan, at_nan)
    return RowSums(top, rest, weight, uniform, soft_weight, soft, first_top, first_nan)


@triton.jit
def with_label(sums, label, STAND_IN: tl.constexpr):
    """The sums about the maximum of all classes, where the label was left out of it."""
    if not STAND_IN:
        return sums
    else:
        top = tl.maximum(sums.top, label.logit)
        shift = shift_of(top)
        uniform = sums.uniform + (shift - shift_of(sums.top)) * sums.weight
        rest = sums.rest * tl.exp(sums.top - shift)
        return RowSums(top, rest, sums.weight, uniform, sums.soft_weight, sums.soft, sums.first_top, sums.first_nan)


@triton.jit
def best_class(sums, label, total, num_classes, STAND_IN: tl.constexpr):
    """First largest class, or first NaN, and its probability: of z as it is without a stand-in for the label's.

    `total` is the sum of exp(z - shift) over all classes where there is no stand-in.
    """
    first_top, first_nan, top = sums.first_top, sums.first_nan, sums.top
    if STAND_IN:
        top = tl.maximum(sums.top, label.plain)
        shift = shift_of(top)
        total = sums.rest * tl.exp(sums.top - shift) + tl.exp(label.plain - shift)
        earlier = (label.plain == sums.top) & (label.index >= 0) & (label.index < first_top)
        first_top = tl.where((label.plain > sums.top) | earlier, label.index, first_top)
        first_nan = tl.where(label.plain != label.plain, tl.minimum(first_nan, label.index), first_nan)
    # 0 / 0 in a row of -inf.
    confidence = tl.where(top == float("-inf"), 0.0, 1.0) / total
    return tl.where(first_nan < num_classes, first_nan, first_top), confidence


@triton.jit
def computed_top(rows, sums, label, arguments, STAND_IN: tl.constexpr):
    return with_label(sums, label, STAND_IN).top


@triton.jit
def saved_top(rows, sums, label, arguments, STAND_IN: tl.constexpr):
    return tl.load(arguments.row_max + rows.index, mask=rows.valid, other=0.0)


@triton.jit
def no_hinge(top, rows, penalty_margin, T: tl.constexpr):
    none = (rows.inner < 0).to(tl.int32)
    zero = none.to(T)
    return HingeSums(top, top - tl.full([1], penalty_margin, T), zero, zero, none + NO_CLASS)


@triton.jit
def add_hinge(hinge, block, classes, num_classes, T: tl.constexpr):
    """The hinge's sums after one more block."""
    inside = (classes < num_classes)[None, :]
    threshold = hinge.threshold[:, None]
    # NaN is no violation and stays in the sum.
    total = hinge.total + tl.sum(tl.where(inside & ((block.z >= threshold) == 0), threshold - block.z, 0.0), 1)
    violations = hinge.violations + tl.sum((inside & (block.z < threshold)).to(T), 1)
    at_top = tl.min(tl.where(block.z == hinge.top[:, None], classes[None, :], NO_CLASS), 1)
    return HingeSums(hinge.top, hinge.threshold, total, violations, tl.minimum(hinge.first, at_top))
