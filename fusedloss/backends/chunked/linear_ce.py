"""linear_ce, linear_stats and linear_stats_backward over row chunks, for any backend that sweeps a chunk of logits in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedloss.backends.chunked.head import ChunkedHead, HeadGradients, LinearInputs
from fusedloss.backends.chunked.panels import Panels


class LinearWanted(NamedTuple):
    """Which gradients to compute; they are returned in this order."""

    input: bool = False
    weight: bool = False
    scale: bool = False
    bias: bool = False
    target_override: bool = False
    row_smoothing: bool = False
    row_penalty: bool = False


class Kernels(NamedTuple):
    """What a backend brings: the module of its softmax sweeps, and three functions of its linear_ce."""

    softmax: Any
    # (rows, their norms, gradient of their directions to change in place, whether to divide by the norms)
    project_rows: Callable[[Tensor, Tensor, Tensor, bool], None]
    # (inputs, ignore_index, slope in the label's product, gradients of input and weight to add to)
    label_gradients: Callable[[LinearInputs, int, Tensor, Tensor | None, Tensor | None], None]
    prepared: Callable[[Tensor], Tensor]


class _Chunk(NamedTuple):
    """A chunk of logits, and what of the inputs belongs to its rows."""

    rows: slice
    logits: Tensor
    target: Tensor
    target_override: Tensor | None
    target_override_grad: Tensor | None
    multiplied: bool  # its slopes, by whoever formed the logits, together with other rows'


class Walk:
    """One pass over the chunks, and the gradients that gather on the way."""

    def __init__(
        self, kernels: Kernels, inputs: LinearInputs, wanted: LinearWanted, head: ChunkedHead | None = None
    ) -> None:
        self.kernels, self.inputs, self.wanted = kernels, inputs, wanted
        self.head = head or ChunkedHead(inputs, kernels.prepared)
        self.sums = HeadGradients(self.head, wanted.input, wanted.weight)
        self.label = inputs.target_override is not None
        # A normalised label's slope may be steep: it goes beside the product, in double.
        self.apart = self.label and self.head.normalized
        num_classes = len(inputs.weight)
        self.scale, self.bias = (
            inputs.weight.new_zeros(num_classes, dtype=torch.float64) if want else None
            for want in (wanted.scale, wanted.bias)
        )
        self.projected = False

    @property
    def slopes_wanted(self) -> bool:
        return self.wanted.input or self.wanted.weight

    @property
    def columns_wanted(self) -> bool:
        return self.wanted.scale or self.wanted.bias

    @property
    def label_wanted(self) -> bool:
        return self.wanted.target_override or (self.apart and self.slopes_wanted)

    def chunks(self) -> Iterator[_Chunk]:
        if Panels.worthwhile(self.head, self.sums):
            panels = Panels(self.head, self.sums)
            panels.form()
            for rows, logits in panels.groups(self.columns_wanted):
                yield self._chunk(rows, logits, multiplied=True)
            panels.multiply(self._project_classes)
            self.projected = True
        else:
            for rows, logits in self.head.logits():
                yield self._chunk(rows, logits, multiplied=False)

    def _chunk(self, rows: slice, logits: Tensor, multiplied: bool) -> _Chunk:
        target_override, target_override_grad = self.inputs.target_override, self.inputs.target_override_grad
        slope = None
        if target_override is not None and target_override_grad is not None:
            slope = (
                torch.zeros_like(target_override[rows])
                if self.apart
                else target_override_grad[rows].to(target_override.dtype)
            )
        target_override = None if target_override is None else target_override[rows]
        return _Chunk(rows, logits, self.inputs.target[rows], target_override, slope, multiplied)

    def logit_arguments(self, chunk: _Chunk) -> tuple:
        return chunk.logits, chunk.target, self.head.scale, self.inputs.bias, self.inputs.class_weight

    def take(self, chunk: _Chunk, gradients: list[Tensor]) -> list[Tensor]:
        """Gathers the chunk's gradients of logits, scale and bias; returns the rest."""
        if self.slopes_wanted:
            slopes = gradients.pop(0)
            if not chunk.multiplied:
                self.sums.add(chunk.rows, slopes)
            elif slopes is not chunk.logits:
                # A backend that couldn't write in place.
                chunk.logits.copy_(slopes)
        if self.columns_wanted:
            scale, bias = gradients.pop(0), gradients.pop(0)
            if self.scale is not None:
                self.scale += scale
            if self.bias is not None:
                self.bias += bias
        return gradients

    def _project_classes(self, classes: slice) -> None:
        """What normalisation leaves of the gradient of these classes' rows."""
        norm, gradient = self.inputs.class_norm, self.sums.weight
        if norm is not None and gradient is not None:
            rows = self.inputs.weight[classes]
            self.kernels.project_rows(rows, norm[classes], gradient[classes], self.head.unit_weight)

    def finish(self, label_gradient: Tensor | None, ignore_index: int) -> list[Tensor]:
        """The gradients of input, weight, scale, bias and target_override, those wanted."""
        inputs, sums = self.inputs, self.sums
        if inputs.input_norm is not None and sums.input is not None:
            self.kernels.project_rows(inputs.input, inputs.input_norm, sums.input, True)
        if not self.projected:
            self._project_classes(slice(None))
        if self.apart and label_gradient is not None and self.slopes_wanted:
            assert inputs.target_override_grad is not None
            slope = label_gradient.double() * inputs.target_override_grad
            self.kernels.label_gradients(inputs, ignore_index, slope, sums.input, sums.weight)
        found = []
        if sums.input is not None:
            found.append(sums.input.to(inputs.input.dtype))
        if sums.weight is not None:
            found.append(sums.weight.to(inputs.weight.dtype))
        if self.scale is not None:
            found.append(self.head.scale_gradient(self.scale).to(inputs.compute_dtype))
        if self.bias is not None:
            found.append(self.bias.to(inputs.compute_dtype))
        if self.wanted.target_override:
            assert label_gradient is not None
            found.append(label_gradient)
        return found


def linear_ce(kernels: Kernels, inputs: LinearInputs, per_row: tuple[Tensor | None, ...], options: tuple,
              wanted: LinearWanted) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """The loss, each row's, and the wanted gradients; `per_row` and `options` are softmax_ce's, mean the last."""
    *numbers, mean = options
    smoothing, row_scale, penalty = per_row
    walk = Walk(kernels, inputs, wanted)
    count = len(inputs.input)
    counted = denominator(inputs, numbers[-1]) if mean else None
    scale = row_scale
    if counted is not None:
        share = counted.reciprocal().to(inputs.compute_dtype)
        scale = share.expand(count).contiguous() if scale is None else scale * share
    asked = [walk.slopes_wanted, walk.columns_wanted, wanted.row_smoothing, walk.label_wanted, wanted.row_penalty]
    row_loss = inputs.input.new_empty(count, dtype=inputs.compute_dtype)
    rows_found: list[list[Tensor]] = []
    for chunk in walk.chunks():
        of_rows = [None if tensor is None else tensor[chunk.rows] for tensor in (smoothing, scale, penalty)]
        _, row_loss[chunk.rows], gradients = kernels.softmax.softmax_ce(
            *walk.logit_arguments(chunk),
            chunk.target_override,
            chunk.target_override_grad,
            *of_rows,
            inputs.soft_cap,
            *numbers,
            False,
            asked,
            in_place=True,
        )
        rows_found.append(walk.take(chunk, gradients))
    found = iter(_joined(rows_found, sum(asked[2:]), row_loss))
    smoothing_slope, label_gradient, penalty_slope = (next(found) if want else None for want in asked[2:])
    walk.sums.zero_if_none_came()
    gradients = walk.finish(label_gradient, numbers[-1])
    gradients += [slope for slope in (smoothing_slope, penalty_slope) if slope is not None]
    total = row_loss.double() if row_scale is None else row_loss.double() * row_scale
    loss = total.sum() if counted is None else total.sum() / counted
    return loss.to(inputs.compute_dtype), row_loss, gradients


def linear_stats(kernels: Kernels, inputs: LinearInputs, options: tuple) -> tuple[Tensor, ...]:
    """softmax_stats of the logits; `options` are penalty_margin, ignore_index and the three wants."""
    walk = Walk(kernels, inputs, LinearWanted())
    found = [
        kernels.softmax.softmax_stats(*walk.logit_arguments(chunk), chunk.target_override, inputs.soft_cap, *options)
        for chunk in walk.chunks()
    ]
    if not found:
        nothing = inputs.input.new_empty(0, len(inputs.weight))
        return kernels.softmax.softmax_stats(
            nothing, inputs.target, walk.head.scale, inputs.bias, inputs.class_weight, inputs.target_override,
            inputs.soft_cap, *options,
        )  # fmt: skip
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def linear_stats_backward(kernels: Kernels, inputs: LinearInputs, saved: tuple[Tensor, ...], numbers: tuple,
                 upstream: tuple[Tensor | None, ...], wanted: LinearWanted) -> list[Tensor]:  # fmt: skip
    """Carries gradients of the statistics back; the products are formed again."""
    walk = Walk(kernels, inputs, wanted)
    asked = [walk.slopes_wanted, walk.columns_wanted, walk.label_wanted]
    rows_found = []
    for chunk in walk.chunks():
        gradients = kernels.softmax.softmax_stats_backward(
            *walk.logit_arguments(chunk),
            chunk.target_override,
            chunk.target_override_grad,
            *(tensor[chunk.rows] for tensor in saved),
            inputs.soft_cap,
            *numbers,
            *(None if tensor is None else tensor[chunk.rows] for tensor in upstream),
            asked,
            in_place=True,
        )
        rows_found.append(walk.take(chunk, gradients))
    found = _joined(rows_found, int(walk.label_wanted), saved[0])
    walk.sums.zero_if_none_came()
    return walk.finish(found[0] if found else None, numbers[-1])


def _joined(parts: list[list[Tensor]], count: int, like: Tensor) -> list[Tensor]:
    return [torch.cat(each) for each in zip(*parts, strict=True)] if parts else [like.new_empty(0)] * count


def denominator(inputs: LinearInputs, ignore_index: int) -> Tensor:
    """What torch's mean divides by, in float64: the target weights of the rows kept, or the rows of soft targets."""
    target = inputs.target
    if target.is_floating_point():
        return torch.full((), float(len(target)), dtype=torch.float64, device=target.device)
    kept = target != ignore_index
    if inputs.class_weight is None:
        return kept.sum().double()
    weight = inputs.class_weight.double()[target.clamp(0, len(inputs.class_weight) - 1)]
    return torch.where(kept, weight, 0.0).sum()
