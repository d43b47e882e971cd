"""Row functions: what a kernel does with a row's sums, and which coefficients its gradient then has.

A row function takes the rows' sums, the hinge's or None, labels, RowOptions (see ``row_loss.row_options``) and its own
tensors, stores what it computes and returns the rows' GradCoefficients; a kernel gets it in its Spec.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .row_loss import GradCoefficients, Partials, grad_coefficients, row_loss, scaled_partials
from .statistics import Statistics, best_class, shift_of, statistics_of


class LossTensors(NamedTuple):
    """Per-row tensors of softmax_ce, of the row's loss and its gradients, then of RowInputs; None where absent."""

    row_loss: Any
    grad_target_override: Any
    grad_label_smoothing: Any
    grad_penalty_strength: Any
    label_smoothing: Any
    sample_weight: Any
    penalty_strength: Any
    parts: Any  # see ``softmax_kernels.PARTS``
    finished: Any  # how many programs have left their part
    loss: Any  # one number


class BackwardTensors(NamedTuple):
    """Saved statistics, gradients of the statistics, and what softmax_stats_backward writes; None where absent."""

    row_max: Any
    row_sum: Any
    one_minus_pt: Any
    log_sum_exp: Any
    target_logit: Any
    cross_entropy: Any
    smooth_loss: Any
    grad_one_minus_pt: Any
    hinge: Any
    weight_sum: Any  # one number; None: that of the classes
    grad_target_override: Any


@triton.jit
def store_rows(pointer, values, rows, kept):
    """0 where not kept; nothing where there is no tensor."""
    if pointer is not None:
        tl.store(pointer + rows.index, tl.where(kept, values, 0.0), mask=rows.valid)


@triton.jit
def loss_row(rows, sums, hinge, label, num_classes, denominator, options, row_tensors, spec):
    """softmax_ce: the loss of each row, and its gradient."""
    statistics = statistics_of(sums, hinge, label, spec)
    loss = row_loss(statistics, options, row_tensors, rows, num_classes, spec)
    store_rows(row_tensors.row_loss, loss.value, rows, label.kept)
    weight = tl.zeros(rows.valid.shape, spec.dtype) + 1.0
    if row_tensors.sample_weight is not None:
        weight = tl.load(row_tensors.sample_weight + rows.index, mask=rows.valid, other=0.0)
    scale = weight
    if spec.mean:
        scale = weight / denominator
    store_rows(row_tensors.grad_label_smoothing, scale * loss.label_smoothing, rows, label.kept)
    store_rows(row_tensors.grad_penalty_strength, scale * loss.penalty_strength, rows, label.kept)
    partials = scaled_partials(loss, scale)
    # A weight of infinity, where no row is kept, makes the sum 0 * inf, as in plain PyTorch.
    counted = tl.where(label.kept, loss.value, 0.0) * weight
    coefficients = grad_coefficients(partials, statistics, hinge, label, label.kept, spec, counted)
    store_rows(row_tensors.grad_target_override, coefficients.target, rows, label.kept)
    return coefficients


@triton.jit
def statistics_row(rows, sums, hinge, label, num_classes, denominator, options, outputs, spec):
    """softmax_stats, whose SoftmaxStatistics are `outputs`."""
    statistics = statistics_of(sums, hinge, label, spec)
    store_rows(outputs.row_max, statistics.row_max, rows, rows.valid)
    store_rows(outputs.row_sum, statistics.row_sum, rows, rows.valid)
    store_rows(outputs.log_sum_exp, statistics.log_sum_exp, rows, rows.valid)
    store_rows(outputs.target_logit, statistics.target_logit, rows, label.kept)
    store_rows(outputs.cross_entropy, statistics.cross_entropy, rows, label.kept)
    store_rows(outputs.smooth_loss, statistics.smooth_loss, rows, label.kept)
    store_rows(outputs.one_minus_pt, statistics.one_minus_pt, rows, label.kept)
    store_rows(outputs.hinge, statistics.hinge, rows, label.kept)
    if spec.prediction:
        prediction, confidence = best_class(sums, label, statistics.row_sum, num_classes, spec)
        store_rows(outputs.prediction, prediction.to(tl.int64), rows, rows.valid)
        store_rows(outputs.confidence, confidence, rows, rows.valid)
    # No coefficients: what would be computed from these is never written, and the compiler drops it.
    none = statistics.shift
    return GradCoefficients(none, none, none, none, label.kept, none, none, none, none, none)


@triton.jit
def upstream(grad, rows, kept, T: tl.constexpr):
    if grad is None:
        return tl.zeros(kept.shape, T)
    else:
        return tl.load(grad + rows.index, mask=kept, other=0.0).to(T)


@triton.jit
def saved_statistics(rows, label, soft_weight, num_classes, saved, spec, HAS_LOGIT: tl.constexpr):
    """The statistics that coefficients are made of, the others 0; HAS_LOGIT says whether label.logit is known."""
    none = tl.zeros(rows.valid.shape, spec.dtype)
    row_max = tl.load(saved.row_max + rows.index, mask=rows.valid, other=0.0).to(spec.dtype)
    row_sum = tl.load(saved.row_sum + rows.index, mask=rows.valid, other=1.0).to(spec.dtype)
    one_minus_pt = tl.load(saved.one_minus_pt + rows.index, mask=rows.valid, other=0.0).to(spec.dtype)
    shift = shift_of(row_max)
    probability = 1.0 - one_minus_pt
    if HAS_LOGIT:
        probability = tl.exp(label.logit - shift) / row_sum
    probability = tl.where(label.index < 0, 0.0, probability)
    weight_sum = none + num_classes
    if saved.weight_sum is not None:
        weight_sum = none + tl.load(saved.weight_sum).to(spec.dtype)
    return Statistics(none, none, none, none, one_minus_pt, none, row_max, shift, row_sum, probability, weight_sum,
                      soft_weight)  # fmt: skip


@triton.jit
def upstream_partials(rows, kept, grads, spec):
    """Gradients of the statistics; on an ignored row only that of log_sum_exp counts."""
    T: tl.constexpr = spec.dtype
    return Partials(
        upstream(grads.log_sum_exp, rows, rows.valid, T), upstream(grads.target_logit, rows, kept, T),
        upstream(grads.cross_entropy, rows, kept, T), upstream(grads.smooth_loss, rows, kept, T),
        upstream(grads.grad_one_minus_pt, rows, kept, T), upstream(grads.hinge, rows, kept, T),
    )  # fmt: skip


@triton.jit
def stats_backward_row(rows, sums, hinge, label, num_classes, denominator, options, row_tensors, spec):
    """softmax_stats_backward: the gradient under any gradients of the statistics."""
    statistics = saved_statistics(rows, label, sums.soft_weight, num_classes, row_tensors, spec, True)
    partials = upstream_partials(rows, label.kept, row_tensors, spec)
    coefficients = grad_coefficients(partials, statistics, hinge, label, rows.valid, spec)
    store_rows(row_tensors.grad_target_override, coefficients.target, rows, label.kept)
    return coefficients
