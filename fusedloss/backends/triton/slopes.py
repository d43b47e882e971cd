"""What the softmax kernels write: slopes of a block of logits, from a few numbers per row."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .blocks import addresses, is_label


class Outputs(NamedTuple):
    """Where the slopes go: the gradient with its steps, and per-program column sums for scale and bias."""

    gradient: Any
    outer_step: Any
    inner_step: Any
    class_step: Any
    scale: Any
    bias: Any


class Slopes(NamedTuple):
    """dL/dz_j = softmax * exp(z_j - shift) - uniform * w_j - at_target * w_j q_j; zero where not kept.

    With labels the slope at the label is `at_target`, and elsewhere it has no part in it. Where another number stands
    in for the label's logit, `at_target` is that one's slope and the label's own is 0. A hinge takes `hinge` where
    z_j < threshold and adds `at_first` at class `first`; without one these four hold nothing.
    """

    shift: Any
    softmax: Any
    uniform: Any
    at_target: Any
    kept: Any
    threshold: Any
    hinge: Any
    at_first: Any
    first: Any


class Saved(NamedTuple):
    """Slopes of all rows in memory: (5, rows) values, and (3, rows) and (rows,) of a hinge; None where absent."""

    slopes: Any
    hinge: Any
    first: Any


SAVED = 5
SAVED_OF_HINGE = 3


@triton.jit
def store_slopes(saved, slopes, rows, row_count, T: tl.constexpr):
    place = saved.slopes + rows.index
    tl.store(place, slopes.shift, mask=rows.valid)
    tl.store(place + row_count, slopes.softmax, mask=rows.valid)
    tl.store(place + 2 * row_count, slopes.uniform, mask=rows.valid)
    tl.store(place + 3 * row_count, slopes.at_target, mask=rows.valid)
    tl.store(place + 4 * row_count, slopes.kept.to(T), mask=rows.valid)
    if saved.hinge is not None:
        place = saved.hinge + rows.index
        tl.store(place, slopes.threshold, mask=rows.valid)
        tl.store(place + row_count, slopes.hinge, mask=rows.valid)
        tl.store(place + 2 * row_count, slopes.at_first, mask=rows.valid)
        tl.store(saved.first + rows.index, slopes.first, mask=rows.valid)


@triton.jit
def load_slopes(saved, rows, row_count):
    place = saved.slopes + rows.index
    shift = tl.load(place, mask=rows.valid, other=0.0)
    softmax = tl.load(place + row_count, mask=rows.valid, other=0.0)
    uniform = tl.load(place + 2 * row_count, mask=rows.valid, other=0.0)
    at_target = tl.load(place + 3 * row_count, mask=rows.valid, other=0.0)
    kept = tl.load(place + 4 * row_count, mask=rows.valid, other=0.0) != 0
    if saved.hinge is None:
        return Slopes(shift, softmax, uniform, at_target, kept, shift, shift, shift, shift)
    else:
        place = saved.hinge + rows.index
        threshold = tl.load(place, mask=rows.valid, other=0.0)
        hinge = tl.load(place + row_count, mask=rows.valid, other=0.0)
        at_first = tl.load(place + 2 * row_count, mask=rows.valid, other=0.0)
        first = tl.load(saved.first + rows.index, mask=rows.valid, other=0)
        return Slopes(shift, softmax, uniform, at_target, kept, threshold, hinge, at_first, first)


@triton.jit
def slope_of_block(
    slopes, block, label, classes, SOFT: tl.constexpr, STAND_IN: tl.constexpr, UNIFORM: tl.constexpr,
    HINGE: tl.constexpr,
):  # fmt: skip
    slope = tl.exp(block.z - slopes.shift[:, None]) * slopes.softmax[:, None]
    if UNIFORM:
        slope -= block.weight * slopes.uniform[:, None]
    if HINGE:
        slope += tl.where(classes[None, :] == slopes.first[:, None], slopes.at_first[:, None], 0.0)
        slope -= tl.where(block.z < slopes.threshold[:, None], slopes.hinge[:, None], 0.0)
    if SOFT:
        slope -= block.soft * slopes.at_target[:, None]
    elif STAND_IN:
        slope = tl.where(is_label(classes, label), 0.0, slope)
    else:
        slope = tl.where(is_label(classes, label), slopes.at_target[:, None], slope)
    return tl.where(slopes.kept[:, None], slope, 0.0)


@triton.jit
def write_gradient(
    inputs, outputs, slope, block, label, slopes, rows, classes, num_classes, soft_cap, CAP: tl.constexpr,
    T: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """dL/dx from dL/dz, and at a label that a number stands in for from that one's slope."""
    inside = (classes < num_classes)[None, :]
    if CAP is not None:
        ratio = block.x / tl.full([1], soft_cap, T)
        slope = slope * ((1.0 - ratio) * (1.0 + ratio))
    if inputs.scale is not None:
        slope = slope * tl.load(inputs.scale + classes[None, :], mask=inside, other=0.0)
    if inputs.target_override_grad is not None:
        slope = tl.where(is_label(classes, label), (slopes.at_target * label.slope)[:, None], slope)
    place = addresses(
        outputs.gradient, outputs.outer_step, outputs.inner_step, outputs.class_step, rows, classes, ALIGN
    )
    tl.store(place, slope.to(outputs.gradient.dtype.element_ty), mask=rows.valid[:, None] & inside)


@triton.jit
def add_columns(scale_sum, bias_sum, slope, x):
    # A slope of 0 adds 0 even where x is -inf.
    return scale_sum + tl.where(slope == 0, 0.0, slope * x), bias_sum + slope


@triton.jit
def write_columns(outputs, scale_sum, bias_sum, part, classes, num_classes):
    place = part.to(tl.int64) * num_classes + classes
    tl.store(outputs.scale + place, tl.sum(scale_sum, 0), mask=classes < num_classes)
    tl.store(outputs.bias + place, tl.sum(bias_sum, 0), mask=classes < num_classes)
