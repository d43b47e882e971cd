"""linear_ce and its statistics on a GPU: chunks of logits between torch's products, or tiles that are never written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedloss.backends.chunked import linear_ce as chunked
from fusedloss.backends.chunked.head import ChunkedHead, LinearInputs
from fusedloss.backends.chunked.linear_ce import LinearWanted
from fusedloss.core.row_loss import Row, Statistics

from . import launch, linear_rows, linear_tiles, softmax_ce
from .linear_tiles import Head, RowCoefficients


def linear_ce(*arguments) -> tuple[Tensor, Tensor, list[Tensor]]:
    inputs, (*rest, wanted) = LinearInputs.first_of(arguments)
    per_row, options, flags = tuple(rest[:3]), tuple(rest[3:]), LinearWanted(*wanted)
    penalised = options[4] != 0 or per_row[2] is not None
    if _tiled(inputs) and not penalised:
        return _tiled_loss(inputs, per_row, options, flags)
    return chunked.linear_ce(_KERNELS, inputs, per_row, options, flags)


def linear_stats(*arguments) -> tuple[Tensor, ...]:
    inputs, options = LinearInputs.first_of(arguments)
    _, ignore_index, want_uniform, want_hinge, want_prediction = options
    if _tiled(inputs) and not want_hinge and not want_prediction:
        return _TiledRows(inputs, ignore_index).statistics(want_uniform)
    return chunked.linear_stats(_KERNELS, inputs, options)


def linear_stats_backward(*arguments) -> list[Tensor]:
    inputs, rest = LinearInputs.first_of(arguments)
    saved, numbers, upstream, flags = rest[:3], rest[3:5], rest[5:11], LinearWanted(*rest[11])
    if _tiled(inputs) and upstream[5] is None:
        return _TiledRows(inputs, numbers[1]).sweep(saved, upstream[:5], flags)
    return chunked.linear_stats_backward(_KERNELS, inputs, saved, numbers, upstream, flags)


def row_norms(rows: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return torch.where(norm == 0, torch.inf, norm)


def target_products(
    input: Tensor, weight: Tensor, target: Tensor, input_norm: Tensor | None, class_norm: Tensor | None,
    ignore_index: int,
) -> Tensor:  # fmt: skip
    product = torch.empty(len(input), dtype=torch.float64, device=input.device)
    linear_rows.target_products(
        _pairs(input, weight, target, ignore_index, input_norm, class_norm, product), len(input)
    )
    return product


def _label_gradients(
    inputs: LinearInputs, ignore_index: int, slope: Tensor, input: Tensor | None, weight: Tensor | None
) -> None:
    norms = (inputs.input_norm, inputs.class_norm)
    pairs = _pairs(inputs.input, inputs.weight, inputs.target, ignore_index, *norms, inputs.target_product)
    linear_rows.add_label_gradients(pairs, slope.contiguous(), input, weight)


def _pairs(
    input: Tensor, weight: Tensor, target: Tensor, ignore_index: int, input_norm: Tensor | None,
    class_norm: Tensor | None, product: Tensor | None,
) -> linear_rows.Pairs:  # fmt: skip
    labels = _labels(target, len(weight), ignore_index)
    norms = (input_norm, class_norm)
    return linear_rows.Pairs(input.contiguous(), weight.contiguous(), labels, input.shape[1], *norms, product)


def _labels(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """-1 for ignored rows, and for labels out of range, which the device asserts elsewhere."""
    named = (target != ignore_index) & (target >= 0) & (target < num_classes)
    return torch.where(named, target, -1).contiguous()


_KERNELS = chunked.Kernels(softmax_ce, linear_rows.project_rows, _label_gradients, lambda fresh: fresh)


def _tiled(inputs: LinearInputs) -> bool:
    if inputs.dtype not in (torch.float16, torch.bfloat16) or inputs.target.is_floating_point():
        return False
    # Five products for three pay while writing and reading a 16-bit logit costs more than forming it twice.
    return inputs.input.shape[1] <= launch.widest_tiled(inputs.dtype) and inputs.soft_cap == 0


class _TiledRows:
    """Statistics of the rows, and gradients from their slopes, by kernels that form logits in tiles."""

    def __init__(self, inputs: LinearInputs, ignore_index: int) -> None:
        self.inputs, self.ignore_index = inputs, ignore_index
        self.head_chunks = ChunkedHead(inputs, lambda fresh: fresh)
        self.kept = inputs.target != ignore_index
        everything = slice(0, len(inputs.input))
        num_classes, width = inputs.weight.shape
        self.label = torch.where(self.kept, inputs.target, 0).clamp(0, num_classes - 1)
        _check_labels(inputs, ignore_index)
        self.head = Head(
            self.head_chunks.rows(everything).contiguous(),
            self.head_chunks.operand.contiguous(),
            len(inputs.input),
            num_classes,
            width,
            _labels(inputs.target, num_classes, ignore_index),
            self.head_chunks.scale,
            inputs.bias,
            inputs.class_weight,
            inputs.target_override,
        )
        class_weight = inputs.class_weight
        self.label_weight = torch.ones_like(self.kept, dtype=torch.float32) if class_weight is None else (
            class_weight[self.label])  # fmt: skip

    def statistics(self, want_uniform: bool) -> tuple[Tensor, ...]:
        """In the order of softmax_stats; hinge, prediction and confidence are empty."""
        inputs, kept = self.inputs, self.kept
        top, rest_sum, uniform_z, label_z = linear_tiles.tile_sums(self.head, want_uniform).double()
        if inputs.target_override is not None:
            label_z = inputs.target_override.double()
        label_z = torch.where(kept, label_z, -torch.inf)
        row_max = torch.maximum(top, label_z)
        shift = torch.where(row_max == -torch.inf, 0.0, row_max)
        # exp(-inf + inf) of a row whose other classes are all masked.
        rest_sum = torch.where(rest_sum == 0, 0.0, rest_sum * (top - shift).exp())
        row_sum = rest_sum + (label_z - shift).exp()
        # A label that is the maximum has exp = 1: log1p keeps the digits of a confident row.
        log_sum = torch.where(label_z == row_max, torch.log1p(rest_sum), row_sum.log())
        lse = shift + log_sum
        cross_entropy = self.label_weight * (log_sum - (label_z - shift))
        found = [row_max, row_sum, lse, label_z, cross_entropy]
        uniform = None
        if want_uniform:
            weight_z = torch.where(self.label_weight == 0, 0.0, self.label_weight * label_z)
            uniform = self.weight_sum() * lse - (uniform_z + weight_z)
        rest = rest_sum / row_sum
        zero = torch.zeros_like(lse)
        found[3:] = [torch.where(kept, value, zero) for value in found[3:]]
        empty = lse.new_empty(0, dtype=torch.float32)
        uniform = empty if uniform is None else torch.where(kept, uniform, zero).float()
        values = [value.float() for value in found]
        return *values, uniform, torch.where(kept, rest, zero).float(), empty, empty.long(), empty.clone()

    def weight_sum(self) -> Tensor | float:
        class_weight = self.inputs.class_weight
        return float(len(self.inputs.weight)) if class_weight is None else class_weight.double().sum()

    def sweep(
        self, saved: tuple[Tensor, ...], upstream: tuple[Tensor | None, ...], wanted: LinearWanted
    ) -> list[Tensor]:
        """The wanted gradients of input, weight, scale, bias and target_override."""
        inputs, head = self.inputs, self.head
        coefficients, label_gradient = self._coefficients(saved, upstream)
        walk = chunked.Walk(_KERNELS, inputs, wanted, self.head_chunks)
        uniform = upstream[3] is not None
        if wanted.input:
            walk.sums.input = linear_tiles.input_gradient(head, coefficients, uniform)
        if wanted.weight or wanted.scale or wanted.bias:
            columns = wanted.scale or wanted.bias
            found = linear_tiles.weight_gradient(head, coefficients, uniform, wanted.weight, columns)
            walk.sums.weight = found[0]
            if wanted.scale:
                walk.scale = found[1].double()  # type: ignore[union-attr]
            if wanted.bias:
                walk.bias = found[2].double()  # type: ignore[union-attr]
        return walk.finish(label_gradient, self.ignore_index)

    def _coefficients(
        self, saved: tuple[Tensor, ...], upstream: tuple[Tensor | None, ...]
    ) -> tuple[RowCoefficients, Tensor]:
        """Twin of SweepRow in csrc/softmax_ce.inl."""
        kept = self.kept
        row_max, row_sum, rest = (tensor.double() for tensor in saved)
        zero = torch.zeros_like(row_max)
        of_lse, logit, cross_entropy, uniform, of_rest = (
            zero if gradient is None else gradient.double() for gradient in upstream
        )
        logit, cross_entropy, uniform, of_rest = (
            torch.where(kept, gradient, zero) for gradient in (logit, cross_entropy, uniform, of_rest)
        )
        p = 1 - rest
        rest_slope = torch.where(torch.isfinite(of_rest), of_rest * p, zero)
        counted = self.label_weight * cross_entropy + rest_slope - logit
        drift = of_lse + uniform * self.weight_sum() + logit
        softmax = counted + drift
        at_label = torch.where(p < 0.5, softmax * p - counted, drift - softmax * rest) - self.label_weight * uniform
        at_label = torch.where(kept, at_label, zero)
        slope = self._label_slope(at_label)
        shift = torch.where(row_max == -torch.inf, 0.0, row_max)
        values = (shift + row_sum.log(), softmax, uniform, slope, at_label)
        return RowCoefficients(*(value.float().contiguous() for value in values)), at_label.float()

    def _label_slope(self, at_label: Tensor) -> Tensor:
        """dL/dproduct of the label as the tiles take it: 0 where it goes beside them."""
        inputs = self.inputs
        if inputs.target_override_grad is not None:
            return torch.zeros_like(at_label) if self.head_chunks.normalized else at_label * inputs.target_override_grad
        return at_label if self.head_chunks.scale is None else at_label * self.head_chunks.scale[self.label]


def _tiled_loss(
    inputs: LinearInputs, per_row: tuple[Tensor | None, ...], options: tuple, wanted: LinearWanted
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss by eager formulas on one value per row; their derivatives are autograd's."""
    smoothing, gamma, z_loss, *_, ignore_index, mean = options
    row_smoothing, row_scale, _ = per_row
    rows = _TiledRows(inputs, ignore_index)
    row = Row(row_smoothing if row_smoothing is not None else smoothing, gamma, z_loss)
    found = [value.detach() for value in rows.statistics(row.smooths)]
    scale = row_scale
    if mean:
        share = chunked.denominator(inputs, ignore_index).reciprocal().float()
        scale = share.expand(len(inputs.input)) if scale is None else scale * share
    with torch.enable_grad():
        fields: dict[str, Any] = dict(zip(("log_sum_exp", "target_logit", "cross_entropy", "uniform", "rest"),
                                          found[2:7], strict=True))  # fmt: skip
        leaves = {
            name: value.requires_grad_() for name, value in fields.items() if value.numel() or not len(inputs.input)
        }
        statistics = Statistics(**fields)
        if row_smoothing is not None:
            leaves["smoothing"] = row_smoothing.detach().requires_grad_()
            row = Row(leaves["smoothing"], gamma, z_loss)
        row_loss = torch.where(rows.kept, row.loss(statistics, len(inputs.weight)), 0.0)
        total = (row_loss if scale is None else row_loss * scale).sum()
        names = list(leaves)
        slopes = dict(zip(names, torch.autograd.grad(total, list(leaves.values()), allow_unused=True), strict=True))
    saved = (found[0], found[1], found[6].detach())
    loss = _mean_or_sum(row_loss.detach(), row_scale, inputs, ignore_index, mean)
    if not any(wanted):
        return loss, row_loss.detach(), []
    upstream = tuple(slopes.get(name) for name in ("log_sum_exp", "target_logit", "cross_entropy", "uniform", "rest"))
    gradients = rows.sweep(saved, upstream, wanted)
    if wanted.row_smoothing:
        gradients.append(slopes["smoothing"])  # type: ignore[arg-type]
    return loss, row_loss.detach(), gradients


def _mean_or_sum(
    row_loss: Tensor, row_scale: Tensor | None, inputs: LinearInputs, ignore_index: int, mean: bool
) -> Tensor:
    total = (row_loss if row_scale is None else row_loss * row_scale).double().sum()
    return (total / chunked.denominator(inputs, ignore_index) if mean else total).float()


def _check_labels(inputs: LinearInputs, ignore_index: int) -> None:
    target = inputs.target
    bad = (target != ignore_index) & ((target < 0) | (target >= len(inputs.weight)))
    torch._assert_async(~bad.any())
