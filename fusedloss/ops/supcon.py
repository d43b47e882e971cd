"""Supervised contrast of rows with each other, forward and backward without the matrix of similarities.

``supcon_stats``  the loss of each anchor; ``supcon_backward`` carries any upstream gradient of it back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedloss.ops.library import answer, call, differentiable_once, library

library.define(
    "supcon_stats(Tensor features, Tensor codes, Tensor? mask, Tensor? weights, Tensor per_positive,"
    " Tensor temperature, int anchors, bool unit) -> (Tensor, Tensor, Tensor)"
)
library.define(
    "supcon_backward(Tensor features, Tensor codes, Tensor? mask, Tensor? weights, Tensor per_positive,"
    " Tensor temperature, Tensor row_shift, Tensor row_sum, Tensor upstream, int anchors, int learned, bool unit,"
    " bool[] wanted) -> Tensor[]"
)
for _function in ("supcon_stats", "supcon_backward"):
    answer("supcon", _function)


@torch.library.register_fake("fusedloss::supcon_stats", lib=library)
def _(features, codes, mask, weights, per_positive, temperature, anchors, unit):
    return tuple(features.new_empty(anchors) for _ in range(3))


@torch.library.register_fake("fusedloss::supcon_backward", lib=library)
def _(features, codes, mask, weights, per_positive, temperature, row_shift, row_sum, upstream, anchors, learned, unit,
      wanted):  # fmt: skip
    gradients = [torch.empty_like(features)] if wanted[0] else []
    return [*gradients, features.new_empty(())] if wanted[1] else gradients


class AnchorSums(NamedTuple):
    """What supcon_stats returns, ``(A,)`` each: the loss, and ``sum_j w_ij exp(s_ij - shift_i)`` with its shift."""

    loss: Tensor
    shift: Tensor
    sum: Tensor


def supcon(
    features: Tensor,
    codes: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    per_positive: Tensor,
    temperature: Tensor,
    anchors: int,
    learned: int,
    unit: bool,
) -> AnchorSums:
    """The loss of each anchor, differentiable in features and temperature; arguments as the reference has them.

    Rows from `learned` on get no gradient. `unit` promises rows of length 1 at most.
    """
    if torch.is_grad_enabled() and (features.requires_grad or temperature.requires_grad):
        return AnchorSums(
            *_SupCon.apply(features, codes, mask, weights, per_positive, temperature, anchors, learned, unit)
        )
    inputs = (features, codes, mask, weights, per_positive, temperature)
    return AnchorSums(*call("supcon", "supcon_stats", *inputs, anchors, unit))


class _SupCon(torch.autograd.Function):
    """Saves two numbers per anchor; the backward computes the similarities again."""

    @staticmethod
    def forward(ctx, features, codes, mask, weights, per_positive, temperature, anchors, learned, unit):
        inputs = (features, codes, mask, weights, per_positive, temperature)
        found = AnchorSums(*call("supcon", "supcon_stats", *inputs, anchors, unit))
        ctx.mark_non_differentiable(found.shift, found.sum)
        ctx.options = anchors, learned, unit
        ctx.save_for_backward(*inputs, found.shift, found.sum)
        return tuple(found)

    @staticmethod
    @differentiable_once
    def backward(ctx, upstream, _shift, _sum):
        need = ctx.needs_input_grad
        wanted = [need[0], need[5]]
        found = iter(call("supcon", "supcon_backward", *ctx.saved_tensors, upstream.contiguous(), *ctx.options, wanted))
        gradients: list[Tensor | None] = [None] * 9
        for place in (0, 5):
            if need[place]:
                gradients[place] = next(found)
        return tuple(gradients)
