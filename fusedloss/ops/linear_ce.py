"""Softmax cross-entropy of a linear layer whose logits are never stored whole.

``linear_ce``      loss and its gradients in one walk over chunks or tiles of logits.
``linear_stats``   statistics of each row; ``linear_stats_backward`` forms the logits again and carries their gradients back.
``row_norms``      exact lengths (float64, infinite for a row of zeros); ``target_products`` each row's product with its
                   label's row, or their cosine, in float64. Neither has a gradient: linear_ce's holds it.

All work on ``z = scale * c(x . w) + bias``, where x and w are divided by ``input_norm`` and ``class_norm`` if given and
c is a soft cap or nothing; ``target_override`` stands in for z at the label, ``target_override_grad`` is its slope in the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedloss.backends.chunked.head import LinearInputs
from fusedloss.backends.chunked.linear_ce import LinearWanted
from fusedloss.ops.library import answer, call, differentiable_once, library, scale_in_place
from fusedloss.ops.softmax_ce import RowInputs, RowTensors, SoftmaxOptions, StatisticsOptions

_INPUTS = (
    "Tensor input, Tensor weight, Tensor target, Tensor? input_norm, Tensor? class_norm, Tensor? scale, Tensor? bias,"
    " Tensor? class_weight, Tensor? target_override, Tensor? target_override_grad, Tensor? target_product, float soft_cap"
)
library.define(
    f"linear_ce({_INPUTS}, Tensor? row_smoothing, Tensor? row_scale, Tensor? row_penalty, float smoothing,"
    " float focal_gamma, float z_loss, float penalty_margin, float penalty, float penalty_share, bool penalty_mix,"
    " int ignore_index, bool mean, bool[] wanted) -> (Tensor, Tensor, Tensor[])"
)
library.define(
    f"linear_stats({_INPUTS}, float penalty_margin, int ignore_index, bool want_uniform, bool want_hinge,"
    f" bool want_prediction) -> ({', '.join(['Tensor'] * 10)})"
)
library.define(
    f"linear_stats_backward({_INPUTS}, Tensor row_max, Tensor row_sum, Tensor rest, float penalty_margin, int ignore_index,"
    " Tensor? grad_log_sum_exp, Tensor? grad_target_logit, Tensor? grad_cross_entropy, Tensor? grad_uniform,"
    " Tensor? grad_rest, Tensor? grad_hinge, bool[] wanted) -> Tensor[]"
)
library.define("row_norms(Tensor rows) -> Tensor")
library.define(
    "target_products(Tensor input, Tensor weight, Tensor target, Tensor? input_norm, Tensor? class_norm,"
    " int ignore_index) -> Tensor"
)
for _function in ("linear_ce", "linear_stats", "linear_stats_backward", "row_norms", "target_products"):
    answer("linear_ce", _function)


def _rows(inputs: LinearInputs, dtype: torch.dtype | None = None) -> Tensor:
    return inputs.input.new_empty(len(inputs.input), dtype=dtype or inputs.compute_dtype)


def _gradient_shapes(inputs: LinearInputs, wanted: Sequence[bool]) -> list[Tensor]:
    flags = LinearWanted(*wanted)
    gradients = [torch.empty_like(tensor) for tensor, want in zip(inputs[:2], flags[:2], strict=True) if want]
    classes = inputs.weight.new_empty(len(inputs.weight), dtype=inputs.compute_dtype)
    gradients += [torch.empty_like(classes) for want in flags[2:4] if want]
    return gradients + [_rows(inputs) for want in flags[4:] if want]


@torch.library.register_fake("fusedloss::linear_ce", lib=library)
def _(*arguments):
    inputs, (*_, wanted) = LinearInputs.first_of(arguments)
    loss = inputs.input.new_empty((), dtype=inputs.compute_dtype)
    return loss, _rows(inputs), _gradient_shapes(inputs, wanted)


@torch.library.register_fake("fusedloss::linear_stats", lib=library)
def _(*arguments):
    inputs, (_, _, want_uniform, want_hinge, want_prediction) = LinearInputs.first_of(arguments)
    empty = inputs.input.new_empty(0, dtype=inputs.compute_dtype)
    wanted = (True, True, True, True, True, want_uniform, True, want_hinge, want_prediction)
    *statistics, confidence = (_rows(inputs) if want else empty.clone() for want in wanted)
    prediction = _rows(inputs, torch.int64) if want_prediction else empty.to(torch.int64)
    return *statistics, prediction, confidence


@torch.library.register_fake("fusedloss::linear_stats_backward", lib=library)
def _(*arguments):
    inputs, (*_, wanted) = LinearInputs.first_of(arguments)
    return _gradient_shapes(inputs, wanted)


@torch.library.register_fake("fusedloss::row_norms", lib=library)
def _(rows):
    return rows.new_empty(len(rows), dtype=torch.float64)


@torch.library.register_fake("fusedloss::target_products", lib=library)
def _(input, weight, target, input_norm, class_norm, ignore_index):
    return input.new_empty(len(input), dtype=torch.float64)


def row_norms(rows: Tensor) -> Tensor:
    """Lengths of the rows ``(R, D)`` in float64, infinite for a row of zeros; detached."""
    return call("linear_ce", "row_norms", rows.detach())


def target_products(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    input_norm: Tensor | None,
    class_norm: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """Each row's product with the row of its label (the cosine, with norms) in float64, 0 if ignored; detached."""
    arguments = (input.detach(), weight.detach(), target, input_norm, class_norm, ignore_index)
    return call("linear_ce", "target_products", *arguments)


def linear_ce(inputs: LinearInputs, rows: RowInputs, options: SoftmaxOptions) -> Tensor:
    """The scalar loss, with gradients computed beside it for the inputs that require them."""
    wanted = _wanted(inputs, rows)
    if torch.is_grad_enabled() and (any(wanted) or _requires_grad(rows.scale)):
        return _LinearCE.apply(*inputs, *rows, options)
    return call("linear_ce", "linear_ce", *inputs, *rows, *options, [False] * len(LinearWanted._fields))[0]


class _LinearCE(torch.autograd.Function):
    """The gradients leave with the forward; the first backward hands them on, a later one computes them again."""

    @staticmethod
    def forward(ctx, *arguments):
        inputs, (*per_row, options) = LinearInputs.first_of(arguments)
        ctx.wanted = list(_wanted(inputs, RowInputs(*per_row)))
        loss, row_loss, gradients = call("linear_ce", "linear_ce", *inputs, *per_row, *options, ctx.wanted)
        ctx.soft_cap, ctx.options = inputs.soft_cap, options
        ctx.compiling = torch.compiler.is_compiling()
        if ctx.compiling:
            ctx.save_for_backward(*inputs[:-1], *per_row, row_loss, *gradients)
        else:
            ctx.save_for_backward(*inputs[:-1], *per_row)
            ctx.row_loss, ctx.gradients = row_loss, gradients
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx, upstream):
        saved, count = ctx.saved_tensors, len(LinearInputs._fields) - 1
        tensors, per_row, rest = saved[:count], saved[count : count + 3], saved[count + 3 :]
        if ctx.compiling:
            row_loss, *gradients = rest
            gradients = [gradient * upstream for gradient in gradients]
        else:
            row_loss, gradients = ctx.row_loss, ctx.gradients
            ctx.gradients = None
            if gradients is None:
                arguments = (*tensors, ctx.soft_cap, *per_row, *ctx.options, ctx.wanted)
                gradients = call("linear_ce", "linear_ce", *arguments)[2]
            scale_in_place(gradients, upstream)
        found = _by_name(gradients, ctx.wanted)
        row_scale = row_loss * upstream if ctx.needs_input_grad[count + 2] else None
        return *_of_inputs(found), found.row_smoothing, row_scale, found.row_penalty, None


def linear_stats(inputs: LinearInputs, options: StatisticsOptions) -> RowTensors:
    """The statistics of each row, differentiable in the six that ``rows.Statistics`` names."""
    if torch.is_grad_enabled() and any(_wanted(inputs, RowInputs())):
        return RowTensors(*_LinearStatistics.apply(*inputs, options))
    return RowTensors(*call("linear_ce", "linear_stats", *inputs, *options))


class _LinearStatistics(torch.autograd.Function):
    """Saves two numbers per row; the backward forms the logits again and sweeps them."""

    @staticmethod
    def forward(ctx, *arguments):
        inputs, (options,) = LinearInputs.first_of(arguments)
        found = RowTensors(*call("linear_ce", "linear_stats", *inputs, *options))
        ctx.mark_non_differentiable(found.row_max, found.row_sum, found.prediction, found.confidence)
        ctx.set_materialize_grads(False)
        ctx.soft_cap, ctx.options = inputs.soft_cap, options
        ctx.wanted = list(_wanted(inputs, RowInputs()))
        ctx.save_for_backward(*inputs[:-1], found.row_max, found.row_sum, found.rest)
        return tuple(found)

    @staticmethod
    @differentiable_once
    def backward(ctx, _max, _sum, log_sum_exp, target_logit, cross_entropy, uniform, rest, hinge, _prediction,
                 _confidence):  # fmt: skip
        *tensors, row_max, row_sum, rest_of_row = ctx.saved_tensors
        statistics = (log_sum_exp, target_logit, cross_entropy, uniform, rest, hinge)
        upstream = [None if gradient is None else gradient.contiguous() for gradient in statistics]
        numbers = (ctx.options.penalty_margin, ctx.options.ignore_index)
        saved = (row_max, row_sum, rest_of_row)
        arguments = (*tensors, ctx.soft_cap, *saved, *numbers, *upstream, ctx.wanted)
        found = _by_name(call("linear_ce", "linear_stats_backward", *arguments), ctx.wanted)
        return *_of_inputs(found), None


class _Found(NamedTuple):
    """A gradient for each flag of LinearWanted, None where it is not wanted."""

    input: Tensor | None
    weight: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    target_override: Tensor | None
    row_smoothing: Tensor | None
    row_penalty: Tensor | None


def _by_name(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> _Found:
    found = iter(gradients)
    return _Found(*(next(found) if want else None for want in wanted))


def _of_inputs(found: _Found) -> tuple[Tensor | None, ...]:
    """One per field of LinearInputs."""
    return (
        found.input,
        found.weight,
        None,
        None,
        None,
        found.scale,
        found.bias,
        None,
        found.target_override,
        *(None,) * 3,
    )


def _wanted(inputs: LinearInputs, rows: RowInputs) -> LinearWanted:
    of_inputs = (inputs.input, inputs.weight, inputs.scale, inputs.bias, inputs.target_override)
    return LinearWanted(*map(_requires_grad, (*of_inputs, rows.smoothing, rows.penalty)))


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad
