"""Supervised contrast of rows with each other, forward and backward without the matrix of similarities.

``supcon_stats``  the loss of each anchor; ``supcon_backward`` carries any gradient of it back.

Both read ``core.operands.SupConInputs``; a schema names its fields one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedloss.core.dtypes import compute_dtype
from fusedloss.core.operands import AnchorSums, SavedAnchors, SupConInputs, SupConMask
from fusedloss.ops.checks import check_operand
from fusedloss.ops.library import (
    define,
    differentiable_once,
    is_direct,
    kernel,
    refuse_batched,
    refuse_second,
    register_autograd,
)

_INPUTS = (
    "Tensor features, Tensor codes, Tensor? mask, Tensor? weights, Tensor per_positive, Tensor temperature,"
    " SymInt num_grad_rows, bool normalized, Tensor? norms"
)
_NUM_INPUTS = len(SupConInputs._fields)
_NUM_TENSORS = _NUM_INPUTS - 2
_HALF = (torch.bfloat16, torch.float16)


def _check_inputs(inputs: SupConInputs) -> None:
    features, mask = inputs.features, inputs.mask
    if features.dim() != 2:
        raise ValueError(f"features must have shape (M, D); got {tuple(features.shape)}")
    if features.dtype not in (torch.float32, torch.float64, *_HALF):
        raise TypeError(f"features must be float32 or float64, or 16 bits with norms; got {features.dtype}")
    rows, dtype = features.shape[0], compute_dtype(features.dtype)
    if (inputs.norms is None) == (features.dtype in _HALF):
        given = "None" if inputs.norms is None else "a tensor"
        raise ValueError(f"norms must be given with 16-bit features alone; got {given} with {features.dtype}")
    check_operand("norms", inputs.norms, (rows,), torch.float64, features)
    if inputs.norms is not None and not inputs.normalized:
        raise ValueError("normalized must be True with norms; got False")
    check_operand("codes", inputs.codes, (rows,), torch.int32, features)
    check_operand("weights", inputs.weights, (3, rows), dtype, features)
    check_operand("temperature", inputs.temperature, (), dtype, features)
    if inputs.per_positive.dim() != 1 or inputs.per_positive.shape[0] > rows:
        got = tuple(inputs.per_positive.shape)
        raise ValueError(f"per_positive must have shape (A,) with A at most {rows}, the rows of features; got {got}")
    check_operand("per_positive", inputs.per_positive, (inputs.per_positive.shape[0],), dtype, features)
    if not 0 <= inputs.num_grad_rows <= rows:
        raise ValueError(f"num_grad_rows must be between 0 and {rows}; got {inputs.num_grad_rows}")
    if mask is not None:
        samples = mask.shape[0] if mask.dim() else 0
        check_operand("mask", mask, (samples, samples), torch.bool, features)
        if samples == 0 and rows == 0:
            return
        if samples == 0 or rows % samples or inputs.num_anchors % samples:
            raise ValueError(
                f"mask must have shape (B, B) where {rows} rows and {inputs.num_anchors} anchors are multiples of B; "
                f"got {tuple(mask.shape)}"
            )


def _tensors(inputs: SupConInputs) -> tuple[Tensor | None, ...]:
    # By name: torch.compile of torch 2.8 can't trace a slice or a property of a named tuple.
    return (
        inputs.features,
        inputs.codes,
        inputs.mask,
        inputs.weights,
        inputs.per_positive,
        inputs.temperature,
        inputs.norms,
    )


def _new_rows(inputs: SupConInputs) -> Tensor:
    return inputs.per_positive.new_empty(inputs.num_anchors)


define(
    "supcon",
    f"supcon_stats({_INPUTS}=None) -> (Tensor, Tensor, Tensor)",
    group=lambda *flat: (SupConInputs(*flat),),
    check=_check_inputs,
    fake=lambda inputs: tuple(_new_rows(inputs) for _ in AnchorSums._fields),
)


def supcon_stats(inputs: SupConInputs) -> AnchorSums:
    """The loss of each anchor, differentiable in features and temperature."""
    if not is_direct(*_tensors(inputs)):
        return AnchorSums(*torch.ops.fusedloss.supcon_stats.default(*inputs))
    if torch.is_grad_enabled() and (inputs.features.requires_grad or inputs.temperature.requires_grad):
        return AnchorSums(*_SupConStats.apply(*inputs))
    return AnchorSums(*kernel("supcon", "supcon_stats", inputs.features.device.type)(inputs))


class _SupConStats(torch.autograd.Function):
    """Saves two numbers per anchor; the backward computes the similarities again."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> tuple[Tensor, ...]:
        inputs = SupConInputs(*flat)
        output = tuple(kernel("supcon", "supcon_stats", inputs.features.device.type)(inputs))
        _setup_stats(ctx, flat, output)
        return output

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return _backward_stats(ctx, *grads)


def _setup_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, sums = SupConInputs(*inputs), AnchorSums(*output)
    ctx.mark_non_differentiable(sums.shift, sums.sum)
    ctx.set_materialize_grads(False)
    ctx.numbers = (given.num_grad_rows, given.normalized)
    ctx.save_for_backward(*_tensors(given), sums.shift, sums.sum)


def _backward_stats(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> Any:
    need = ctx.needs_input_grad
    mask = SupConMask(need[0], need[5])
    features = temperature = None
    if grad_loss is not None:
        refuse_batched(grad_loss)
        *tensors, norms = ctx.saved_tensors[:_NUM_TENSORS]
        inputs = SupConInputs._make((*tensors, *ctx.numbers, norms))
        saved = SavedAnchors(*ctx.saved_tensors[_NUM_TENSORS:])
        grads = iter(supcon_backward(inputs, saved, grad_loss.contiguous(), mask))
        features = next(grads) if mask.features else None
        temperature = next(grads) if mask.temperature else None
    return features, None, None, None, None, temperature, None, None, None


register_autograd("supcon_stats", _setup_stats, _backward_stats)


def _group_backward(*flat: Any) -> tuple[Any, ...]:
    shift, total, grad_loss, mask = flat[_NUM_INPUTS:]
    return SupConInputs(*flat[:_NUM_INPUTS]), SavedAnchors(shift, total), grad_loss, SupConMask(*mask)


def _check_backward(inputs: SupConInputs, saved: SavedAnchors, grad_loss: Tensor, mask: Sequence[bool]) -> None:
    _check_inputs(inputs)
    for name, value in (("row_shift", saved.shift), ("row_sum", saved.sum), ("grad_loss", grad_loss)):
        check_operand(name, value, tuple(inputs.per_positive.shape), inputs.per_positive.dtype, inputs.features)


def _new_grads(inputs: SupConInputs, mask: SupConMask) -> list[Tensor]:
    grads = [inputs.features.new_empty(inputs.features.shape)] if mask.features else []
    return [*grads, inputs.per_positive.new_empty(())] if mask.temperature else grads


define(
    "supcon",
    f"supcon_backward({_INPUTS}, Tensor row_shift, Tensor row_sum, Tensor grad_loss, bool[] output_mask) -> Tensor[]",
    group=_group_backward,
    check=_check_backward,
    fake=lambda inputs, saved, grad_loss, mask: _new_grads(inputs, mask),
)
refuse_second("supcon_backward")


def supcon_backward(inputs: SupConInputs, saved: SavedAnchors, grad_loss: Tensor, mask: SupConMask) -> list[Tensor]:
    """The gradients that `mask` names, from those of the losses; rows from ``num_grad_rows`` on have zeros."""
    # With a graph asked for, the dispatcher's refusal of second derivatives is recorded.
    if torch.is_grad_enabled() or not is_direct(*_tensors(inputs), *saved, grad_loss):
        run: Callable[..., list[Tensor]] = torch.ops.fusedloss.supcon_backward.default
        return run(*inputs, *saved, grad_loss, list(mask))
    direct: Callable[..., list[Tensor]] = kernel("supcon", "supcon_backward", inputs.features.device.type)
    return direct(inputs, saved, grad_loss, mask)
