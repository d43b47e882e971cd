"""What the softmax kernels write: the gradient of a block of logits, from a few coefficients per row."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .blocks import addresses, class_places, classes_of, is_class, is_label, load_some, number
from .row_loss import GradCoefficients
from .statistics import exp


class Outputs(NamedTuple):
    """Where gradients go: that of the logits with its strides, and per-program column sums for scale and bias."""

    grad_logits: Any
    outer_step: Any
    inner_step: Any
    class_step: Any
    grad_scale: Any
    grad_bias: Any


class Saved(NamedTuple):
    """GradCoefficients of all rows in memory: (5, rows), and of a hinge (3, rows) and (rows,); None where absent."""

    coefficients: Any
    hinge: Any
    first_top: Any


SAVED = 5
SAVED_OF_HINGE = 3


@triton.jit
def store_coefficients(saved, coefficients, rows, row_count, T: tl.constexpr):
    place = saved.coefficients + rows.index
    tl.store(place, coefficients.shift, mask=rows.valid)
    tl.store(place + row_count, coefficients.softmax, mask=rows.valid)
    tl.store(place + 2 * row_count, coefficients.smooth_loss, mask=rows.valid)
    tl.store(place + 3 * row_count, coefficients.target, mask=rows.valid)
    tl.store(place + 4 * row_count, coefficients.kept.to(T), mask=rows.valid)
    if saved.hinge is not None:
        place = saved.hinge + rows.index
        tl.store(place, coefficients.threshold, mask=rows.valid)
        tl.store(place + row_count, coefficients.hinge, mask=rows.valid)
        tl.store(place + 2 * row_count, coefficients.at_top, mask=rows.valid)
        tl.store(saved.first_top + rows.index, coefficients.first_top, mask=rows.valid)


@triton.jit
def load_coefficients(saved, rows, row_count):
    place = saved.coefficients + rows.index
    shift = tl.load(place, mask=rows.valid, other=0.0)
    softmax = tl.load(place + row_count, mask=rows.valid, other=0.0)
    smooth_loss = tl.load(place + 2 * row_count, mask=rows.valid, other=0.0)
    target = tl.load(place + 3 * row_count, mask=rows.valid, other=0.0)
    kept = tl.load(place + 4 * row_count, mask=rows.valid, other=0.0) != 0
    if saved.hinge is None:
        return GradCoefficients(shift, softmax, smooth_loss, target, kept, shift, shift, shift, shift, shift)
    else:
        place = saved.hinge + rows.index
        threshold = tl.load(place, mask=rows.valid, other=0.0)
        hinge = tl.load(place + row_count, mask=rows.valid, other=0.0)
        at_top = tl.load(place + 2 * row_count, mask=rows.valid, other=0.0)
        first_top = tl.load(saved.first_top + rows.index, mask=rows.valid, other=0)
        return GradCoefficients(shift, softmax, smooth_loss, target, kept, threshold, hinge, at_top, first_top, shift)


@triton.jit
def exp_of_block(coefficients, block, spec):
    """exp(z - shift)."""
    return exp(block.z - coefficients.shift[:, None], spec.dtype)


@triton.jit
def grad_of_block(coefficients, block, e, label, start, spec):
    """dL/dz of rows that are kept, from e = exp(z - shift), which may be anything at labels."""
    grad = e * coefficients.softmax[:, None]
    if spec.smooth_loss:
        grad -= block.weight * coefficients.smooth_loss[:, None]
    if spec.top is not None:
        at_top = is_class(coefficients.first_top, start, spec)
        grad = tl.where(at_top, grad + coefficients.at_top[:, None], grad)
        grad = tl.where(block.z >= coefficients.threshold[:, None], grad, grad - coefficients.hinge[:, None])
    if spec.soft:
        grad -= block.soft * coefficients.target[:, None]
    elif spec.override:
        grad = tl.where(is_label(start, label, spec), 0.0, grad)
    else:
        grad = tl.where(is_label(start, label, spec), coefficients.target[:, None], grad)
    return grad


@triton.jit
def write_grad(
    inputs, outputs, grad, block, label, coefficients, rows, start, num_classes, spec, WHOLE: tl.constexpr = False
):  # fmt: skip
    """dL/dx from dL/dz, and at a label with a target_override from the gradient of that."""
    if inputs.soft_cap is not None:
        ratio = block.x * (1.0 / number(inputs.soft_cap, spec.dtype))
        # One rounding: 1 - ratio^2 keeps its digits near 0.
        grad = grad * tl.fma(-ratio, ratio, 1.0)
    if inputs.scale is not None:
        places = class_places(start, spec)
        grad = grad * load_some(inputs.scale + places, places < num_classes, 0.0, WHOLE, 3)
    if inputs.target_override_grad is not None:
        grad = tl.where(is_label(start, label, spec), (coefficients.target * label.override_grad)[:, None], grad)
    classes = classes_of(start, spec)
    place = addresses(
        outputs.grad_logits, outputs.outer_step, outputs.inner_step, outputs.class_step, rows, classes, spec.align
    )  # fmt: skip
    values = grad.to(outputs.grad_logits.dtype.element_ty)
    # Two stores of which one does nothing take fewer instructions than a choice for every class.
    written, cleared = coefficients.kept[:, None], (rows.valid & (coefficients.kept == 0))[:, None]
    if not WHOLE:
        inside = (classes < num_classes)[None, :]
        written, cleared = written & inside, cleared & inside
    tl.store(place, values, mask=written)
    tl.store(place, tl.zeros(values.shape, values.dtype), mask=cleared)


@triton.jit
def add_columns(scale_sum, bias_sum, grad, x):
    # A gradient of 0 adds 0 even where x is -inf.
    return scale_sum + tl.where(grad == 0, 0.0, grad * x), bias_sum + grad


@triton.jit
def write_columns(outputs, scale_sum, bias_sum, part, classes, num_classes):
    place = part.to(tl.int64) * num_classes + classes
    tl.store(outputs.grad_scale + place, tl.sum(scale_sum, 0), mask=classes < num_classes)
    tl.store(outputs.grad_bias + place, tl.sum(bias_sum, 0), mask=classes < num_classes)
