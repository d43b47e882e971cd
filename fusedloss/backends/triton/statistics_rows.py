"""Row functions of softmax_stats and softmax_stats_backward; see ``rows``."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .rows import hinge_at_label, label_slope, log_of_sum, slopes_of
from .slopes import Slopes
from .sums import best_class, shift_of, with_label


class StatisticsArguments(NamedTuple):
    """Outputs of softmax_stats, in its order; those not wanted are None."""

    row_max: Any
    row_sum: Any
    log_sum_exp: Any
    target_logit: Any
    cross_entropy: Any
    uniform: Any
    rest: Any
    hinge: Any
    prediction: Any
    confidence: Any


class SweepArguments(NamedTuple):
    """Saved statistics and upstream gradients of softmax_stats_backward, dL/dlabel_logit; absent ones are None."""

    row_max: Any
    row_sum: Any
    rest: Any
    weight_sum: Any
    log_sum_exp: Any
    target_logit: Any
    cross_entropy: Any
    uniform: Any
    rest_slope: Any
    hinge: Any
    label_gradient: Any


@triton.jit
def statistics_row(
    rows, others, hinge, label, num_classes, scalars, arguments, T: tl.constexpr, SOFT: tl.constexpr,
    STAND_IN: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    sums = with_label(others, label, STAND_IN)
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
    if hinge is not None:
        tl.store(arguments.hinge + rows.index, tl.where(kept, hinge.total + bad, 0.0), mask=rows.valid)
    if arguments.prediction is not None:
        prediction, confidence = best_class(others, label, total, num_classes, STAND_IN)
        tl.store(arguments.prediction + rows.index, prediction.to(tl.int64), mask=rows.valid)
        tl.store(arguments.confidence + rows.index, confidence, mask=rows.valid)
    # No slopes: what would be computed from these is never written, and the compiler drops it.
    return Slopes(shift, shift, shift, shift, kept, shift, shift, shift, shift)


@triton.jit
def upstream(gradient, rows, kept, T: tl.constexpr):
    if gradient is None:
        return tl.zeros(kept.shape, T)
    else:
        return tl.load(gradient + rows.index, mask=kept, other=0.0)


@triton.jit
def sweep_row(
    rows, sums, hinge, label, num_classes, scalars, arguments, T: tl.constexpr, SOFT: tl.constexpr,
    STAND_IN: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """Slopes of the statistics under any upstream gradients; only log_sum_exp counts on an ignored row."""
    shift = shift_of(tl.load(arguments.row_max + rows.index, mask=rows.valid, other=0.0))
    total = tl.load(arguments.row_sum + rows.index, mask=rows.valid, other=1.0)
    kept = label.kept
    logit = upstream(arguments.target_logit, rows, kept, T)
    cross_entropy = upstream(arguments.cross_entropy, rows, kept, T)
    uniform = upstream(arguments.uniform, rows, kept, T)
    softmax = upstream(arguments.log_sum_exp, rows, rows.valid, T)
    hinge_slope = upstream(arguments.hinge, rows, kept, T)
    if UNIFORM:
        if arguments.weight_sum is not None:
            softmax += uniform * tl.load(arguments.weight_sum)
        else:
            softmax += uniform * num_classes
    if SOFT:
        if arguments.cross_entropy is not None:
            softmax += sums.soft_weight * cross_entropy
        return slopes_of(shift, softmax / total, uniform, cross_entropy - logit, rows.valid, hinge, hinge_slope)
    else:
        p = tl.where(label.index < 0, 0.0, tl.exp(label.logit - shift) / total)
        # At p = 0 or 1 a power of 1 - p has no finite slope, and p (1 - p) is 0.
        rest = upstream(arguments.rest_slope, rows, kept, T)
        rest = tl.where(tl.abs(rest) < float("inf"), rest * p, 0.0)
        drift = softmax + logit
        own = label.weight * cross_entropy + rest
        softmax += own + tl.where(label.bad, float("nan"), 0.0)
        others = tl.load(arguments.rest + rows.index, mask=rows.valid, other=0.0)
        at_label = label_slope(softmax, own - logit, drift, p, others) - uniform * label.weight
        if hinge is not None:
            at_label += hinge_at_label(hinge_slope, hinge, label)
        if arguments.label_gradient is not None:
            gradient = tl.where(kept, at_label + tl.where(label.bad, float("nan"), 0.0), 0.0)
            tl.store(arguments.label_gradient + rows.index, gradient, mask=rows.valid)
        return slopes_of(shift, softmax / total, uniform, at_label, rows.valid, hinge, hinge_slope)
