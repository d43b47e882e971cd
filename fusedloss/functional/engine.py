"""From checked arguments to a loss: which operation computes it, and how its rows are reduced."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fusedloss import backends, ops
from fusedloss.backends.reference import softmax_ce as reference
from fusedloss.core.checks import check_labels
from fusedloss.core.operands import RowInputs, SoftmaxStatistics, StatisticsOptions
from fusedloss.core.row_loss import RowOptions, Statistics, needs_hinge, needs_smooth_loss, row_loss, without_focal
from fusedloss.functional.arguments import LossArguments
from fusedloss.terms import SoftCap


class RowStatistics(NamedTuple):
    """What ``return_stats=True`` adds, each of the target's shape (of the rows' shape for probability targets).

    ``log_sum_exp`` and ``target_logit`` are differentiable; ``row_loss`` is detached; ``prediction`` (int64) and
    ``confidence`` leave label-dependent terms out.
    """

    log_sum_exp: Tensor
    target_logit: Tensor
    prediction: Tensor
    confidence: Tensor
    row_loss: Tensor


class _RowValues(NamedTuple):
    """Differentiable statistics of each row, and its prediction and confidence where these were asked for."""

    statistics: Statistics
    prediction: Tensor | None = None
    confidence: Tensor | None = None


def loss_of(arguments: LossArguments, reduction: str, return_stats: bool) -> Tensor | tuple[Tensor, RowStatistics]:
    """The reduced loss, with RowStatistics when asked."""
    logits = arguments.logits
    if backend_of(arguments, return_stats) == "reference":
        # Widened once: where rows read the logits twice, a gradient for each would be rounded to their dtype and added.
        widened = replace(arguments, logits=logits.to(arguments.dtype))
        return reduced(widened, _reference_values(widened, return_stats), reduction)
    if in_one_operation(arguments, reduction, return_stats, logits.dtype, logits.requires_grad):
        rows, mean = one_denominator(arguments, reduction == "mean")
        return ops.softmax_ce(arguments.inputs(), rows, arguments.options, mean)
    found = ops.softmax_stats(arguments.inputs(), statistics_options(arguments, return_stats))
    return reduced(arguments, row_values(found, arguments, return_stats), reduction)


def in_one_operation(
    arguments: LossArguments, reduction: str, return_stats: bool, dtype: torch.dtype, requires_grad: bool
) -> bool:
    """Whether one operation makes the loss and its gradients at once."""
    if reduction == "none" or return_stats:
        return False
    # A float16 gradient made before the gradient scaler's factor arrives would underflow: made in the backward.
    if dtype == torch.float16 and requires_grad:
        return False
    # A weighted mean over no rows is 0 / 0.
    return arguments.rows.sample_weight is None or arguments.logits.numel() > 0


def one_denominator(arguments: LossArguments, mean: bool) -> tuple[RowInputs, bool]:
    """The row tensors, and whether the kernel divides: where rows have weights these are divided beforehand."""
    rows = arguments.rows
    if rows.sample_weight is None or not mean:
        return rows, mean
    weight = rows.sample_weight / arguments.denominator()
    return RowInputs(rows.label_smoothing, weight, rows.penalty_strength), False


def reduced(arguments: LossArguments, values: _RowValues, reduction: str) -> Tensor | tuple[Tensor, RowStatistics]:
    """The loss from the rows' statistics; with predictions RowStatistics too."""
    of_rows = _row_loss(arguments, values.statistics)
    weight = arguments.rows.sample_weight
    weighted = of_rows if weight is None else of_rows * weight
    if reduction == "none":
        loss = weighted.reshape(arguments.shape)
    else:
        loss = weighted.sum() if reduction == "sum" else weighted.sum() / arguments.denominator()
    if values.prediction is None or values.confidence is None:
        return loss
    statistics = values.statistics
    fields = (statistics.log_sum_exp, statistics.target_logit, values.prediction, values.confidence, of_rows.detach())
    return loss, RowStatistics(*(field.reshape(arguments.shape) for field in fields))


def _row_loss(arguments: LossArguments, statistics: Statistics) -> Tensor:
    options, rows = arguments.options, arguments.rows
    if arguments.soft and (options.focal_gamma != 0 or options.poly_epsilon != 0):
        statistics, options, rows = _of_probabilities(arguments, statistics)
    of_rows = row_loss(statistics, options, rows, arguments.num_classes)
    # An ignored row has its own lse, and nothing that requires a gradient may see a mean over no rows.
    learns = rows.label_smoothing is not None or rows.penalty_strength is not None
    if not arguments.soft and (options.z_loss != 0 or learns):
        of_rows = torch.where(arguments.target != arguments.ignore_index, of_rows, of_rows.new_zeros(()))
    return of_rows


def _of_probabilities(arguments: LossArguments, statistics: Statistics) -> tuple[Statistics, RowOptions, RowInputs]:
    """Focal and PolyLoss of probability targets have a factor for each class: in plain PyTorch."""
    options, rows = arguments.options, arguments.rows
    z = reference.terms_applied(arguments.logits, arguments.terms, arguments.dtype)
    cross_entropy, one_minus_pt = statistics.cross_entropy, statistics.one_minus_pt
    if options.poly_epsilon != 0:
        one_minus_pt = reference.soft_one_minus_pt(z, arguments.target)
    if options.focal_gamma != 0:
        smoothing = options.label_smoothing if rows.label_smoothing is None else rows.label_smoothing
        cross_entropy = reference.soft_focal_loss(
            z, arguments.target, arguments.class_weight, smoothing, options.focal_gamma
        )
        options = without_focal(options)
        rows = RowInputs(None, rows.sample_weight, rows.penalty_strength)
    lse, target_logit = statistics.log_sum_exp, statistics.target_logit
    statistics = Statistics(lse, target_logit, cross_entropy, statistics.smooth_loss, one_minus_pt, statistics.hinge)
    return statistics, options, rows


def backend_of(arguments: LossArguments, return_stats: bool) -> str:
    """The backend that computes the loss; "reference" is plain PyTorch without an operation."""
    # torch.func transforms see through plain PyTorch only.
    if transformed():
        return "reference"
    if arguments.soft:
        # Nor do the kernels give probability targets a gradient.
        if arguments.target.requires_grad and torch.is_grad_enabled():
            return "reference"
        # A factor for each class of a soft target needs two more sweeps.
        if arguments.options.focal_gamma != 0 or arguments.options.poly_epsilon != 0:
            return "reference"
    # Predictions leave margins out, but not what a soft cap makes of them.
    if return_stats and arguments.has_margin and any(isinstance(term, SoftCap) for term in arguments.terms[1:]):
        return "reference"
    return backends.resolve_backend(arguments.logits.device.type)


def transformed() -> bool:
    """Whether a torch.func transform is at work, which sees through plain PyTorch only."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _reference_values(arguments: LossArguments, return_stats: bool) -> _RowValues:
    """The statistics by eager formulas, differentiable any number of times."""
    logits, target = arguments.logits, arguments.target
    readable = logits.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()
    if readable and not arguments.soft:
        check_labels(target, arguments.num_classes, arguments.ignore_index, "target")
    z = reference.terms_applied(logits, arguments.terms, arguments.dtype, arguments.margin_target())
    margin = arguments.options.penalty_margin if needs_hinge(arguments.options, arguments.rows) else None
    statistics = reference.row_statistics(z, target, arguments.class_weight, arguments.ignore_index, margin)
    if not return_stats:
        return _RowValues(statistics)
    with torch.no_grad():
        plain = reference.terms_applied(logits, arguments.terms, arguments.dtype)
    return _RowValues(statistics, *reference.predictions(plain))


def row_values(found: SoftmaxStatistics, arguments: LossArguments, return_stats: bool) -> _RowValues:
    """What an operation found of the rows, as ``reduced`` takes it."""
    hinge = found.hinge if needs_hinge(arguments.options, arguments.rows) else None
    statistics = Statistics(
        found.log_sum_exp, found.target_logit, found.cross_entropy, found.smooth_loss, found.one_minus_pt, hinge
    )
    return _RowValues(statistics, *((found.prediction, found.confidence) if return_stats else (None, None)))


def statistics_options(arguments: LossArguments, return_stats: bool) -> StatisticsOptions:
    """Which statistics the row's loss needs."""
    options, rows = arguments.options, arguments.rows
    smooth, hinge = needs_smooth_loss(options, rows), needs_hinge(options, rows)
    return StatisticsOptions(options.penalty_margin, smooth, hinge, return_stats)
