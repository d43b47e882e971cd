"""Softmax cross-entropy and its row statistics in plain PyTorch. Autograd derives every gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedloss.core.checks import check_labels
from fusedloss.core.dtypes import compute_dtype
from fusedloss.core.operands import (
    LogitInputs,
    RowInputs,
    SavedStatistics,
    SoftmaxMask,
    SoftmaxStatistics,
    StatisticsGrads,
    StatisticsOptions,
)
from fusedloss.core.reduce import mean_denominator
from fusedloss.core.row_loss import RowOptions, Statistics, needs_hinge, row_loss
from fusedloss.terms import MarginTerm, SoftCap, Term, per_class, widened


def softmax_ce(
    inputs: LogitInputs, rows: RowInputs, options: RowOptions, mean: bool, mask: SoftmaxMask, grad_scale: float = 1.0
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The scalar loss, the loss of each row, and the gradients of the scalar one that `mask` names."""
    _check(inputs)
    leaves = _Leaves(inputs, rows, mask)
    with torch.enable_grad():
        margin = options.penalty_margin if needs_hinge(options, rows) else None
        statistics = statistics_of(leaves.inputs, margin)
        of_rows = kept_rows(row_loss(statistics, options, leaves.rows, inputs.logits.shape[1]), inputs)
        total = of_rows if rows.sample_weight is None else of_rows * rows.sample_weight
        loss = total.sum()
        if mean:
            loss = loss / mean_denominator(inputs.target, inputs.class_weight, inputs.ignore_index, dtype=loss.dtype)
        grads = leaves.grads(loss * grad_scale)
    return loss.detach(), of_rows.detach(), grads


def softmax_stats(inputs: LogitInputs, options: StatisticsOptions) -> SoftmaxStatistics:
    """The statistics of each row; those that were not asked for are empty."""
    _check(inputs)
    with torch.no_grad():
        z = final_logits(inputs)
        statistics = row_statistics(
            z,
            inputs.target,
            inputs.class_weight,
            inputs.ignore_index,
            options.penalty_margin if options.hinge else None,
        )
        row_max = z.amax(1)
        row_sum = (z - torch.where(row_max == -torch.inf, 0.0, row_max).unsqueeze(1)).exp().sum(1)
        empty = z.new_empty(0)
        prediction, confidence = empty.long(), empty.clone()
        if options.prediction:
            prediction, confidence = predictions(final_logits(inputs._replace(target_override=None)))
        return SoftmaxStatistics(
            row_max,
            row_sum,
            statistics.log_sum_exp,
            statistics.target_logit,
            statistics.cross_entropy,
            statistics.smooth_loss if options.smooth_loss and statistics.smooth_loss is not None else empty.clone(),
            statistics.one_minus_pt,
            empty.clone() if statistics.hinge is None else statistics.hinge,
            prediction,
            confidence,
        )


def softmax_stats_backward(
    inputs: LogitInputs, saved: SavedStatistics, penalty_margin: float, grads: StatisticsGrads, mask: SoftmaxMask
) -> list[Tensor]:
    """The gradients that `mask` names, from those of the statistics, which are computed again."""
    leaves = _Leaves(inputs, RowInputs(), mask)
    with torch.enable_grad():
        statistics = statistics_of(leaves.inputs, None if grads.hinge is None else penalty_margin)
        total = weighted_total(statistics, grads)
    return leaves.grads(total)


def weighted_total(statistics: Statistics, grads: StatisticsGrads) -> Tensor:
    """The number whose gradient is that of the statistics under `grads`."""
    total = statistics.log_sum_exp.new_zeros(())
    for name in StatisticsGrads._fields:
        grad, value = getattr(grads, name), getattr(statistics, name)
        if grad is not None:
            # A gradient of 0 asks for nothing, even of a statistic that is infinite; an infinite one at p = 0 or 1 too.
            counts = torch.isfinite(grad) & (grad != 0) if name == "one_minus_pt" else grad != 0
            total = total + torch.where(counts, value, 0.0).mul(torch.where(counts, grad, 0.0)).sum()
    return total


class _Leaves:
    """Copies of the inputs that require the gradients that a mask names."""

    def __init__(self, inputs: LogitInputs, rows: RowInputs, mask: SoftmaxMask) -> None:
        def leaf(tensor: Tensor | None, needed: bool) -> Tensor | None:
            return tensor if tensor is None else tensor.detach().requires_grad_(needed)

        logits, dtype = inputs.logits, compute_dtype(inputs.logits.dtype)
        scale, bias = inputs.scale, inputs.bias
        if mask.affine:
            scale = logits.new_ones(logits.shape[1], dtype=dtype) if scale is None else scale
            bias = logits.new_zeros(logits.shape[1], dtype=dtype) if bias is None else bias
        # Widened once: the gradient is rounded to the stored type at the end.
        self.inputs = inputs._replace(
            logits=logits.to(dtype).detach().requires_grad_(mask.logits),
            scale=leaf(scale, mask.affine),
            bias=leaf(bias, mask.affine),
            target_override=leaf(inputs.target_override, mask.target_override),
        )
        self.rows = RowInputs(
            leaf(rows.label_smoothing, mask.label_smoothing),
            leaf(rows.sample_weight, False),
            leaf(rows.penalty_strength, mask.penalty_strength),
        )
        self._dtype = logits.dtype

    def grads(self, total: Tensor) -> list[Tensor]:
        """Those of the leaves that require one, in the order of the mask."""
        inputs, rows = self.inputs, self.rows
        tensors = (inputs.logits, inputs.scale, inputs.bias, inputs.target_override, *rows)
        leaves = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
        if not leaves:
            return []
        if not total.requires_grad:
            grads: tuple[Tensor, ...] = tuple(torch.zeros_like(leaf) for leaf in leaves)
        else:
            grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        dtypes = [self._dtype if leaf is inputs.logits else leaf.dtype for leaf in leaves]
        return [grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]


def _check(inputs: LogitInputs) -> None:
    if inputs.logits.device.type == "cpu" and not inputs.target.is_floating_point():
        check_labels(inputs.target, inputs.logits.shape[1], inputs.ignore_index, "target")


def kept_rows(values: Tensor, inputs: LogitInputs) -> Tensor:
    """The values of rows with a label, 0 in those that are ignored."""
    if inputs.target.is_floating_point():
        return values
    return torch.where(inputs.target != inputs.ignore_index, values, values.new_zeros(()))


def final_logits(inputs: LogitInputs) -> Tensor:
    """``z = scale * c(x) + bias`` in the compute dtype, with ``target_override`` at the labels."""
    x = inputs.logits.to(compute_dtype(inputs.logits.dtype))
    z = SoftCap(inputs.soft_cap).apply(x) if inputs.soft_cap else x
    if inputs.scale is not None:
        z = z * per_class(inputs.scale, z)
    if inputs.bias is not None:
        z = z + per_class(inputs.bias, z)
    if inputs.target_override is None:
        return z
    named = (inputs.target >= 0) & (inputs.target < z.shape[1]) & (inputs.target != inputs.ignore_index)
    column = torch.where(named, inputs.target, 0).unsqueeze(1)
    value = inputs.target_override
    if inputs.target_override_grad is not None:
        x_label = x.gather(1, column).squeeze(1)
        # Adding nothing but a gradient, where x is finite.
        change = torch.where(torch.isfinite(x_label.detach()), x_label - x_label.detach(), 0.0)
        value = value + inputs.target_override_grad * change
    return z.scatter(1, column, torch.where(named, value, z.gather(1, column).squeeze(1)).unsqueeze(1))


def statistics_of(inputs: LogitInputs, penalty_margin: float | None = None) -> Statistics:
    """Statistics of the rows of folded inputs."""
    return row_statistics(final_logits(inputs), inputs.target, inputs.class_weight, inputs.ignore_index, penalty_margin)


def row_statistics(
    z: Tensor, target: Tensor, class_weight: Tensor | None, ignore_index: int, penalty_margin: float | None = None
) -> Statistics:
    """Statistics of ``(B, K)`` or ``(B, K, d)`` logits after terms; see ``row_loss.Statistics``.

    Formula: lse = log sum_j exp z_j, log p_j = z_j - lse.
    """
    hinge = None if penalty_margin is None else (z.max(1, keepdim=True).values - z - penalty_margin).relu().sum(1)
    log_p = z.log_softmax(1)
    log_sum_exp = z.logsumexp(1)
    weight = None if class_weight is None else per_class(class_weight, z)
    smooth_loss = -_weighted(log_p, weight).sum(1)
    if target.is_floating_point():
        q = target.to(z.dtype) if weight is None else target.to(z.dtype) * weight
        cross_entropy = -_weighted(log_p, q).sum(1)
        target_logit = _weighted(z, q).sum(1)
        return Statistics(log_sum_exp, target_logit, cross_entropy, smooth_loss, torch.zeros_like(log_sum_exp), hinge)
    kept = target != ignore_index
    label = torch.where(kept, target, 0).unsqueeze(1)
    cross_entropy = -log_p.gather(1, label).squeeze(1)
    if class_weight is not None:
        cross_entropy = class_weight[label.squeeze(1)] * cross_entropy
    one_minus_pt = log_p.exp().scatter(1, label, 0.0).sum(1)
    zero = torch.zeros((), dtype=z.dtype, device=z.device)
    return Statistics(
        log_sum_exp,
        torch.where(kept, z.gather(1, label).squeeze(1), zero),
        torch.where(kept, cross_entropy, zero),
        torch.where(kept, smooth_loss, zero),
        torch.where(kept, one_minus_pt, zero),
        None if hinge is None else torch.where(kept, hinge, zero),
    )


def predictions(z: Tensor) -> tuple[Tensor, Tensor]:
    """The largest class of each row and its probability."""
    with torch.no_grad():
        return z.argmax(1), z.softmax(1).amax(1)


def soft_focal_loss(
    z: Tensor, target: Tensor, class_weight: Tensor | None, smoothing: Tensor | float, gamma: float
) -> Tensor:
    """Each row's sum_j w_j q_j (1 - p_j)^gamma (-log p_j), with q the smoothed probabilities of `target`."""
    log_p = z.log_softmax(1)
    if isinstance(smoothing, Tensor):
        smoothing = smoothing.unsqueeze(1)
    q = (1 - smoothing) * target.to(z.dtype) + smoothing / z.shape[1]
    if class_weight is not None:
        q = q * per_class(class_weight, log_p)
    # A class of probability 1 has focal factor 0, and its gradient is 0 too.
    certain = log_p == 0
    focus = -torch.expm1(torch.where(certain, torch.full_like(log_p, -1.0), log_p))
    focus = torch.where(certain, torch.zeros_like(focus), focus**gamma)
    return -_weighted(log_p, q * focus).sum(1)


def soft_one_minus_pt(z: Tensor, target: Tensor) -> Tensor:
    """Each row's sum_j q_j (1 - p_j) with the probabilities q of `target`."""
    p = z.softmax(1)
    # 1 - p as the sum over the other classes would take a matrix of its own; p near 1 matters little to a sum.
    return (target.to(z.dtype) * (1 - p)).sum(1)


def terms_applied(logits: Tensor, terms: Sequence[Term], dtype: torch.dtype, target: Tensor | None = None) -> Tensor:
    """The logits in `dtype` after every term, in order; without `target` margins change nothing."""
    z = logits.to(dtype)
    for term in terms:
        term = widened(term, dtype)
        z = (term.apply(z, target) if isinstance(term, MarginTerm) else term.apply(z)).to(dtype)
    return z


def _weighted(values: Tensor, weight: Tensor | float | None) -> Tensor:
    """weight * values, where a weight of 0 gives 0 even at an infinite value; differentiable in both."""
    if weight is None:
        return values
    return weight * values.masked_fill((weight == 0) & torch.isinf(values), 0.0)
