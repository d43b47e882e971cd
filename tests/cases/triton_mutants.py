"""Wrong versions of the Triton backend's small functions: each makes a mistake that a comparison must see."""

import triton
import triton.language as tl

from fusedloss.backends.triton import blocks, class_kernels, grad_logits, row_loss, softmax_rows, statistics
from fusedloss.backends.triton.blocks import is_class
from fusedloss.backends.triton.row_loss import GradCoefficients, RowLoss
from fusedloss.backends.triton.statistics import RowSums

_loss_row, _statistics_row = softmax_rows.loss_row, softmax_rows.statistics_row
_row_loss, _grad_coefficients, _hinge_at_label = row_loss.row_loss, row_loss.grad_coefficients, row_loss.hinge_at_label
_add_block, _add_hinge = statistics.add_block, statistics.add_hinge
_with_label, _best_class = statistics.with_label, statistics.best_class
_add_columns, _tanh = grad_logits.add_columns, blocks.tanh
_add_parts, _first_place = class_kernels.add_parts, class_kernels.first_place


@triton.jit
def softmax_coefficient(partials, values, hinge, label, kept, spec, counted=None):
    right = _grad_coefficients(partials, values, hinge, label, kept, spec, counted)
    return GradCoefficients(right.shift, right.softmax * 1.001, right.smooth_loss, right.target, right.kept,
                            right.threshold, right.hinge, right.at_top, right.first_top, right.loss)  # fmt: skip


@triton.jit
def target_coefficient(partials, values, hinge, label, kept, spec, counted=None):
    right = _grad_coefficients(partials, values, hinge, label, kept, spec, counted)
    return GradCoefficients(right.shift, right.softmax, right.smooth_loss, right.target * 1.001, right.kept,
                            right.threshold, right.hinge, right.at_top, right.first_top, right.loss)  # fmt: skip


@triton.jit
def loss_row(rows, sums, hinge, label, num_classes, denominator, options, row_tensors, spec):
    right = _loss_row(rows, sums, hinge, label, num_classes, denominator, options, row_tensors, spec)
    return GradCoefficients(right.shift, right.softmax, right.smooth_loss * 1.001, right.target, right.kept,
                            right.threshold, right.hinge, right.at_top, right.first_top, right.loss)  # fmt: skip


@triton.jit
def statistics_row(rows, sums, hinge, label, num_classes, denominator, options, outputs, spec):
    wrong = RowSums(sums.top, sums.others * 1.001, sums.weight, sums.smooth, sums.soft_weight, sums.soft,
                    sums.first_top, sums.first_nan)  # fmt: skip
    return _statistics_row(rows, wrong, hinge, label, num_classes, denominator, options, outputs, spec)


@triton.jit
def one_minus_pt_partial(values, options, row_tensors, rows, num_classes, spec):
    right = _row_loss(values, options, row_tensors, rows, num_classes, spec)
    return RowLoss(right.value, right.log_sum_exp, right.target_logit, right.cross_entropy, right.smooth_loss,
                   1.001 * right.one_minus_pt, right.hinge, right.label_smoothing, right.penalty_strength)  # fmt: skip


@triton.jit
def unmixed_partial(values, options, row_tensors, rows, num_classes, spec):
    # The penalty takes its strength from the loss, but not from its gradient.
    right = _row_loss(values, options, row_tensors, rows, num_classes, spec)
    return RowLoss(right.value, right.log_sum_exp, right.target_logit, right.cross_entropy * 0.0 + 1.0,
                   right.smooth_loss, right.one_minus_pt, right.hinge, right.label_smoothing,
                   right.penalty_strength)  # fmt: skip


@triton.jit
def target_grad(softmax, target_coeff, excess, values):
    return excess - softmax * values.one_minus_pt


@triton.jit
def hinge_at_label(coefficient, hinge, label):
    return _hinge_at_label(coefficient, hinge, label) + 0.001 * coefficient


@triton.jit
def add_columns(scale_sum, bias_sum, grad, x):
    scale_sum, bias_sum = _add_columns(scale_sum, bias_sum, grad, x)
    return scale_sum * 0.999, bias_sum


@triton.jit
def add_block(sums, block, label, start, spec):
    # The sum of earlier blocks is not moved to the new maximum.
    right = _add_block(sums, block, label, start, spec)
    others = right.others + sums.others * (1.0 - tl.exp(sums.top - right.top))
    return RowSums(right.top, others, right.weight, right.smooth, right.soft_weight, right.soft, right.first_top,
                   right.first_nan)  # fmt: skip


@triton.jit
def add_hinge(hinge, block, start, num_classes, spec):
    # The last, ragged block counts classes that don't exist.
    return _add_hinge(hinge, block, start, num_classes + 1, spec)


@triton.jit
def with_label(sums, label, spec):
    # The maximum without the label.
    right = _with_label(sums, label, spec)
    return RowSums(sums.top, right.others, right.weight, right.smooth, right.soft_weight, right.soft, right.first_top,
                   right.first_nan)  # fmt: skip


@triton.jit
def best_class(sums, label, row_sum, num_classes, spec):
    # The sum with target_override in place of the one without.
    first, _ = _best_class(sums, label, row_sum, num_classes, spec)
    return first, 1.0 / row_sum


@triton.jit
def tanh(x, T: tl.constexpr):
    return _tanh(x, T) * 0.9999


@triton.jit
def is_label(start, label, spec):
    # The gradient of target_override lands one class further.
    return is_class(label.index + 1, start, spec)


@triton.jit
def add_parts(parts, start, stop, step, width, columns, LANES: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr):
    # The first of several segments is forgotten.
    return _add_parts(parts, tl.where(stop - start > 1, start + 1, start), stop, step, width, columns, LANES, UNROLL,
                      BLOCK)  # fmt: skip


@triton.jit
def first_place(rows, faults, index, first):
    # A new class starts with its first row, usable or not.
    return first


@triton.jit
def is_usable(features, row, T: tl.constexpr, BLOCK: tl.constexpr):
    return row >= 0


@triton.jit
def larger(a, b):
    # Without NaN.
    return tl.maximum(a, b)
