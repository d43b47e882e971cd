"""Rows of all ranks of a process group, with gradients that flow back to the rank that they came from."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def row_counts(rows: Tensor, group: Any) -> list[int]:
    """How many rows each rank holds; waits for the device."""
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, own, group=group)
    return [int(count) for count in counts]


def gathered(rows: Tensor, group: Any) -> Tensor:
    """The rows of all ranks in the order of the ranks, without gradient; ranks may hold different numbers of rows."""
    counts = row_counts(rows, group)
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gathered_with_gradient(rows: Tensor, group: Any) -> Tensor:
    """As ``gathered``; the gradient of a rank's rows is the sum of those of all ranks' losses."""
    result: Tensor = _Gather.apply(rows, group)
    return result


def summed(value: Tensor, group: Any) -> Tensor:
    """The sum over ranks; its gradient reaches each rank's own part once."""
    result: Tensor = _Sum.apply(value, group)
    return result


def shared(tensor: Tensor, group: Any) -> Tensor:
    """A tensor that every rank holds alike; its gradient is summed over ranks."""
    result: Tensor = _Shared.apply(tensor, group)
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        counts = row_counts(rows, group)
        rank = dist.get_rank(group)
        ctx.group, ctx.first, ctx.count = group, sum(counts[:rank]), len(rows)
        return gathered(rows, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduced(grad, ctx.group)[ctx.first : ctx.first + ctx.count], None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        return _reduced(value.detach(), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduced(grad, ctx.group), None


def _reduced(value: Tensor, group: Any) -> Tensor:
    total = value.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total
