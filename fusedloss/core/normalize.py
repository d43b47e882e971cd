"""Rows of length 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def unit_rows(rows: Tensor) -> Tensor:
    """Each row of ``(R, D)`` over its length, in the rows' type; a row of zeros stays and gets gradient 0.

    Rows near the limits of their type are as good as any; squares are summed in float64. Differentiable any number of
    times.
    """
    # The length of a float16 row may be no float16.
    wide = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    if torch.compiler.is_compiling():
        # A graph plans its own memory; an exported one would lose the derivative of a Function.
        scale, length = _scale_and_length(wide)
        return (wide / scale / length).to(rows.dtype)
    function = _BatchedUnitRows if torch._C._are_functorch_transforms_active() else _UnitRows
    unit: Tensor = function.apply(wide)[0]
    return unit.to(rows.dtype)


class _UnitRows(torch.autograd.Function):
    """``u = x / (scale * length)`` with the scale a power of two and the length an ordinary number.

    Keeps `u` and two numbers per row. The length is an output too, so that second derivatives flow through it.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output = _unit_length_scale(rows)
        _save(ctx, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_unit: Tensor | None, grad_length: Tensor | None, _: None) -> Tensor | None:
        unit, length, scale = ctx.saved_tensors
        grad = None
        if grad_unit is not None:
            along = (unit * grad_unit).sum(1, keepdim=True)
            across = torch.addcmul(grad_unit, unit, along, value=-1)
            # In place where no graph is kept.
            grad = across / length / scale if torch.is_grad_enabled() else across.div_(length).div_(scale)
        if grad_length is not None:
            of_length = unit * (grad_length / scale)
            grad = of_length if grad is None else grad + of_length
        return grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, length, scale = ctx.saved_tensors
        along = (unit * tangent).sum(1, keepdim=True)
        return torch.addcmul(tangent, unit, along, value=-1) / length / scale, along / scale, None


class _BatchedUnitRows(_UnitRows):
    """The same for torch.func, in the form that it asks for, which makes a small call 30 us slower."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        return _unit_length_scale(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _save(ctx, output)


def _save(ctx: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output)
    ctx.save_for_forward(*output)


def _unit_length_scale(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale, length = _scale_and_length(rows)
    unit = rows / scale
    return unit.div_(length), length, scale


def _scale_and_length(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``(R, 1)`` each: a power of two, constant for autograd, and each row's length over it, infinite for zeros."""
    if rows.dtype == torch.float32:
        # Squares of float32 fit in float64, all of them.
        whole = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
        scale = _power_of_two(whole.detach(), 126)
        length = whole / scale
    else:
        constant = rows.detach()
        largest = constant.abs().amax(1, keepdim=True) if rows.shape[1] else constant.sum(1, keepdim=True)
        scale = _power_of_two(largest, 1022)
        length = torch.linalg.vector_norm(rows / scale, dim=1, keepdim=True)
    # Over an infinite length, a row of zeros and its gradient are 0.
    return scale.to(rows.dtype), length.masked_fill(length == 0, torch.inf).to(rows.dtype)


def _power_of_two(values: Tensor, limit: int) -> Tensor:
    """The power of two below each value, as far as it and its reciprocal are ordinary numbers."""
    return values.log2().floor().clamp(-limit, limit).exp2()
