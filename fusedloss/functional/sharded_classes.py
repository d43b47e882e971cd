"""Classes sharded over processes: every rank has all rows and a contiguous share of the classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedloss import ops
from fusedloss.backends import CHECK_VALUES
from fusedloss.backends.reference.class_stats import check_labels
from fusedloss.core.row_loss import Statistics
from fusedloss.functional.arguments import Problem
from fusedloss.functional.linear_head import LinearHead
from fusedloss.terms.term import readable

_ELSEWHERE = -100


class _SumOfGradients(torch.autograd.Function):
    """Rows as they are; their gradient is the sum over the ranks, each of which knows that of its own classes."""

    @staticmethod
    def forward(ctx, rows: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class Shard:
    """Where this rank's classes begin, and how many there are on all ranks."""

    def __init__(self, head: LinearHead, group: Any) -> None:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        mine = torch.tensor([*head.weight.shape, len(head.input)], device=head.weight.device)
        shapes = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(shapes, mine, group=group)
        if any(not torch.equal(shape[1:], mine[1:]) for shape in shapes):
            found = [tuple(shape.tolist()) for shape in shapes]
            raise ValueError(
                f"group: linear_weight's width and input's rows must agree on all ranks; got (K, D, B) {found}"
            )
        counts = [int(shape[0]) for shape in shapes]
        self.group, self.offset, self.num_classes = group, sum(counts[:rank]), sum(counts)

    def total(self, value: Tensor) -> Tensor:
        """The sum over the ranks; the gradient is that of this rank's part."""
        total = value.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total + (value - value.detach())

    def log_sum_exp(self, value: Tensor) -> Tensor:
        """Of all ranks' values; the gradient is that of this rank's part."""
        found = [torch.empty_like(value) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(found, value.detach().contiguous(), group=self.group)
        found[dist.get_rank(self.group)] = value
        return torch.stack(found).logsumexp(0)


def localized(problem: Problem, head: LinearHead, group: Any) -> tuple[Problem, LinearHead, Shard]:
    """The problem of this rank's classes: labels elsewhere are as if ignored."""
    _check(problem)
    shard = Shard(head, group)
    target = problem.target
    if CHECK_VALUES or readable(target):
        check_labels(target, shard.num_classes, problem.ignore_index, "target")
    local = target - shard.offset
    here = (target != problem.ignore_index) & (local >= 0) & (local < problem.num_classes)
    smaller = replace(problem, target=torch.where(here, local, _ELSEWHERE), ignore_index=_ELSEWHERE)
    return smaller, replace(head, input=_SumOfGradients.apply(head.input, group)), shard


def joined(found: ops.RowTensors, problem: Problem, local: Problem, shard: Shard) -> tuple[Tensor, Tensor]:
    """Each row's loss over all ranks' classes, and its label's class weight."""
    here = local.target != _ELSEWHERE
    kept = problem.target != problem.ignore_index
    weight = here.to(problem.dtype)
    if problem.class_weight is not None:
        weight = weight * problem.class_weight[local.target.clamp(min=0)]
    weight = shard.total(weight)
    lse, label = shard.log_sum_exp(found.log_sum_exp), shard.total(found.target_logit)
    distance = torch.where(kept, lse - label, torch.zeros_like(lse))
    statistics = Statistics(lse, label, weight * distance, None, -torch.expm1(-distance))
    row_loss = problem.row.loss(statistics, shard.num_classes)
    return torch.where(kept, row_loss, torch.zeros_like(row_loss)), weight


def reduced(row_loss: Tensor, weight: Tensor, problem: Problem, reduction: str) -> Tensor:
    """As cross_entropy reduces."""
    if problem.sample_weight is not None:
        row_loss, weight = row_loss * problem.sample_weight, weight * problem.sample_weight
    if reduction == "none":
        return row_loss.reshape(problem.shape)
    return row_loss.sum() if reduction == "sum" else row_loss.sum() / weight.sum()


def _check(problem: Problem) -> None:
    if problem.soft:
        raise ValueError("group: sharded classes need labels; got probability targets")
    if problem.row.smooths or problem.row.penalty is not None:
        raise ValueError("group: label_smoothing and margin_penalty need all classes on one rank")
