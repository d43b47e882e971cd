"""linear_ce, linear_stats and linear_stats_backward over row chunks, for a backend whose softmax works in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedloss.backends.chunked.head import ChunkedHead, HeadGradients
from fusedloss.backends.chunked.panels import Panels
from fusedloss.core.operands import (
    LinearInputs,
    LinearMask,
    LogitInputs,
    RowInputs,
    SavedStatistics,
    SoftmaxMask,
    SoftmaxStatistics,
    StatisticsGrads,
    StatisticsOptions,
)
from fusedloss.core.reduce import mean_denominator
from fusedloss.core.row_loss import RowOptions


class Kernels(NamedTuple):
    """What a backend brings: the softmax functions that work on chunks, and three functions of its linear_ce."""

    softmax: Any
    # (rows, their norms, gradient of their directions to change in place, whether to divide by the norms)
    project_rows: Callable[[Tensor, Tensor, Tensor, bool], None]
    # (inputs, gradient of the label's product, gradients of input and weight to add to)
    add_target_grads: Callable[[LinearInputs, Tensor, Tensor | None, Tensor | None], None]
    prepared: Callable[[Tensor], Tensor]


class _Chunk(NamedTuple):
    """A chunk of logits, and what of the inputs belongs to its rows."""

    rows: slice
    inputs: LogitInputs
    multiplied: bool  # its gradients, by whoever formed the logits, together with other rows'


class Walk:
    """One pass over the chunks, and the gradients that gather on the way."""

    def __init__(
        self, kernels: Kernels, inputs: LinearInputs, mask: LinearMask, head: ChunkedHead | None = None
    ) -> None:
        self.kernels, self.inputs, self.mask = kernels, inputs, mask
        self.head = head or ChunkedHead(inputs, kernels.prepared)
        self.sums = HeadGradients(self.head, mask.input, mask.weight)
        # The gradient of a cosine under a margin may be steep: it goes beside the product, in double.
        self.separate = inputs.target_override is not None and self.head.normalized
        num_classes = len(inputs.weight)
        self.scale, self.bias = (
            inputs.weight.new_zeros(num_classes, dtype=torch.float64) if needed else None
            for needed in (mask.scale, mask.bias)
        )
        self.projected = False

    @property
    def softmax_mask(self) -> SoftmaxMask:
        """What a chunk's softmax has to return."""
        mask = self.mask
        logits = mask.input or mask.weight
        return SoftmaxMask(
            logits,
            mask.scale or mask.bias,
            mask.target_override or (self.separate and logits),
            mask.label_smoothing,
            mask.penalty_strength,
        )

    def chunks(self) -> Iterator[_Chunk]:
        if Panels.worthwhile(self.head, self.sums):
            panels = Panels(self.head, self.sums)
            panels.form()
            for rows, logits in panels.groups(self.softmax_mask.affine):
                yield _Chunk(rows, self._logit_inputs(rows, logits), multiplied=True)
            panels.multiply(self._project_classes)
            self.projected = True
        else:
            for rows, logits in self.head.logits():
                yield _Chunk(rows, self._logit_inputs(rows, logits), multiplied=False)

    def _logit_inputs(self, rows: slice, logits: Tensor) -> LogitInputs:
        inputs = self.inputs
        override = override_grad = None
        if inputs.target_override is not None:
            override = inputs.target_override[rows]
            if self.separate or inputs.target_override_grad is None:
                override_grad = torch.zeros_like(override)
            else:
                override_grad = inputs.target_override_grad[rows].to(override.dtype)
        return LogitInputs(
            logits,
            inputs.target[rows],
            self.head.scale,
            inputs.bias,
            inputs.class_weight,
            override,
            override_grad,
            inputs.soft_cap,
            inputs.ignore_index,
        )

    def take(self, chunk: _Chunk, grads: list[Tensor]) -> list[Tensor]:
        """Gathers the chunk's gradients of logits, scale and bias; returns the rest."""
        mask = self.softmax_mask
        if mask.logits:
            grad_logits, logits = grads.pop(0), chunk.inputs.logits
            if not chunk.multiplied:
                self.sums.add(chunk.rows, grad_logits)
            elif grad_logits is not logits:
                # A backend that couldn't write in place.
                logits.copy_(grad_logits)
        if mask.affine:
            scale, bias = grads.pop(0), grads.pop(0)
            if self.scale is not None:
                self.scale += scale
            if self.bias is not None:
                self.bias += bias
        return grads

    def _project_classes(self, classes: slice) -> None:
        """What normalisation leaves of the gradient of these classes' rows."""
        norm, grad = self.inputs.class_norm, self.sums.weight
        if norm is not None and grad is not None:
            rows = self.inputs.weight[classes]
            self.kernels.project_rows(rows, norm[classes], grad[classes], self.head.unit_weight)

    def finish(self, grad_override: Tensor | None) -> list[Tensor]:
        """The gradients of input, weight, scale, bias and target_override, those of the mask."""
        inputs, sums, mask = self.inputs, self.sums, self.mask
        sums.zero_if_none_came()
        if inputs.input_norm is not None and sums.input is not None:
            self.kernels.project_rows(inputs.input, inputs.input_norm, sums.input, True)
        if not self.projected:
            self._project_classes(slice(None))
        if self.separate and grad_override is not None and (mask.input or mask.weight):
            assert inputs.target_override_grad is not None
            grad_product = grad_override.double() * inputs.target_override_grad
            self.kernels.add_target_grads(inputs, grad_product, sums.input, sums.weight)
        grads = []
        if sums.input is not None:
            grads.append(sums.input.to(inputs.input.dtype))
        if sums.weight is not None:
            grads.append(sums.weight.to(inputs.weight.dtype))
        if self.scale is not None:
            grads.append(self.head.scale_gradient(self.scale).to(inputs.compute_dtype))
        if self.bias is not None:
            grads.append(self.bias.to(inputs.compute_dtype))
        if mask.target_override:
            assert grad_override is not None
            grads.append(grad_override)
        return grads


def linear_ce(
    kernels: Kernels, inputs: LinearInputs, rows: RowInputs, options: RowOptions, mean: bool, mask: LinearMask
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss, each row's, and the gradients that `mask` names."""
    walk = Walk(kernels, inputs, mask)
    count, dtype = len(inputs.input), inputs.compute_dtype
    total = mean_denominator(inputs.target, inputs.class_weight, inputs.ignore_index) if mean else None
    weight = rows.sample_weight
    if total is not None:
        share = total.reciprocal().to(dtype)
        weight = share.expand(count).contiguous() if weight is None else weight * share
    of_rows = rows._replace(sample_weight=weight)
    row_loss = inputs.input.new_empty(count, dtype=dtype)
    parts: list[list[Tensor]] = []
    for chunk in walk.chunks():
        of_chunk = RowInputs(*(None if tensor is None else tensor[chunk.rows] for tensor in of_rows))
        _, row_loss[chunk.rows], grads = kernels.softmax.softmax_ce(
            chunk.inputs, of_chunk, options, False, walk.softmax_mask, in_place=True
        )
        parts.append(walk.take(chunk, grads))
    needed = walk.softmax_mask[2:]
    joined = iter(_joined(parts, sum(needed), row_loss))
    grad_override, grad_smoothing, grad_strength = (next(joined) if each else None for each in needed)
    grads = walk.finish(grad_override)
    grads += [grad for grad in (grad_smoothing, grad_strength) if grad is not None]
    wide = row_loss.double() if rows.sample_weight is None else row_loss.double() * rows.sample_weight
    loss = wide.sum() if total is None else wide.sum() / total
    return loss.to(dtype), row_loss, grads


def linear_stats(kernels: Kernels, inputs: LinearInputs, options: StatisticsOptions) -> SoftmaxStatistics:
    """softmax_stats of the logits."""
    walk = Walk(kernels, inputs, LinearMask())
    parts = [kernels.softmax.softmax_stats(chunk.inputs, options) for chunk in walk.chunks()]
    if not parts:
        nothing = walk._logit_inputs(slice(0, 0), inputs.input.new_empty(0, len(inputs.weight)))
        parts = [kernels.softmax.softmax_stats(nothing, options)]
    return SoftmaxStatistics(*(torch.cat(each) for each in zip(*parts, strict=True)))


def linear_stats_backward(
    kernels: Kernels,
    inputs: LinearInputs,
    saved: SavedStatistics,
    penalty_margin: float,
    grads: StatisticsGrads,
    mask: LinearMask,
) -> list[Tensor]:
    """Carries gradients of the statistics back; the products are formed again."""
    walk = Walk(kernels, inputs, mask)
    softmax_mask = walk.softmax_mask
    parts = []
    for chunk in walk.chunks():
        of_saved = SavedStatistics(*(tensor[chunk.rows] for tensor in saved))
        of_grads = StatisticsGrads(*(None if tensor is None else tensor[chunk.rows] for tensor in grads))
        result = kernels.softmax.softmax_stats_backward(
            chunk.inputs, of_saved, penalty_margin, of_grads, softmax_mask, in_place=True
        )
        parts.append(walk.take(chunk, result))
    joined = _joined(parts, int(softmax_mask.target_override), saved.row_max)
    return walk.finish(joined[0] if joined else None)


def _joined(parts: list[list[Tensor]], count: int, like: Tensor) -> list[Tensor]:
    return [torch.cat(each) for each in zip(*parts, strict=True)] if parts else [like.new_empty(0)] * count
