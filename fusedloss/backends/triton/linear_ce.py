"""linear_ce and its statistics on a GPU: chunks of logits between torch's products, or tiles that are never written."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedloss.backends.chunked import linear_ce as chunked
from fusedloss.backends.chunked.head import ChunkedHead
from fusedloss.core.operands import (
    LinearInputs,
    LinearMask,
    RowInputs,
    SavedStatistics,
    SoftmaxStatistics,
    StatisticsGrads,
    StatisticsOptions,
)
from fusedloss.core.reduce import mean_denominator
from fusedloss.core.row_loss import RowOptions, Statistics, needs_hinge, needs_smooth_loss, row_loss

from . import launch, linear_rows, linear_tiles, softmax_ce
from .launch import contiguous
from .linear_coefficients import row_coefficients
from .linear_tiles import Head


def linear_ce(
    inputs: LinearInputs, rows: RowInputs, options: RowOptions, mean: bool, mask: LinearMask
) -> tuple[Tensor, Tensor, list[Tensor]]:
    if _tiled(inputs) and not needs_hinge(options, rows):
        return _tiled_loss(inputs, rows, options, mean, mask)
    return chunked.linear_ce(_KERNELS, inputs, rows, options, mean, mask)


def linear_stats(inputs: LinearInputs, options: StatisticsOptions) -> SoftmaxStatistics:
    if _tiled(inputs) and not options.hinge and not options.prediction:
        return _TiledRows(inputs).statistics(options.smooth_loss)
    return chunked.linear_stats(_KERNELS, inputs, options)


def linear_stats_backward(
    inputs: LinearInputs, saved: SavedStatistics, penalty_margin: float, grads: StatisticsGrads, mask: LinearMask
) -> list[Tensor]:
    if _tiled(inputs) and grads.hinge is None:
        return _TiledRows(inputs).backward(saved, grads, mask)
    return chunked.linear_stats_backward(_KERNELS, inputs, saved, penalty_margin, grads, mask)


def row_norms(rows: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return torch.where(norm == 0, torch.inf, norm)


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


def _tiled(inputs: LinearInputs) -> bool:
    if inputs.dtype not in (torch.float16, torch.bfloat16) or inputs.target.is_floating_point():
        return False
    # Five products for three pay while writing and reading a 16-bit logit costs more than forming it twice.
    return inputs.input.shape[1] <= launch.widest_tiled(inputs.dtype, inputs.input.device) and inputs.soft_cap == 0


class _TiledRows:
    """Statistics of the rows, and gradients from those of the statistics, by kernels that form logits in tiles."""

    def __init__(self, inputs: LinearInputs) -> None:
        self.inputs = inputs
        self.head_chunks = ChunkedHead(inputs, lambda fresh: fresh)
        self.kept = inputs.target != inputs.ignore_index
        num_classes, width = inputs.weight.shape
        _check_labels(inputs)
        operands = (self.head_chunks.rows(slice(0, len(inputs.input))), self.head_chunks.operand)
        labels = _labels(inputs.target, num_classes, inputs.ignore_index)
        values = (self.head_chunks.scale, inputs.bias, inputs.class_weight, inputs.target_override)
        sizes = (len(inputs.input), num_classes, width)
        self.head = Head(*(*contiguous(operands), *sizes, labels, *contiguous(values)))
        label = torch.where(self.kept, inputs.target, 0).clamp(0, num_classes - 1)
        class_weight = inputs.class_weight
        self.label_weight = (
            torch.ones_like(self.kept, dtype=torch.float32) if class_weight is None else class_weight[label]
        )

    def statistics(self, smooth: bool) -> SoftmaxStatistics:
        """Without hinge, prediction and confidence."""
        inputs, kept = self.inputs, self.kept
        top, others, smooth_z, label_z = linear_tiles.tile_sums(self.head, smooth).double()
        if inputs.target_override is not None:
            label_z = inputs.target_override.double()
        label_z = torch.where(kept, label_z, -torch.inf)
        row_max = torch.maximum(top, label_z)
        shift = torch.where(row_max == -torch.inf, 0.0, row_max)
        # exp(-inf + inf) of a row whose other classes are all masked.
        others = torch.where(others == 0, 0.0, others * (top - shift).exp())
        row_sum = others + (label_z - shift).exp()
        # A label that is the maximum has exp = 1: log1p keeps the digits of a confident row.
        log_sum = torch.where(label_z == row_max, torch.log1p(others), row_sum.log())
        lse = shift + log_sum
        cross_entropy = self.label_weight * (log_sum - (label_z - shift))
        of_label = [label_z, cross_entropy, others / row_sum]
        if smooth:
            weight_z = torch.where(self.label_weight == 0, 0.0, self.label_weight * label_z)
            total = self.weight_sum()
            of_label.append((len(inputs.weight) if total is None else total) * lse - (smooth_z + weight_z))
        label_z, cross_entropy, one_minus_pt, *smooth_loss = (
            torch.where(kept, value, 0.0).float() for value in of_label
        )
        empty = lse.new_empty(0, dtype=torch.float32)
        return SoftmaxStatistics(
            row_max.float(),
            row_sum.float(),
            lse.float(),
            label_z,
            cross_entropy,
            smooth_loss[0] if smooth else empty,
            one_minus_pt,
            hinge=empty.clone(),
            prediction=empty.long(),
            confidence=empty.clone(),
        )

    def weight_sum(self) -> Tensor | None:
        """Of the classes' weights; None where each is 1."""
        class_weight = self.inputs.class_weight
        return None if class_weight is None else class_weight.double().sum()

    def backward(self, saved: SavedStatistics, grads: StatisticsGrads, mask: LinearMask) -> list[Tensor]:
        """The gradients of input, weight, scale, bias and target_override that `mask` names."""
        inputs, head, smooth = self.inputs, self.head, grads.smooth_loss is not None
        # The gradient of a cosine under a margin goes beside the tiles: see chunked.Walk.
        override_grad = None if self.head_chunks.normalized else inputs.target_override_grad
        weight_sum = self.weight_sum() if smooth else None
        coefficients = row_coefficients(head, saved, grads, weight_sum, override_grad)
        walk = chunked.Walk(_KERNELS, inputs, mask, self.head_chunks)
        if mask.input:
            walk.sums.input = linear_tiles.grad_input(head, coefficients, smooth)
        if mask.weight or mask.scale or mask.bias:
            columns = mask.scale or mask.bias
            walk.sums.weight, scale, bias = linear_tiles.grad_weight(head, coefficients, smooth, mask.weight, columns)
            if mask.scale:
                walk.scale = scale.double()  # type: ignore[union-attr]
            if mask.bias:
                walk.bias = bias.double()  # type: ignore[union-attr]
        walk.sums.started = True
        return walk.finish(coefficients.target)


def _tiled_loss(
    inputs: LinearInputs, rows: RowInputs, options: RowOptions, mean: bool, mask: LinearMask
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss by the eager formula on one value per row; its partial derivatives are autograd's."""
    tiled = _TiledRows(inputs)
    result = tiled.statistics(needs_smooth_loss(options, rows))
    total = mean_denominator(inputs.target, inputs.class_weight, inputs.ignore_index) if mean else None
    weight = rows.sample_weight
    if total is not None:
        share = total.reciprocal().float()
        weight = share.expand(len(inputs.input)) if weight is None else weight * share
    names = ("log_sum_exp", "target_logit", "cross_entropy", "smooth_loss", "one_minus_pt")
    with torch.enable_grad():
        leaves = {name: getattr(result, name).detach() for name in names}
        leaves = {
            name: value.requires_grad_() for name, value in leaves.items() if value.numel() or not len(tiled.kept)
        }
        statistics = Statistics(**{"smooth_loss": None, **leaves})
        smoothing = None if rows.label_smoothing is None else rows.label_smoothing.detach().requires_grad_()
        values = row_loss(statistics, options, rows._replace(label_smoothing=smoothing), len(inputs.weight))
        values = torch.where(tiled.kept, values, 0.0)
        scaled = (values if weight is None else values * weight).sum()
        if smoothing is not None:
            leaves["label_smoothing"] = smoothing
        partials = torch.autograd.grad(scaled, list(leaves.values()), allow_unused=True)
        grads = dict(zip(leaves, partials, strict=True))
    of_rows = values.detach()
    wide = (of_rows if rows.sample_weight is None else of_rows * rows.sample_weight).double().sum()
    loss = (wide if total is None else wide / total).float()
    if not any(mask):
        return loss, of_rows, []
    saved = SavedStatistics(result.row_max, result.row_sum, result.one_minus_pt)
    of_inputs = tiled.backward(saved, StatisticsGrads(*(grads.get(name) for name in names)), mask)
    if mask.label_smoothing:
        of_inputs.append(grads["label_smoothing"])
    return loss, of_rows, of_inputs


def _check_labels(inputs: LinearInputs) -> None:
    target = inputs.target
    bad = (target != inputs.ignore_index) & ((target < 0) | (target >= len(inputs.weight)))
    torch._assert_async(~bad.any())
