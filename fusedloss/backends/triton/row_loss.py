"""A row's loss with its partial derivatives, and what these make of the gradient of its logits.

``row_loss`` is the twin of core/row_loss.py's: an option of the row is a field of RowOptions, read here by its name.
``grad_coefficients`` alone says what a gradient consists of, for every loss and for the statistics' backward.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedloss.core.row_loss import RowOptions

from .blocks import number
from .launch import float64_bits


class Partials(NamedTuple):
    """d loss / d each statistic, of each row."""

    log_sum_exp: Any
    target_logit: Any
    cross_entropy: Any
    smooth_loss: Any
    one_minus_pt: Any
    hinge: Any


class RowLoss(NamedTuple):
    """The loss of each row; its derivatives in the statistics, in Partials' order; those in options with a tensor."""

    value: Any
    log_sum_exp: Any
    target_logit: Any
    cross_entropy: Any
    smooth_loss: Any
    one_minus_pt: Any
    hinge: Any
    label_smoothing: Any
    penalty_strength: Any


class GradCoefficients(NamedTuple):
    """dL/dz_j = softmax * exp(z_j - shift) - smooth_loss * w_j - target * w_j q_j; zero where not kept.

    With labels the gradient at the label is `target`, and elsewhere that has no part in it. With a target_override
    `target` is the gradient of that, and the label's own logit has none. A hinge takes `hinge` where z_j < threshold
    and adds `at_top` at class `first_top`; without one these four hold nothing. `loss` is what the row adds to the sum
    of the losses, where there is one.
    """

    shift: Any
    softmax: Any
    smooth_loss: Any
    target: Any
    kept: Any
    threshold: Any
    hinge: Any
    at_top: Any
    first_top: Any
    loss: Any


@functools.lru_cache(1024)
def row_options(options: RowOptions) -> RowOptions:
    """The options as kernels take them: bits of float64, and None where 0, so that it costs nothing."""
    return RowOptions(*(float64_bits(value) if value != 0 else None for value in options))  # type: ignore[arg-type]


@triton.jit
def per_row(values, bits, rows, T: tl.constexpr):
    """One value for each row, or the same number for all."""
    if values is not None:
        return tl.load(values + rows.index, mask=rows.valid, other=0.0)
    else:
        return tl.zeros(rows.valid.shape, T) + number(bits, T)


@triton.jit
def focal(value, one_minus_pt, focal_gamma, T: tl.constexpr):
    """(1 - p)^gamma, and the derivative of it times `value`."""
    gamma = number(focal_gamma, T)
    factor = tl.exp(gamma * tl.log(one_minus_pt))
    # (1 - p)^gamma / (1 - p) only ever multiplies terms that vanish with 1 - p.
    positive = one_minus_pt > 0
    derivative = tl.where(positive, gamma * factor / tl.where(positive, one_minus_pt, 1.0) * value, 0.0)
    return factor, derivative


@triton.jit
def row_loss(statistics, options, row_tensors, rows, num_classes, spec):
    """(1 - p_y)^gamma * ((1 - eps) cross_entropy + eps / K smooth_loss) + poly_epsilon (1 - p_y), mixed with or
    added to the penalty, + z_loss lse^2."""
    zero = tl.zeros(rows.valid.shape, spec.dtype)
    value = statistics.cross_entropy
    of_lse, of_smooth, of_one_minus_pt, of_hinge, of_smoothing, of_strength = zero, zero, zero, zero, zero, zero
    of_cross_entropy = zero + 1.0
    if spec.smooth_loss:
        smoothing = per_row(row_tensors.label_smoothing, options.label_smoothing, rows, spec.dtype)
        of_cross_entropy = 1.0 - smoothing
        of_smooth = smoothing / num_classes
        value = of_cross_entropy * statistics.cross_entropy
        value += tl.where(smoothing == 0, 0.0, of_smooth * statistics.smooth_loss)
        of_smoothing = statistics.smooth_loss / num_classes - statistics.cross_entropy
    if options.focal_gamma is not None:
        factor, of_one_minus_pt = focal(value, statistics.one_minus_pt, options.focal_gamma, spec.dtype)
        # A certain row has loss 0 even where smoothing alone would be infinite.
        value = tl.where(factor == 0, 0.0, factor * value)
        of_cross_entropy *= factor
        of_smooth *= factor
        of_smoothing *= factor
    if options.poly_epsilon is not None:
        poly_epsilon = number(options.poly_epsilon, spec.dtype)
        value += poly_epsilon * statistics.one_minus_pt
        of_one_minus_pt += poly_epsilon
    if spec.top is not None:
        strength = per_row(row_tensors.penalty_strength, options.penalty_strength, rows, spec.dtype)
        scale = number(options.penalty_scale, spec.dtype)
        of_strength = scale * statistics.hinge
        of_hinge = scale * strength
        penalty = strength * of_strength
        if options.penalty_mix is not None:
            loss_scale = 1.0 - strength
            of_strength -= value
            value = loss_scale * value
            of_cross_entropy *= loss_scale
            of_smooth *= loss_scale
            of_one_minus_pt *= loss_scale
            of_smoothing *= loss_scale
        value += penalty
    if options.z_loss is not None:
        z_loss = number(options.z_loss, spec.dtype)
        value += z_loss * statistics.log_sum_exp * statistics.log_sum_exp
        of_lse = 2.0 * z_loss * statistics.log_sum_exp
    return RowLoss(value, of_lse, zero, of_cross_entropy, of_smooth, of_one_minus_pt, of_hinge, of_smoothing,
                   of_strength)  # fmt: skip


@triton.jit
def scaled_partials(loss, scale):
    """The partial derivatives of `loss` times `scale`, which may be NaN; what has no part in the loss stays 0."""
    return Partials(
        scaled(loss.log_sum_exp, scale),
        scaled(loss.target_logit, scale),
        loss.cross_entropy * scale,
        scaled(loss.smooth_loss, scale),
        scaled(loss.one_minus_pt, scale),
        scaled(loss.hinge, scale),
    )


@triton.jit
def scaled(partial, scale):
    return tl.where(partial == 0, partial, partial * scale)


@triton.jit
def target_grad(softmax, target_coeff, excess, statistics):
    """softmax * p_y - target_coeff, where excess = softmax - target_coeff: by whichever of p and 1 - p has digits."""
    p = statistics.target_probability
    return tl.where(p < 0.5, softmax * p - target_coeff, excess - softmax * statistics.one_minus_pt)


@triton.jit
def hinge_at_label(coefficient, hinge, label):
    """The gradient of the hinge at the rows' labels."""
    at_top = tl.where(hinge.first == label.index, coefficient * hinge.violations, 0.0)
    return at_top - tl.where(label.logit < hinge.threshold, coefficient, 0.0)


@triton.jit
def grad_coefficients(partials, statistics, hinge, label, kept, spec, counted=None):
    """The gradient of the logits from that of the statistics."""
    softmax = partials.log_sum_exp
    if spec.smooth_loss:
        softmax += partials.smooth_loss * statistics.weight_sum
    if spec.soft:
        target = partials.cross_entropy - partials.target_logit
        softmax += statistics.soft_weight * partials.cross_entropy
    else:
        excess = softmax + partials.target_logit
        # At p = 0 or 1 a power of 1 - p has no finite derivative, and p (1 - p) is 0.
        finite = tl.abs(partials.one_minus_pt) < float("inf")
        of_label = tl.where(finite, partials.one_minus_pt * statistics.target_probability, 0.0)
        of_label += label.weight * partials.cross_entropy
        softmax += of_label + tl.where(label.bad, float("nan"), 0.0)
        target = target_grad(softmax, of_label - partials.target_logit, excess, statistics)
        if spec.smooth_loss:
            target -= partials.smooth_loss * label.weight
        if hinge is not None:
            target += hinge_at_label(partials.hinge, hinge, label)
    shift, softmax = statistics.shift, softmax / statistics.row_sum
    loss = shift
    if counted is not None:
        loss = counted
    if hinge is None:
        return GradCoefficients(shift, softmax, partials.smooth_loss, target, kept, shift, shift, shift, shift, loss)
    else:
        return GradCoefficients(shift, softmax, partials.smooth_loss, target, kept, hinge.threshold, partials.hinge,
                                partials.hinge * hinge.violations, hinge.first, loss)  # fmt: skip
