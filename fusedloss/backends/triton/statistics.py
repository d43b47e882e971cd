"""What the softmax kernels gather over the classes of a row, and the row's statistics from that."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .blocks import classes_of, is_label, number


class RowSums(NamedTuple):
    """What a pass over the classes leaves; shift is top, or 0 where top is -inf.

    With a target_override `top` and `first_top` leave the label out.
    """

    top: Any  # max_j z_j
    others: Any  # sum of exp(z_j - shift), without the label
    weight: Any  # sum of w_j
    smooth: Any  # sum of w_j (shift - z_j)
    soft_weight: Any  # sum of w_j q_j
    soft: Any  # sum of w_j q_j (shift - z_j)
    first_top: Any  # first j with z_j = top
    first_nan: Any


class BlockSums(NamedTuple):
    """What each class adds to RowSums, (rows, block), with the shift known."""

    others: Any
    weight: Any
    smooth: Any
    soft_weight: Any
    soft: Any


class HingeSums(NamedTuple):
    """What a second pass leaves of the hinge sum_j relu(threshold - z_j), threshold = max z - margin."""

    top: Any
    threshold: Any
    total: Any
    violations: Any  # how many z_j lie below the threshold
    first: Any  # first j with z_j = top


class BlockHinge(NamedTuple):
    """relu(threshold - z_j) of each class, 1 where that is positive, and whether z_j is the maximum."""

    total: Any
    violations: Any
    at_top: Any


class Statistics(NamedTuple):
    """The fields of ``core.row_loss.Statistics``, and what the coefficients of the gradient need besides."""

    log_sum_exp: Any
    target_logit: Any
    cross_entropy: Any
    smooth_loss: Any
    one_minus_pt: Any
    hinge: Any
    row_max: Any
    shift: Any  # row_max, or 0 where that is -inf
    row_sum: Any  # sum of exp(z_j - shift)
    target_probability: Any  # p_y, 0 without a label
    weight_sum: Any  # sum of w_j
    soft_weight: Any  # sum of w_j q_j


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
def exp(x, T: tl.constexpr):
    """exp(x); the base 2 takes a third of the instructions in float32, and makes what is below 2^-126 zero."""
    if T == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * 1.4426950408889634)


@triton.jit
def differences(weight, z, shift):
    # A weight of 0 counts 0 even where z is -inf.
    return tl.where(weight == 0, 0.0, weight * (shift[:, None] - z))


@triton.jit
def without_label(block, label, start, spec):
    """z, -inf at a label with a target_override."""
    if spec.override:
        return tl.where(is_label(start, label, spec), float("-inf"), block.z)
    else:
        return block.z


@triton.jit
def block_sums(block, z, shift, label, start, spec):
    """What a block adds to the sums about `shift`; z is that of ``without_label``."""
    e = exp(z - shift[:, None], spec.dtype)
    if not spec.soft:
        e = tl.where(is_label(start, label, spec), 0.0, e)
    smooth, soft = e, e
    if spec.smooth_loss:
        smooth = differences(block.weight, block.z, shift)
    if spec.soft:
        soft = differences(block.soft, block.z, shift)
    return BlockSums(e, block.weight, smooth, block.soft, soft)


@triton.jit
def add_block(sums, block, label, start, spec):
    """The sums of a row after one more block of its classes, all about the new maximum."""
    z = without_label(block, label, start, spec)
    block_top = tl.max(z, 1)
    top = tl.maximum(sums.top, block_top)
    shift = shift_of(top)
    moved = shift - shift_of(sums.top)
    added = block_sums(block, z, shift, label, start, spec)
    others = sums.others * tl.exp(sums.top - shift) + tl.sum(added.others, 1)
    weight, smooth, soft_weight, soft = sums.weight, sums.smooth, sums.soft_weight, sums.soft
    if spec.smooth_loss:
        smooth = smooth + moved * weight + tl.sum(added.smooth, 1)
        weight = weight + tl.sum(added.weight, 1)
    if spec.soft:
        soft = soft + moved * soft_weight + tl.sum(added.soft, 1)
        soft_weight = soft_weight + tl.sum(added.soft_weight, 1)
    first_top, first_nan = sums.first_top, sums.first_nan
    if spec.prediction:
        classes = classes_of(start, spec)
        at_top = tl.min(tl.where(z == block_top[:, None], classes[None, :], NO_CLASS), 1)
        first_top = tl.where(block_top > sums.top, at_top, first_top)
        at_nan = tl.min(tl.where(z != z, classes[None, :], NO_CLASS), 1)
        first_nan = tl.minimum(first_nan, at_nan)
    return RowSums(top, others, weight, smooth, soft_weight, soft, first_top, first_nan)


@triton.jit
def with_label(sums, label, spec):
    """The sums about the maximum of all classes, where the label was left out of it."""
    if not spec.override:
        return sums
    else:
        top = tl.maximum(sums.top, label.logit)
        shift = shift_of(top)
        smooth = sums.smooth + (shift - shift_of(sums.top)) * sums.weight
        others = sums.others * tl.exp(sums.top - shift)
        return RowSums(top, others, sums.weight, smooth, sums.soft_weight, sums.soft, sums.first_top, sums.first_nan)


@triton.jit
def log1p(x):
    # log(u) * x / (u - 1) with u = 1 + x rounded: the rounding of u cancels.
    u = 1.0 + x
    difference = u - 1.0
    return tl.where(difference == 0, x, tl.log(u) * x / tl.where(difference == 0, 1.0, difference))


@triton.jit
def statistics_of(sums, hinge, label, spec):
    """NaN in a row whose label is out of range; what an ignored row has in its label's place is not specified."""
    sums = with_label(sums, label, spec)
    shift = shift_of(sums.top)
    none = tl.zeros(shift.shape, spec.dtype)
    bad = tl.where(label.bad, float("nan"), none)
    if spec.soft:
        row_sum = sums.others
        log_sum = tl.log(row_sum)
        cross_entropy = sums.soft_weight * log_sum + sums.soft
        target_logit = sums.soft_weight * shift - sums.soft
        one_minus_pt = none
        probability = none
    else:
        label_exp = tl.where(label.index < 0, 0.0, tl.exp(label.logit - shift))
        row_sum = sums.others + label_exp
        # A label that is the maximum has exp = 1: log1p keeps the digits of a confident row.
        confident = (label.index >= 0) & (label.logit == shift)
        log_sum = tl.where(confident, log1p(sums.others), tl.log(row_sum))
        cross_entropy = label.weight * (log_sum - (label.logit - shift)) + bad
        target_logit = label.logit + bad
        one_minus_pt = sums.others / row_sum + bad
        probability = label_exp / row_sum
    smooth_loss = none
    if spec.smooth_loss:
        smooth_loss = sums.weight * log_sum + sums.smooth + bad
    of_hinge = none
    if hinge is not None:
        # NaN is no violation, and what it does to a row it does to its sum.
        of_hinge = tl.where(sums.others != sums.others, float("nan"), hinge.total + bad)
    return Statistics(shift + log_sum, target_logit, cross_entropy, smooth_loss, one_minus_pt, of_hinge, sums.top,
                      shift, row_sum, probability, sums.weight, sums.soft_weight)  # fmt: skip


@triton.jit
def best_class(sums, label, row_sum, num_classes, spec):
    """First largest class, or first NaN, and its probability, of the logits without target_override.

    `row_sum` is that of all classes where there is no target_override.
    """
    first_top, first_nan, top = sums.first_top, sums.first_nan, sums.top
    if spec.override:
        top = tl.maximum(sums.top, label.plain)
        shift = shift_of(top)
        row_sum = sums.others * tl.exp(sums.top - shift) + tl.exp(label.plain - shift)
        earlier = (label.plain == sums.top) & (label.index >= 0) & (label.index < first_top)
        first_top = tl.where((label.plain > sums.top) | earlier, label.index, first_top)
        first_nan = tl.where(label.plain != label.plain, tl.minimum(first_nan, label.index), first_nan)
    # 0 / 0 in a row of -inf.
    confidence = tl.where(top == float("-inf"), 0.0, 1.0) / row_sum
    return tl.where(first_nan < num_classes, first_nan, first_top), confidence


@triton.jit
def computed_top(rows, sums, label, row_tensors, spec):
    return with_label(sums, label, spec).top


@triton.jit
def saved_top(rows, sums, label, row_tensors, spec):
    return tl.load(row_tensors.row_max + rows.index, mask=rows.valid, other=0.0)


@triton.jit
def no_hinge(top, rows, penalty_margin, T: tl.constexpr):
    none = (rows.inner < 0).to(tl.int32)
    zero = none.to(T)
    return HingeSums(top, top - number(penalty_margin, T), zero, zero, none + NO_CLASS)


@triton.jit
def hinge_sums(hinge, block, start, num_classes, spec, WHOLE: tl.constexpr):
    above = block.z - hinge.threshold[:, None]
    # NaN is no maximum of two.
    total = tl.maximum(-above, 0.0)
    violations = (above < 0).to(spec.dtype)
    if not WHOLE:
        inside = (classes_of(start, spec) < num_classes)[None, :]
        total = tl.where(inside, total, 0.0)
        violations = tl.where(inside, violations, 0.0)
    return BlockHinge(total, violations, block.z == hinge.top[:, None])


@triton.jit
def add_hinge(hinge, block, start, num_classes, spec):
    """The hinge's sums after one more block."""
    added = hinge_sums(hinge, block, start, num_classes, spec, False)
    total = hinge.total + tl.sum(added.total, 1)
    violations = hinge.violations + tl.sum(added.violations, 1)
    first = tl.min(tl.where(added.at_top, classes_of(start, spec)[None, :], NO_CLASS), 1)
    return HingeSums(hinge.top, hinge.threshold, total, violations, tl.minimum(hinge.first, first))
