"""What an operation checks at its entry: kernels trust shapes, types and devices."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedloss.core.dtypes import FLOATING, compute_dtype
from fusedloss.core.operands import LinearInputs, LogitInputs


def check_operand(name: str, value: Tensor | None, shape: tuple[object, ...], dtype: torch.dtype, like: Tensor) -> None:
    """ValueError or TypeError unless `value` is None or has this shape and type, on the device of `like`."""
    if value is None:
        return
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {_shown(shape)}; got {_shown(value.shape)}")
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}; got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}; got {value.device}")


def _shown(shape: tuple[object, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def rows_of(logits: Tensor) -> tuple[object, ...]:
    """The shape of one value per row of ``(B, K)`` or ``(B, K, d)`` logits."""
    return (logits.shape[0], *logits.shape[2:])


def check_target(target: Tensor, rows: tuple[object, ...], logits: tuple[object, ...], like: Tensor) -> None:
    """Labels, int64 of the rows' shape, or probabilities of the logits' shape."""
    if target.is_floating_point():
        if target.dtype not in FLOATING:
            raise TypeError(f"target must be int64 labels or floating-point probabilities; got {target.dtype}")
        check_operand("target", target, logits, target.dtype, like)
    else:
        check_operand("target", target, rows, torch.int64, like)


def check_logit_inputs(inputs: LogitInputs) -> None:
    """Raises where the tensors of a softmax operation do not fit each other."""
    logits = inputs.logits
    if logits.dim() not in (2, 3):
        raise ValueError(f"logits must have shape (B, K) or (B, K, d); got {_shown(logits.shape)}")
    if logits.dtype not in FLOATING:
        raise TypeError(f"logits must be float32, float64, bfloat16 or float16; got {logits.dtype}")
    rows, dtype = rows_of(logits), compute_dtype(logits.dtype)
    check_target(inputs.target, rows, tuple(logits.shape), logits)
    for name in ("scale", "bias", "class_weight"):
        check_operand(name, getattr(inputs, name), (logits.shape[1],), dtype, logits)
    for name in ("target_override", "target_override_grad"):
        check_operand(name, getattr(inputs, name), rows, dtype, logits)
    if inputs.target_override is not None and inputs.target.is_floating_point():
        raise ValueError("target_override must be None with probability targets; got a tensor")


def check_row_tensors(logits: Tensor, **values: Tensor | None) -> None:
    """Raises unless each value is None or one number per row, in the compute dtype."""
    rows, dtype = rows_of(logits), compute_dtype(logits.dtype)
    for name, value in values.items():
        check_operand(name, value, rows, dtype, logits)


def check_linear_inputs(inputs: LinearInputs) -> None:
    """Raises where the tensors of a linear operation do not fit each other."""
    x, weight, dtype = inputs.input, inputs.weight, inputs.compute_dtype
    for name, value in (("input", x), ("weight", weight)):
        if value.dim() != 2:
            raise ValueError(f"{name} must have two dimensions; got shape {_shown(value.shape)}")
        if value.dtype not in FLOATING:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16; got {value.dtype}")
    rows, classes = x.shape[0], weight.shape[0]
    check_operand("weight", weight, (classes, x.shape[1]), weight.dtype, x)
    check_target(inputs.target, (rows,), (rows, classes), x)
    check_operand("input_norm", inputs.input_norm, (rows,), torch.float64, x)
    check_operand("class_norm", inputs.class_norm, (classes,), torch.float64, x)
    if (inputs.input_norm is None) != (inputs.class_norm is None):
        raise ValueError("input_norm and class_norm must come together; got one of them")
    for name in ("scale", "bias", "class_weight"):
        check_operand(name, getattr(inputs, name), (classes,), dtype, x)
    check_operand("target_override", inputs.target_override, (rows,), dtype, x)
    for name in ("target_override_grad", "target_product"):
        check_operand(name, getattr(inputs, name), (rows,), torch.float64, x)
    if inputs.target_override is not None and inputs.target.is_floating_point():
        raise ValueError("target_override must be None with probability targets; got a tensor")


def check_linear_row_tensors(inputs: LinearInputs, **values: Tensor | None) -> None:
    """Raises unless each value is None or one number per row, in the compute dtype."""
    for name, value in values.items():
        check_operand(name, value, (inputs.input.shape[0],), inputs.compute_dtype, inputs.input)
