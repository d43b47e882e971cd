"""linear_ce and its statistics on a GPU: chunks of logits between torch's products."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedloss.backends.chunked import linear_ce as chunked
from fusedloss.core.operands import (
    LinearInputs,
    LinearMask,
    RowInputs,
    SavedStatistics,
    SoftmaxStatistics,
    StatisticsGrads,
    StatisticsOptions,
)
from fusedloss.core.row_loss import RowOptions

from . import linear_rows, softmax_ce
from .launch import contiguous


def linear_ce(
    inputs: LinearInputs, rows: RowInputs, options: RowOptions, mean: bool, mask: LinearMask
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return chunked.linear_ce(_KERNELS, inputs, rows, options, mean, mask)


def linear_stats(inputs: LinearInputs, options: StatisticsOptions) -> SoftmaxStatistics:
    return chunked.linear_stats(_KERNELS, inputs, options)


def linear_stats_backward(
    inputs: LinearInputs, saved: SavedStatistics, penalty_margin: float, grads: StatisticsGrads, mask: LinearMask
) -> list[Tensor]:
    return chunked.linear_stats_backward(_KERNELS, inputs, saved, penalty_margin, grads, mask)


def row_norms(rows: Tensor) -> Tensor:
    return linear_rows.row_norms(rows)


def target_products(inputs: LinearInputs) -> Tensor:
    product = inputs.input.new_empty(len(inputs.input), dtype=torch.float64)
    linear_rows.target_products(_pairs(inputs, product), len(inputs.input))
    return product


def _add_target_grads(inputs: LinearInputs, grad_product: Tensor, input: Tensor | None, weight: Tensor | None) -> None:
    linear_rows.add_label_gradients(_pairs(inputs, inputs.target_product), grad_product.contiguous(), input, weight)


def _pairs(inputs: LinearInputs, product: Tensor | None) -> linear_rows.Pairs:
    labels = _labels(inputs.target, len(inputs.weight), inputs.ignore_index)
    operands = contiguous((inputs.input, inputs.weight, inputs.input_norm, inputs.class_norm, product))
    input, weight, input_norm, class_norm, product = operands
    return linear_rows.Pairs(input, weight, labels, inputs.input.shape[1], input_norm, class_norm, product)


def _labels(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """-1 for ignored rows, and for labels out of range, which the device asserts elsewhere."""
    named = (target != ignore_index) & (target >= 0) & (target < num_classes)
    return torch.where(named, target, -1).contiguous()


_KERNELS = chunked.Kernels(softmax_ce, linear_rows.project_rows, _add_target_grads, lambda fresh: fresh)
