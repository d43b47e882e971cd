"""Softmax cross-entropy of logits: one operation answers, and rows are reduced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fusedloss import backends, ops
from fusedloss.backends.reference import softmax_ce as reference
from fusedloss.backends.reference.class_stats import check_labels
from fusedloss.core.row_loss import MarginPenalty, Row, Statistics
from fusedloss.functional.arguments import Problem, checked
from fusedloss.terms import SoftCap, Term


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


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float | Tensor = 0.0,
    *,
    terms: Sequence[Term] = (),
    focal_gamma: float = 0.0,
    z_loss: float = 0.0,
    margin_penalty: MarginPenalty | None = None,
    sample_weight: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, RowStatistics]:
    """Softmax cross-entropy of terms applied to the logits: ``l_i = lse_i - z_iy`` with ``z = terms(x)``.

    With the first six arguments alone it is ``torch.nn.functional.cross_entropy`` in value, gradient and edge cases.

    Args:
        input: logits ``(K,)``, ``(B, K)`` or ``(B, K, d1, ...)``; float32, float64, bfloat16 or float16.
        target: labels ``()``, ``(B,)`` or ``(B, d1, ...)`` (int64, int32, uint8), or probabilities of input's shape.
        weight: ``(K,)`` class weights.
        ignore_index: rows with this label have loss and gradient 0 and leave the mean's denominator.
        reduction: ``"mean"`` (over the kept rows' target weights, as torch), ``"sum"`` or ``"none"``.
        label_smoothing: in [0, 1]; a tensor holds one value per row: the target's shape, or ``(B,)``.
        terms: what changes the logit, applied in order (``fusedloss.terms``); margins need labels.
        focal_gamma: multiplies a row's loss by ``(1 - p_y) ** focal_gamma``; 0, or at least 0.5. With probability
            targets each class's share has its own factor, ``sum_j w_j q_j (1 - p_j) ** focal_gamma (-log p_j)``, in
            plain PyTorch.
        z_loss: adds ``z_loss * lse ** 2`` to each row, without class weight.
        margin_penalty: holds logits within a margin of the largest (``fusedloss.MarginPenalty``).
        sample_weight: multiplies each row's loss and its share of the mean's denominator; the target's shape or
            ``(B,)``.
        return_stats: also return ``RowStatistics``.

    Returns:
        The loss in float32 (float64 for float64 input); with `return_stats`, ``(loss, RowStatistics)``.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that don't fit; the message names the argument.
        IndexError: a label outside ``[0, K)`` on the CPU (a device assertion on a GPU).

    >>> import torch, fusedloss
    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
    >>> fusedloss.cross_entropy(logits, torch.tensor([0, 1]), terms=[fusedloss.ClassTemperature(2.0)])
    tensor(0.3937, grad_fn=<...>)
    """
    problem = checked(
        input,
        target,
        weight,
        ignore_index,
        reduction,
        label_smoothing,
        terms,
        focal_gamma,
        z_loss,
        margin_penalty,
        sample_weight,
    )
    return loss_of(problem, reduction, return_stats)


def loss_of(problem: Problem, reduction: str, return_stats: bool) -> Tensor | tuple[Tensor, RowStatistics]:
    """The reduced loss of a checked problem, with RowStatistics when asked."""
    logits = problem.logits
    backend = backend_of(problem, return_stats)
    # A float16 gradient made before the gradient scaler's factor arrives would underflow: sweep in the backward.
    whole = reduction != "none" and not return_stats and (logits.dtype != torch.float16 or not logits.requires_grad)
    if problem.sample_weight is not None and logits.numel() == 0:
        whole = False  # a mean over no rows is 0 / 0
    if whole and backend != "reference":
        return _reduced_in_one_sweep(problem, reduction == "mean")
    if backend == "reference":
        # Widened once: where rows read the logits twice, a gradient for each would be rounded to their dtype and added.
        problem = replace(problem, logits=logits.to(problem.dtype))
    statistics, extra = _row_statistics(problem, backend, return_stats)
    return finished(problem, statistics, extra, reduction)


def finished(
    problem: Problem, statistics: Statistics, extra: tuple[Tensor, Tensor] | None, reduction: str
) -> Tensor | tuple[Tensor, RowStatistics]:
    """The loss from the rows' statistics; with (prediction, confidence) in `extra` RowStatistics too."""
    row_loss = _row_loss(problem, statistics)
    loss = _reduce(problem, row_loss, reduction)
    if extra is None:
        return loss
    prediction, confidence = extra
    fields = (statistics.log_sum_exp, statistics.target_logit, prediction, confidence, row_loss.detach())
    return loss, RowStatistics(*(field.reshape(problem.shape) for field in fields))


def _row_loss(problem: Problem, statistics: Statistics) -> Tensor:
    row = problem.row
    if problem.soft and row.focal_gamma != 0:
        focal = reference.soft_focal_loss(
            problem.logits,
            problem.target,
            problem.terms,
            problem.class_weight,
            row.smoothing,
            row.focal_gamma,
            problem.dtype,
        )
        statistics = statistics._replace(cross_entropy=focal)
        row = Row(z_loss=row.z_loss, penalty=row.penalty)
    row_loss = row.loss(statistics, problem.num_classes)
    # An ignored row has its own lse, and nothing that a row learns may see a mean over no rows.
    if not problem.soft and (row.z_loss != 0 or row.learns):
        row_loss = torch.where(problem.target != problem.ignore_index, row_loss, row_loss.new_zeros(()))
    return row_loss


def backend_of(problem: Problem, return_stats: bool) -> str:
    # torch.func transforms see through plain PyTorch only.
    if transformed():
        return "reference"
    if problem.soft:
        # Nor do the kernels give probability targets a gradient.
        if problem.target.requires_grad and torch.is_grad_enabled():
            return "reference"
        # A focal factor for each class of a soft target needs two more sweeps.
        if problem.row.focal_gamma != 0:
            return "reference"
    # Predictions leave margins out, but not what a soft cap makes of them.
    if return_stats and problem.margins and any(isinstance(term, SoftCap) for term in problem.terms[1:]):
        return "reference"
    return backends.resolve_backend(problem.logits.device.type)


def transformed() -> bool:
    """Whether a torch.func transform is at work, which sees through plain PyTorch only."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _reduced_in_one_sweep(problem: Problem, mean: bool) -> Tensor:
    return ops.softmax_ce(problem.inputs(), *sweep_options(problem, mean))


def sweep_options(problem: Problem, mean: bool) -> tuple[ops.RowInputs, ops.SoftmaxOptions]:
    """What the operation that makes loss and gradients at once takes beside its inputs."""
    row, row_scale = problem.row, problem.sample_weight
    if row_scale is not None and mean:
        row_scale = row_scale / problem.denominator()
    smoothing, per_row_smoothing = _number_or_rows(row.smoothing)
    margin, strength, share, mix, per_row_strength = 0.0, 0.0, 1.0, False, None
    if row.penalty is not None:
        margin, share, mix = row.penalty.margin, row.penalty.share(problem.num_classes), row.penalty.mix
        strength, per_row_strength = _number_or_rows(row.penalty.strength)
    mean = mean and row_scale is None
    options = ops.SoftmaxOptions(
        smoothing, row.focal_gamma, row.z_loss, margin, strength, share, mix, problem.ignore_index, mean
    )
    return ops.RowInputs(per_row_smoothing, row_scale, per_row_strength), options


def _number_or_rows(value: Tensor | float) -> tuple[float, Tensor | None]:
    return (0.0, value) if isinstance(value, Tensor) else (value, None)


def _row_statistics(
    problem: Problem, backend: str, return_stats: bool
) -> tuple[Statistics, tuple[Tensor, Tensor] | None]:
    """Differentiable statistics, and (prediction, confidence) when asked."""
    logits, target = problem.logits, problem.target
    penalty = problem.row.penalty
    if backend == "reference":
        readable = logits.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()
        if readable and not problem.soft:
            check_labels(target, problem.num_classes, problem.ignore_index, "target")
        statistics = reference.row_statistics(
            logits,
            target,
            problem.terms,
            problem.class_weight,
            problem.ignore_index,
            problem.dtype,
            None if penalty is None else penalty.margin,
        )
        if not return_stats:
            return statistics, None
        with torch.no_grad():
            z = reference.terms_applied(logits, problem.terms, problem.dtype)
            confidence, prediction = z.softmax(1).amax(1), z.argmax(1)
        return statistics, (prediction, confidence)
    found = ops.softmax_stats(problem.inputs(), statistics_options(problem, return_stats))
    return read_statistics(found, return_stats)


def read_statistics(found: ops.RowTensors, return_stats: bool) -> tuple[Statistics, tuple[Tensor, Tensor] | None]:
    """What an operation found of the rows, as ``finished`` takes it."""
    statistics = Statistics(
        found.log_sum_exp, found.target_logit, found.cross_entropy, found.uniform, found.rest, found.hinge
    )
    return statistics, (found.prediction, found.confidence) if return_stats else None


def statistics_options(problem: Problem, return_stats: bool) -> ops.StatisticsOptions:
    """What the operation that makes statistics takes beside its inputs."""
    penalty = problem.row.penalty
    margin = 0.0 if penalty is None else penalty.margin
    return ops.StatisticsOptions(margin, problem.ignore_index, problem.row.smooths, penalty is not None, return_stats)


def _reduce(problem: Problem, row_loss: Tensor, reduction: str) -> Tensor:
    weighted = row_loss if problem.sample_weight is None else row_loss * problem.sample_weight
    if reduction == "none":
        return weighted.reshape(problem.shape)
    return weighted.sum() if reduction == "sum" else weighted.sum() / problem.denominator()
