"""What becomes of a row once its sums are known: its loss, and the slopes that are written over its classes.

Twin of fusedloss/rows.py. A row function takes the rows' sums and labels, the scalars and its own arguments,
stores what it computes and returns the rows' Slopes; a kernel gets it as a constant.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .blocks import Slopes, shift_of


class Scalars(NamedTuple):
    """Options that are one number for all rows."""

    smoothing: Any
    focal_gamma: Any
    z_loss: Any


class CrossEntropyArguments(NamedTuple):
    """Per-row tensors of softmax_ce; absent ones are None."""

    row_loss: Any
    smoothing_slope: Any
    row_smoothing: Any
    row_scale: Any
    denominator: Any


class StatisticsArguments(NamedTuple):
    """Outputs of softmax_stats."""

    row_max: Any
    row_sum: Any
    log_sum_exp: Any
    target_logit: Any
    cross_entropy: Any
    uniform: Any
    rest: Any
    prediction: Any


class SweepArguments(NamedTuple):
    """Saved statistics and upstream gradients of softmax_sweep; absent ones are None."""

    row_max: Any
    row_sum: Any
    rest: Any
    weight_sum: Any
    log_sum_exp: Any
    target_logit: Any
    cross_entropy: Any
    uniform: Any
    rest_slope: Any


@triton.jit
def log1p(x):
    # log(u) * x / (u - 1) with u = 1 + x rounded: the rounding of u cancels.
    u = 1.0 + x
    difference = u - 1.0
    return tl.where(difference == 0, x, tl.log(u) * x / tl.where(difference == 0, 1.0, difference))


@triton.jit
def log_of_sum(sums, label, shift):
    """Row sum of exp(z - shift), the label's part, and the logarithm of the sum."""
    label_exp = tl.exp(label.logit - shift)
    total = sums.rest + label_exp
    # A label that is the maximum has exp = 1: log1p keeps the digits of a confident row.
    return total, label_exp, tl.where(label.logit == shift, log1p(sums.rest), tl.log(total))


@triton.jit
def smoothing_of(rows, scalars, arguments, T: tl.constexpr):
    if arguments.row_smoothing is not None:
        return tl.load(arguments.row_smoothing + rows.index, mask=rows.valid, other=0.0)
    else:
        return tl.zeros(rows.valid.shape, T) + tl.full([1], scalars.smoothing, T)


@triton.jit
def scale_of(rows, arguments, T: tl.constexpr):
    scale = tl.zeros(rows.valid.shape, T) + 1.0
    if arguments.row_scale is not None:
        scale = tl.load(arguments.row_scale + rows.index, mask=rows.valid, other=0.0)
    if arguments.denominator is not None:
        scale = scale / tl.load(arguments.denominator)
    return scale


@triton.jit
def no_focus(rest, p, mixed, scalars, T: tl.constexpr):
    return tl.zeros(rest.shape, T) + 1.0, tl.zeros(rest.shape, T)


@triton.jit
def focus(rest, p, mixed, scalars, T: tl.constexpr):
    """(1 - p)^gamma and what its derivative adds to the softmax coefficient."""
    gamma = tl.full([1], scalars.focal_gamma, T)
    factor = tl.exp(gamma * tl.log(rest))
    # p log p -> 0 with p; (1 - p)^gamma / (1 - p) only ever multiplies terms that vanish with 1 - p.
    inner = (p > 0) & (rest > 0)
    return factor, tl.where(inner, gamma * factor / tl.where(inner, rest, 1.0) * p * mixed, 0.0)


@triton.jit
def hard_row(
    rows, sums, label, num_classes, scalars, arguments, T: tl.constexpr, FOCUS: tl.constexpr,
    UNIFORM: tl.constexpr,
):  # fmt: skip
    """(1 - p_y)^gamma * ((1 - eps) w_y (lse - z_y) + eps / K sum_j w_j (lse - z_j)) + z_loss lse^2."""
    shift = shift_of(sums.top)
    total, label_exp, log_sum = log_of_sum(sums, label, shift)
    lse = shift + log_sum
    rest = sums.rest / total
    smoothing = smoothing_of(rows, scalars, arguments, T)
    hard = label.weight * (log_sum - (label.logit - shift))
    share = smoothing / num_classes
    mixed = (1.0 - smoothing) * hard
    uniform = tl.zeros(hard.shape, T)
    if UNIFORM:
        uniform = sums.weight * log_sum + sums.uniform
        mixed += tl.where(smoothing == 0, 0.0, share * uniform)
    factor, factor_slope = FOCUS(rest, label_exp / total, mixed, scalars, T)
    z_loss = tl.full([1], scalars.z_loss, T)
    bad = tl.where(label.bad, float("nan"), 0.0)
    # A certain row has loss 0 even where smoothing alone would be infinite.
    loss = tl.where(factor == 0, 0.0, factor * mixed) + z_loss * lse * lse
    loss = tl.where(label.kept, loss + bad, 0.0)
    tl.store(arguments.row_loss + rows.index, loss, mask=rows.valid)

    scale = scale_of(rows, arguments, T) + bad
    if arguments.smoothing_slope is not None:
        slope = tl.where(label.kept, scale * factor * (uniform / num_classes - hard), 0.0)
        tl.store(arguments.smoothing_slope + rows.index, slope, mask=rows.valid)
    drift = factor * share * sums.weight + 2.0 * z_loss * lse
    softmax = factor * (1.0 - smoothing) * label.weight + factor_slope + drift
    at_label = drift - softmax * rest - factor * share * label.weight
    return Slopes(shift, scale * softmax / total, scale * factor * share, scale * at_label, label.kept)


@triton.jit
def label_row(
    rows, sums, label, num_classes, scalars, arguments, T: tl.constexpr, SOFT: tl.constexpr,
    UNIFORM: tl.constexpr,
):  # fmt: skip
    return hard_row(rows, sums, label, num_classes, scalars, arguments, T, no_focus, UNIFORM)


@triton.jit
def focal_row(
    rows, sums, label, num_classes, scalars, arguments, T: tl.constexpr, SOFT: tl.constexpr,
    UNIFORM: tl.constexpr,
):  # fmt: skip
    return hard_row(rows, sums, label, num_classes, scalars, arguments, T, focus, UNIFORM)


@triton.jit
def soft_row(
    rows, sums, label, num_classes, scalars, arguments, T: tl.constexpr, SOFT: tl.constexpr,
    UNIFORM: tl.constexpr,
):  # fmt: skip
    """sum_j w_j ((1 - eps) q_j + eps / K) (lse - z_j) + z_loss * lse^2."""
    shift = shift_of(sums.top)
    total = sums.rest
    log_sum = tl.log(total)
    lse = shift + log_sum
    smoothing = smoothing_of(rows, scalars, arguments, T)
    share = smoothing / num_classes
    soft = sums.soft_weight * log_sum + sums.soft
    mixed = (1.0 - smoothing) * soft
    uniform = tl.zeros(soft.shape, T)
    if UNIFORM:
        uniform = sums.weight * log_sum + sums.uniform
        mixed += tl.where(smoothing == 0, 0.0, share * uniform)
    z_loss = tl.full([1], scalars.z_loss, T)
    tl.store(arguments.row_loss + rows.index, mixed + z_loss * lse * lse, mask=rows.valid)

    scale = scale_of(rows, arguments, T)
    if arguments.smoothing_slope is not None:
        slope = scale * (uniform / num_classes - soft)
        tl.store(arguments.smoothing_slope + rows.index, slope, mask=rows.valid)
    softmax = (1.0 - smoothing) * sums.soft_weight + share * sums.weight + 2.0 * z_loss * lse
    return Slopes(shift, scale * softmax / total, scale * share, scale * (1.0 - smoothing), rows.valid)


@triton.jit
def statistics_row(
    rows, sums, label, num_classes, scalars, arguments, T: tl.constexpr, SOFT: tl.constexpr,
    UNIFORM: tl.constexpr,
):  # fmt: skip
    shift = shift_of(sums.top)
    if not SOFT:
        total, _, log_sum = log_of_sum(sums, label, shift)
        # An ignored row has no label apart from the rest.
        total = tl.where(label.index < 0, sums.rest, total)
        log_sum = tl.where(label.index < 0, tl.log(total), log_sum)
        bad = tl.where(label.bad, float("nan"), 0.0)
        cross_entropy = label.weight * (log_sum - (label.logit - shift)) + bad
        target_logit = label.logit + bad
        rest = sums.rest / total + bad
    else:
        total = sums.rest
        log_sum = tl.log(total)
        bad = tl.zeros(total.shape, T)
        cross_entropy = sums.soft_weight * log_sum + sums.soft
        target_logit = sums.soft_weight * shift - sums.soft
        rest = bad
    kept = label.kept
    tl.store(arguments.row_max + rows.index, sums.top, mask=rows.valid)
    tl.store(arguments.row_sum + rows.index, total, mask=rows.valid)
    tl.store(arguments.log_sum_exp + rows.index, shift + log_sum, mask=rows.valid)
    tl.store(arguments.target_logit + rows.index, tl.where(kept, target_logit, 0.0), mask=rows.valid)
    tl.store(arguments.cross_entropy + rows.index, tl.where(kept, cross_entropy, 0.0), mask=rows.valid)
    tl.store(arguments.rest + rows.index, tl.where(kept, rest, 0.0), mask=rows.valid)
    if UNIFORM:
        uniform = sums.weight * log_sum + sums.uniform + bad
        tl.store(arguments.uniform + rows.index, tl.where(kept, uniform, 0.0), mask=rows.valid)
    if arguments.prediction is not None:
        first = tl.minimum(sums.first_nan, num_classes)
        prediction = tl.where(first < num_classes, first, sums.first_top)
        tl.store(arguments.prediction + rows.index, prediction.to(tl.int64), mask=rows.valid)
    # No slopes: what would be computed from these is never written, and the compiler drops it.
    return Slopes(shift, shift, shift, shift, kept)


@triton.jit
def upstream(gradient, rows, kept, T: tl.constexpr):
    if gradient is None:
        return tl.zeros(kept.shape, T)
    else:
        return tl.load(gradient + rows.index, mask=kept, other=0.0)


@triton.jit
def sweep_row(
    rows, sums, label, num_classes, scalars, arguments, T: tl.constexpr, SOFT: tl.constexpr,
    UNIFORM: tl.constexpr,
):  # fmt: skip
    """Slopes of the statistics under any upstream gradients; only log_sum_exp counts on an ignored row."""
    shift = shift_of(tl.load(arguments.row_max + rows.index, mask=rows.valid, other=0.0))
    total = tl.load(arguments.row_sum + rows.index, mask=rows.valid, other=1.0)
    kept = label.kept
    logit = upstream(arguments.target_logit, rows, kept, T)
    cross_entropy = upstream(arguments.cross_entropy, rows, kept, T)
    uniform = upstream(arguments.uniform, rows, kept, T)
    softmax = upstream(arguments.log_sum_exp, rows, rows.valid, T)
    if UNIFORM:
        if arguments.weight_sum is not None:
            softmax += uniform * tl.load(arguments.weight_sum)
        else:
            softmax += uniform * num_classes
    if SOFT:
        if arguments.cross_entropy is not None:
            softmax += sums.soft_weight * cross_entropy
        return Slopes(shift, softmax / total, uniform, cross_entropy - logit, rows.valid)
    else:
        p = tl.where(label.index < 0, 0.0, tl.exp(label.logit - shift) / total)
        # At p = 0 or 1 a power of 1 - p has no finite slope, and p (1 - p) is 0.
        rest = upstream(arguments.rest_slope, rows, kept, T)
        rest = tl.where(tl.abs(rest) < float("inf"), rest * p, 0.0)
        drift = softmax + logit - uniform * label.weight
        own = label.weight * cross_entropy + rest
        softmax += own + tl.where(label.bad, float("nan"), 0.0)
        others = tl.load(arguments.rest + rows.index, mask=rows.valid, other=0.0)
        # Two forms of one slope: the large terms cancel in the first near p = 1 and in the second near p = 0.
        at_label = tl.where(p < 0.5, softmax * p - own + logit - uniform * label.weight, drift - softmax * others)
        return Slopes(shift, softmax / total, uniform, at_label, rows.valid)
