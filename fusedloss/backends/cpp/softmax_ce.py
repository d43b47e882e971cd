"""softmax_ce, softmax_stats and softmax_stats_backward on the CPU: outputs allocated here, filled by csrc/softmax_ce.inl."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedloss.backends.cpp import extension
from fusedloss.backends.cpp.views import address, compute_dtype, rows_view


def softmax_ce(
    logits: Tensor, target: Tensor, scale: Tensor | None, bias: Tensor | None, class_weight: Tensor | None,
    target_override: Tensor | None, target_override_grad: Tensor | None, row_smoothing: Tensor | None, row_scale: Tensor | None,
    row_penalty: Tensor | None, soft_cap: float, smoothing: float, focal_gamma: float, z_loss: float,
    penalty_margin: float, penalty: float, penalty_share: float, penalty_mix: bool, ignore_index: int, mean: bool,
    wanted: list[bool], gradient_scale: float = 1.0, in_place: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    dtype = compute_dtype(logits)
    target, inputs = _inputs(
        logits, target, scale, bias, class_weight, ignore_index, soft_cap, target_override, target_override_grad
    )
    loss = torch.empty((), dtype=dtype)
    row_loss = torch.empty(_rows_shape(logits), dtype=dtype)
    gradients, places = _gradients(logits, wanted, dtype, in_place)
    per_row: list[Tensor | None] = [None, None, None]
    if True in wanted[2:]:
        per_row = [torch.empty_like(row_loss) if want else None for want in wanted[2:]]
    smoothing_slope, label_gradient, penalty_slope = per_row
    extension.softmax_ce(
        inputs,
        (
            smoothing, address(row_smoothing), focal_gamma, z_loss, address(row_scale), mean,
            address(row_penalty), penalty, penalty_margin, penalty_share, penalty_mix, gradient_scale,
        ),
        (
            loss.data_ptr(), row_loss.data_ptr(), address(smoothing_slope), address(label_gradient),
            address(penalty_slope),
        ),
        places,
        torch.get_num_threads(),
    )  # fmt: skip
    gradients += [found for found in per_row if found is not None]
    return loss, row_loss, gradients


def softmax_stats(
    logits: Tensor, target: Tensor, scale: Tensor | None, bias: Tensor | None, class_weight: Tensor | None,
    target_override: Tensor | None, soft_cap: float, penalty_margin: float, ignore_index: int, want_uniform: bool,
    want_hinge: bool, want_prediction: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    _, inputs = _inputs(logits, target, scale, bias, class_weight, ignore_index, soft_cap, target_override, None)
    shape = _rows_shape(logits)
    dtype = compute_dtype(logits)
    wanted = (True, True, True, True, True, want_uniform, True, want_hinge, want_prediction)
    rows = [torch.empty(shape if want else 0, dtype=dtype) for want in wanted]
    prediction = torch.empty(shape if want_prediction else 0, dtype=torch.int64)
    places = [address(tensor) if want else 0 for tensor, want in zip(rows, wanted, strict=True)]
    places.append(prediction.data_ptr() if want_prediction else 0)
    extension.softmax_stats(inputs, penalty_margin, tuple(places), torch.get_num_threads())
    *statistics, confidence = rows
    return *statistics, prediction, confidence


def softmax_stats_backward(
    logits: Tensor, target: Tensor, scale: Tensor | None, bias: Tensor | None, class_weight: Tensor | None,
    target_override: Tensor | None, target_override_grad: Tensor | None, row_max: Tensor, row_sum: Tensor, rest: Tensor,
    soft_cap: float, penalty_margin: float, ignore_index: int, grad_log_sum_exp: Tensor | None,
    grad_target_logit: Tensor | None, grad_cross_entropy: Tensor | None, grad_uniform: Tensor | None,
    grad_rest: Tensor | None, grad_hinge: Tensor | None, wanted: list[bool], in_place: bool = False,
) -> list[Tensor]:  # fmt: skip
    _, inputs = _inputs(
        logits, target, scale, bias, class_weight, ignore_index, soft_cap, target_override, target_override_grad
    )
    gradients, places = _gradients(logits, wanted, compute_dtype(logits), in_place)
    label_gradient = torch.empty_like(row_max) if wanted[2] else None
    upstream = (grad_log_sum_exp, grad_target_logit, grad_cross_entropy, grad_uniform, grad_rest, grad_hinge)
    extension.softmax_stats_backward(
        inputs,
        penalty_margin,
        (row_max.data_ptr(), row_sum.data_ptr(), rest.data_ptr()),
        tuple(map(address, upstream)),
        (*places, address(label_gradient)),
        torch.get_num_threads(),
    )
    return gradients if label_gradient is None else [*gradients, label_gradient]


def _rows_shape(logits: Tensor) -> tuple[int, ...]:
    return (logits.shape[0],) if logits.dim() == 2 else (logits.shape[0], logits.shape[2])


def _inputs(
    logits: Tensor, target: Tensor, scale: Tensor | None, bias: Tensor | None, class_weight: Tensor | None,
    ignore_index: int, soft_cap: float, target_override: Tensor | None, target_override_grad: Tensor | None,
) -> tuple[Tensor, tuple]:  # fmt: skip
    """The target as the kernels take it (keep it alive), and the tuple that bind_softmax_ce.cpp unpacks."""
    if target_override is not None:
        _check_per_row("target_override", target_override, logits)
    if target_override_grad is not None:
        _check_per_row("target_override_grad", target_override_grad, logits)
    if target.is_floating_point():
        if target.dtype != logits.dtype and torch.float64 in (target.dtype, logits.dtype):
            target = target.to(logits.dtype)
        where: tuple | int | None = rows_view(target)
    else:
        target = target.contiguous()
        where = target.data_ptr()
    return target, (
        rows_view(logits), where, address(scale), address(bias), address(class_weight),
        ignore_index, soft_cap, address(target_override), address(target_override_grad),
    )  # fmt: skip


def _check_per_row(name: str, given: Tensor, logits: Tensor) -> None:
    if given.shape != _rows_shape(logits):
        raise ValueError(f"{name} must have shape {_rows_shape(logits)}; got {tuple(given.shape)}")


def _gradients(logits: Tensor, wanted: list[bool], dtype: torch.dtype, in_place: bool) -> tuple[list[Tensor], tuple]:
    """Where gradients are written, `in_place` over the logits, and what bind_softmax_ce.cpp unpacks."""
    gradients: list[Tensor] = []
    gradient = scale = bias = None
    if wanted[0]:
        gradient = logits if in_place else torch.empty_like(logits)
        gradients.append(gradient)
    if wanted[1]:
        scale, bias = (torch.empty(logits.shape[1], dtype=dtype) for _ in range(2))
        gradients += [scale, bias]
    return gradients, (rows_view(gradient), address(scale), address(bias))
