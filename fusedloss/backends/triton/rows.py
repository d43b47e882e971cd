"""What becomes of a row once its sums are known: its loss, and the slopes that are written over its classes.

Twin of fusedloss/core/row_loss.py. A row function takes the rows' sums, the hinge's or None, labels, the scalars and its
own arguments, stores what it computes and returns the rows' Slopes; a kernel gets it as a constant.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .slopes import Slopes
from .sums import shift_of, with_label


class Scalars(NamedTuple):
    """Options that are one number for all rows."""

    smoothing: Any = 0.0
    focal_gamma: Any = 0.0
    z_loss: Any = 0.0
    soft_cap: Any = 0.0
    penalty: Any = 0.0
    penalty_margin: Any = 0.0
    penalty_share: Any = 0.0
    penalty_mix: Any = 0.0  # 1 where the penalty takes its strength from the loss, else 0


class CrossEntropyArguments(NamedTuple):
    """Per-row tensors of softmax_ce; absent ones are None."""

    row_loss: Any
    smoothing_slope: Any
    label_gradient: Any
    penalty_slope: Any
    row_smoothing: Any
    row_scale: Any
    row_penalty: Any
    denominator: Any


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
def per_row(values, scalar, rows, T: tl.constexpr):
    """One value for each row, or the same for all."""
    if values is not None:
        return tl.load(values + rows.index, mask=rows.valid, other=0.0)
    else:
        return tl.zeros(rows.valid.shape, T) + tl.full([1], scalar, T)


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
def penalise(loss, hinge, rows, kept, scale, scalars, arguments, T: tl.constexpr):
    """The loss with the penalty, what is left of the loss in it, and the hinge's coefficient."""
    strength = per_row(arguments.row_penalty, scalars.penalty, rows, T)
    share = tl.full([1], scalars.penalty_share, T)
    mixes = tl.full([1], scalars.penalty_mix, T) != 0
    penalty = share * hinge.total
    if arguments.penalty_slope is not None:
        slope = scale * (penalty - tl.where(mixes, loss, 0.0))
        tl.store(arguments.penalty_slope + rows.index, tl.where(kept, slope, 0.0), mask=rows.valid)
    left = 1.0 - tl.where(mixes, strength, 0.0)
    return left * loss + strength * penalty, left, strength * share


@triton.jit
def hinge_at_label(coefficient, hinge, label):
    """The hinge's slope at the rows' labels."""
    at_first = tl.where(hinge.first == label.index, coefficient * hinge.violations, 0.0)
    return at_first - tl.where(label.logit < hinge.threshold, coefficient, 0.0)


@triton.jit
def slopes_of(shift, softmax, uniform, at_target, kept, hinge, coefficient):
    if hinge is None:
        return Slopes(shift, softmax, uniform, at_target, kept, shift, shift, shift, shift)
    else:
        at_first = coefficient * hinge.violations
        return Slopes(shift, softmax, uniform, at_target, kept, hinge.threshold, coefficient, at_first, hinge.first)


@triton.jit
def label_slope(softmax, counted, drift, p, rest):
    """softmax * p - counted, where drift = softmax - counted: by whichever of p and 1 - p has all its digits."""
    return tl.where(p < 0.5, softmax * p - counted, drift - softmax * rest)


@triton.jit
def hard_row(
    rows, sums, hinge, label, num_classes, scalars, arguments, T: tl.constexpr, FOCUS: tl.constexpr,
    STAND_IN: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """(1 - p_y)^gamma * ((1 - eps) w_y (lse - z_y) + eps / K sum_j w_j (lse - z_j)), penalised, + z_loss lse^2."""
    sums = with_label(sums, label, STAND_IN)
    shift = shift_of(sums.top)
    total, label_exp, log_sum = log_of_sum(sums, label, shift)
    lse = shift + log_sum
    rest = sums.rest / total
    smoothing = per_row(arguments.row_smoothing, scalars.smoothing, rows, T)
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
    scale = scale_of(rows, arguments, T) + bad
    # A certain row has loss 0 even where smoothing alone would be infinite.
    loss = tl.where(factor == 0, 0.0, factor * mixed)
    hinge_slope = tl.zeros(hard.shape, T)
    if hinge is not None:
        loss, left, hinge_slope = penalise(loss, hinge, rows, label.kept, scale, scalars, arguments, T)
        factor *= left
        factor_slope *= left
    loss = tl.where(label.kept, loss + z_loss * lse * lse + bad, 0.0)
    tl.store(arguments.row_loss + rows.index, loss, mask=rows.valid)

    if arguments.smoothing_slope is not None:
        slope = tl.where(label.kept, scale * factor * (uniform / num_classes - hard), 0.0)
        tl.store(arguments.smoothing_slope + rows.index, slope, mask=rows.valid)
    drift = factor * share * sums.weight + 2.0 * z_loss * lse
    counted = factor * (1.0 - smoothing) * label.weight + factor_slope
    softmax = counted + drift
    at_label = label_slope(softmax, counted, drift, label_exp / total, rest) - factor * share * label.weight
    if hinge is not None:
        at_label += hinge_at_label(hinge_slope, hinge, label)
    if arguments.label_gradient is not None:
        gradient = tl.where(label.kept, scale * at_label, 0.0)
        tl.store(arguments.label_gradient + rows.index, gradient, mask=rows.valid)
    return slopes_of(shift, scale * softmax / total, scale * factor * share, scale * at_label, label.kept, hinge,
                     scale * hinge_slope)  # fmt: skip


@triton.jit
def label_row(
    rows, sums, hinge, label, num_classes, scalars, arguments, T: tl.constexpr, SOFT: tl.constexpr,
    STAND_IN: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    return hard_row(rows, sums, hinge, label, num_classes, scalars, arguments, T, no_focus, STAND_IN, UNIFORM)


@triton.jit
def focal_row(
    rows, sums, hinge, label, num_classes, scalars, arguments, T: tl.constexpr, SOFT: tl.constexpr,
    STAND_IN: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    return hard_row(rows, sums, hinge, label, num_classes, scalars, arguments, T, focus, STAND_IN, UNIFORM)


@triton.jit
def soft_row(
    rows, sums, hinge, label, num_classes, scalars, arguments, T: tl.constexpr, SOFT: tl.constexpr,
    STAND_IN: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """sum_j w_j ((1 - eps) q_j + eps / K) (lse - z_j), penalised, + z_loss * lse^2."""
    shift = shift_of(sums.top)
    total = sums.rest
    log_sum = tl.log(total)
    lse = shift + log_sum
    smoothing = per_row(arguments.row_smoothing, scalars.smoothing, rows, T)
    share = smoothing / num_classes
    soft = sums.soft_weight * log_sum + sums.soft
    mixed = (1.0 - smoothing) * soft
    uniform = tl.zeros(soft.shape, T)
    if UNIFORM:
        uniform = sums.weight * log_sum + sums.uniform
        mixed += tl.where(smoothing == 0, 0.0, share * uniform)
    z_loss = tl.full([1], scalars.z_loss, T)
    scale = scale_of(rows, arguments, T)
    hinge_slope = tl.zeros(soft.shape, T)
    left = hinge_slope + 1.0
    if hinge is not None:
        mixed, left, hinge_slope = penalise(mixed, hinge, rows, rows.valid, scale, scalars, arguments, T)
    tl.store(arguments.row_loss + rows.index, mixed + z_loss * lse * lse, mask=rows.valid)

    if arguments.smoothing_slope is not None:
        slope = scale * left * (uniform / num_classes - soft)
        tl.store(arguments.smoothing_slope + rows.index, slope, mask=rows.valid)
    softmax = left * ((1.0 - smoothing) * sums.soft_weight + share * sums.weight) + 2.0 * z_loss * lse
    return slopes_of(shift, scale * softmax / total, scale * left * share, scale * left * (1.0 - smoothing), rows.valid,
                     hinge, scale * hinge_slope)  # fmt: skip
