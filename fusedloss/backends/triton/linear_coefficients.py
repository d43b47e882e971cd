"""Coefficients of a tiled head's gradient, from saved statistics of its rows and gradients of these."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedloss.core.operands import SavedStatistics, StatisticsGrads

from . import launch
from .blocks import Label, Rows, spec_of
from .linear_tiles import Head, RowCoefficients
from .row_loss import grad_coefficients
from .softmax_rows import BackwardTensors, saved_statistics, store_rows, upstream_partials


@triton.jit
def coefficient_kernel(head, saved, outputs, override_grad, spec):
    """GradCoefficients in double, rounded once; a label's gradient reaches its product through scale or override."""
    index = tl.program_id(0).to(tl.int64) * spec.rows + tl.arange(0, spec.rows)
    rows = Rows(index, index, index, index < head.rows)
    none = tl.zeros([spec.rows], spec.dtype)
    place = tl.load(head.labels + index, mask=rows.valid, other=-1)
    kept = place >= 0
    weight = kept.to(spec.dtype)
    if head.class_weight is not None:
        weight = tl.load(head.class_weight + place, mask=kept, other=0.0).to(spec.dtype)
    label = Label(place.to(tl.int32), none, weight, kept, none != 0, none, none)
    statistics = saved_statistics(rows, label, none, head.classes, saved, spec, False)
    partials = upstream_partials(rows, kept, saved, spec)
    coefficients = grad_coefficients(partials, statistics, None, label, rows.valid, spec)
    of_product = coefficients.target
    if head.target_override is not None:
        of_product = none
        if override_grad is not None:
            of_product = coefficients.target * tl.load(override_grad + index, mask=kept, other=0.0)
    elif head.scale is not None:
        of_product = coefficients.target * tl.load(head.scale + place, mask=kept, other=0.0)
    store_rows(outputs.shift, coefficients.shift, rows, rows.valid)
    store_rows(outputs.softmax, coefficients.softmax, rows, rows.valid)
    store_rows(outputs.smooth_loss, coefficients.smooth_loss, rows, rows.valid)
    store_rows(outputs.target, coefficients.target, rows, kept)
    store_rows(outputs.target_product, of_product, rows, kept)


def row_coefficients(
    head: Head, saved: SavedStatistics, grads: StatisticsGrads, weight_sum: Tensor | None, override_grad: Tensor | None
) -> RowCoefficients:
    """`override_grad` is d target_override / d product, float64, or None where no gradient goes that way."""
    outputs = RowCoefficients(
        *(torch.empty(head.rows, dtype=torch.float32, device=head.input.device) for _ in RowCoefficients._fields)
    )
    tensors = BackwardTensors(*launch.contiguous((*saved, *grads, weight_sum, None)))
    if override_grad is not None:
        override_grad = override_grad.contiguous()
    block, warps = launch.LABELS
    spec = spec_of(dtype=tl.float64, rows=block, smooth_loss=grads.smooth_loss is not None)
    arguments = (head, tensors, outputs, override_grad, spec)
    launch.start(coefficient_kernel, (triton.cdiv(head.rows, block),), arguments, head.input.device, warps)
    return outputs
