"""softmax_ce, softmax_stats and softmax_sweep on the CPU: outputs allocated here, filled by csrc/softmax_ce.inl."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedloss.backends.cpp import extension
from fusedloss.backends.cpp.views import address, rows_view


def softmax_ce(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    class_weight: Tensor | None,
    row_smoothing: Tensor | None,
    row_scale: Tensor | None,
    smoothing: float,
    focal_gamma: float,
    z_loss: float,
    ignore_index: int,
    mean: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dtype = _compute_dtype(logits)
    target, inputs = _inputs(logits, target, scale, bias, class_weight, ignore_index)
    loss = torch.empty((), dtype=dtype)
    row_loss = torch.empty(_rows_shape(logits), dtype=dtype)
    gradients, places = _gradients(logits, wanted, dtype)
    slope = torch.empty_like(row_loss) if wanted[2] else None
    extension.softmax_ce(
        inputs,
        (smoothing, address(row_smoothing), focal_gamma, z_loss, address(row_scale), mean),
        (loss.data_ptr(), row_loss.data_ptr(), address(slope)),
        places,
        torch.get_num_threads(),
    )
    if slope is not None:
        gradients.append(slope)
    return loss, row_loss, gradients


def softmax_stats(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    want_uniform: bool,
    want_prediction: bool,
) -> tuple[Tensor, ...]:
    _, inputs = _inputs(logits, target, scale, bias, class_weight, ignore_index)
    shape = _rows_shape(logits)
    dtype = _compute_dtype(logits)
    row_max, row_sum, log_sum_exp, target_logit, cross_entropy, rest = (
        torch.empty(shape, dtype=dtype) for _ in range(6)
    )
    uniform = torch.empty(shape if want_uniform else 0, dtype=dtype)
    prediction = torch.empty(shape if want_prediction else 0, dtype=torch.int64)
    outputs = (row_max, row_sum, log_sum_exp, target_logit, cross_entropy, uniform, rest, prediction)
    wanted = (True, True, True, True, True, want_uniform, True, want_prediction)
    places = tuple(address(tensor) if want else 0 for tensor, want in zip(outputs, wanted, strict=True))
    extension.softmax_stats(inputs, places, torch.get_num_threads())
    return outputs


def softmax_sweep(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    class_weight: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    rest: Tensor,
    ignore_index: int,
    grad_log_sum_exp: Tensor | None,
    grad_target_logit: Tensor | None,
    grad_cross_entropy: Tensor | None,
    grad_uniform: Tensor | None,
    grad_rest: Tensor | None,
    wanted: list[bool],
) -> list[Tensor]:
    _, inputs = _inputs(logits, target, scale, bias, class_weight, ignore_index)
    gradients, places = _gradients(logits, wanted, _compute_dtype(logits))
    upstream = (grad_log_sum_exp, grad_target_logit, grad_cross_entropy, grad_uniform, grad_rest)
    extension.softmax_sweep(
        inputs,
        (row_max.data_ptr(), row_sum.data_ptr(), rest.data_ptr()),
        tuple(map(address, upstream)),
        places,
        torch.get_num_threads(),
    )
    return gradients


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _rows_shape(logits: Tensor) -> tuple[int, ...]:
    return (logits.shape[0],) if logits.dim() == 2 else (logits.shape[0], logits.shape[2])


def _inputs(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, tuple]:
    """The target as the kernels take it (keep it alive), and the tuple that bind_softmax_ce.cpp unpacks."""
    if target.is_floating_point():
        if target.dtype != logits.dtype and torch.float64 in (target.dtype, logits.dtype):
            target = target.to(logits.dtype)
        where: tuple | int | None = rows_view(target)
    else:
        target = target.contiguous()
        where = target.data_ptr()
    return target, (rows_view(logits), where, address(scale), address(bias), address(class_weight), ignore_index)


def _gradients(logits: Tensor, wanted: list[bool], dtype: torch.dtype) -> tuple[list[Tensor], tuple]:
    gradients: list[Tensor] = []
    gradient = scale = bias = None
    if wanted[0]:
        gradient = torch.empty_like(logits)
        gradients.append(gradient)
    if wanted[1]:
        scale, bias = (torch.empty(logits.shape[1], dtype=dtype) for _ in range(2))
        gradients += [scale, bias]
    return gradients, (rows_view(gradient), address(scale), address(bias))
