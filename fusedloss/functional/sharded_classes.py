"""Classes sharded over processes: every rank has all rows and a contiguous share of the classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedloss import distributed
from fusedloss.backends import CHECK_VALUES
from fusedloss.core.checks import check_labels
from fusedloss.core.operands import SoftmaxStatistics
from fusedloss.core.row_loss import Statistics, needs_hinge, needs_smooth_loss, row_loss
from fusedloss.functional.arguments import LossArguments
from fusedloss.functional.linear_head import LinearHead
from fusedloss.terms.term import readable

_REMOTE = -100


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
                f"group must have ranks that agree on linear_weight's width and input's rows; got (K, D, B) {found}"
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


def localized(arguments: LossArguments, head: LinearHead, group: Any) -> tuple[LossArguments, LinearHead, Shard]:
    """The arguments of this rank's classes: labels elsewhere are as if ignored."""
    _check(arguments)
    shard = Shard(head, group)
    target = arguments.target
    if CHECK_VALUES or readable(target):
        check_labels(target, shard.num_classes, arguments.ignore_index, "target")
    local = target - shard.offset
    here = (target != arguments.ignore_index) & (local >= 0) & (local < arguments.num_classes)
    smaller = replace(arguments, target=torch.where(here, local, _REMOTE), ignore_index=_REMOTE)
    return smaller, replace(head, input=distributed.shared(head.input, group)), shard


def joined(
    found: SoftmaxStatistics, arguments: LossArguments, local: LossArguments, shard: Shard
) -> tuple[Tensor, Tensor]:
    """Each row's loss over all ranks' classes, and its label's class weight."""
    here = local.target != _REMOTE
    kept = arguments.target != arguments.ignore_index
    weight = here.to(arguments.dtype)
    if arguments.class_weight is not None:
        weight = weight * arguments.class_weight[local.target.clamp(min=0)]
    weight = shard.total(weight)
    lse, label = shard.log_sum_exp(found.log_sum_exp), shard.total(found.target_logit)
    distance = torch.where(kept, lse - label, torch.zeros_like(lse))
    statistics = Statistics(lse, label, weight * distance, None, -torch.expm1(-distance))
    values = row_loss(statistics, arguments.options, arguments.rows, shard.num_classes)
    return torch.where(kept, values, torch.zeros_like(values)), weight


def reduced(row_loss: Tensor, weight: Tensor, arguments: LossArguments, reduction: str) -> Tensor:
    """As cross_entropy reduces."""
    if arguments.rows.sample_weight is not None:
        row_loss, weight = row_loss * arguments.rows.sample_weight, weight * arguments.rows.sample_weight
    if reduction == "none":
        return row_loss.reshape(arguments.shape)
    return row_loss.sum() if reduction == "sum" else row_loss.sum() / weight.sum()


def _check(arguments: LossArguments) -> None:
    if arguments.soft:
        raise ValueError("target must hold labels with group; got probabilities")
    if needs_smooth_loss(arguments.options, arguments.rows) or needs_hinge(arguments.options, arguments.rows):
        raise ValueError(
            "group must be None with label_smoothing or margin_penalty, which need all classes on one rank"
        )
