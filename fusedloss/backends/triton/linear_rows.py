"""Kernels over single rows of a linear head in double: lengths, the Jacobian of normalisation, the label's pairs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

_WARPS, _WIDEST = 4, 512
_VALUES = 2048  # of the rows whose lengths one program sums


class Pairs(NamedTuple):
    """Rows of input and weight (contiguous), each row's label (-1 for none), and lengths where cosines are meant."""

    input: Any
    weight: Any
    labels: Any
    width: Any
    input_norm: Any
    class_norm: Any
    product: Any


@triton.jit
def norm_kernel(rows, norms, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Lengths of ROWS rows, infinite for zeros; the sum of squares is double, the rows are widened in registers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < count
    # A 0 that the compiler can't see: Triton 3.6 fails on loops that add reductions to constants.
    total = (row < 0).to(tl.float64)
    for first in range(0, width, BLOCK):
        places = first + tl.arange(0, BLOCK)
        v = tl.load(rows + row[:, None] * width + places[None, :],
                    mask=valid[:, None] & (places < width)[None, :], other=0.0).to(tl.float64)  # fmt: skip
        total += tl.sum(v * v, 1)
    tl.store(norms + row, tl.where(total == 0, float("inf"), tl.sqrt(total)), mask=valid)


@triton.jit
def project_kernel(rows, norms, gradient, width, DIVIDE: tl.constexpr, BLOCK: tl.constexpr):
    """gradient -= v <v, gradient> / |v|^2, over |v| with DIVIDE; 0 where |v| is infinite."""
    start = tl.program_id(0).to(tl.int64) * width
    norm = tl.load(norms + tl.program_id(0))
    along = norm * 0.0
    along = tl.where(along != along, 0.0, along)
    for first in range(0, width, BLOCK):
        places = first + tl.arange(0, BLOCK)
        inside = places < width
        v = tl.load(rows + start + places, mask=inside, other=0.0).to(tl.float64)
        g = tl.load(gradient + start + places, mask=inside, other=0.0).to(tl.float64)
        along += tl.sum(v * g, 0)
    along = along / norm / norm
    factor = 1.0 / norm
    if not DIVIDE:
        factor = tl.where(factor == 0, 0.0, 1.0)
    for first in range(0, width, BLOCK):
        places = first + tl.arange(0, BLOCK)
        inside = places < width
        v = tl.load(rows + start + places, mask=inside, other=0.0).to(tl.float64)
        g = tl.load(gradient + start + places, mask=inside, other=0.0)
        tl.store(gradient + start + places, ((g.to(tl.float64) - along * v) * factor).to(g.dtype), mask=inside)


@triton.jit
def product_kernel(pairs, BLOCK: tl.constexpr):
    """<x_i, w_y>, over both lengths where these are given; 0 without a label."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(pairs.labels + row)
    class_row = tl.maximum(label, 0)
    total = label.to(tl.float64) * 0.0
    for first in range(0, pairs.width, BLOCK):
        places = first + tl.arange(0, BLOCK)
        inside = places < pairs.width
        x = tl.load(pairs.input + row * pairs.width + places, mask=inside, other=0.0).to(tl.float64)
        w = tl.load(pairs.weight + class_row * pairs.width + places, mask=inside, other=0.0).to(tl.float64)
        total += tl.sum(x * w, 0)
    if pairs.input_norm is not None:
        total = total / tl.load(pairs.input_norm + row)
        total = total / tl.load(pairs.class_norm + class_row)
    tl.store(pairs.product + row, tl.where(label >= 0, total, 0.0))


@triton.jit
def product_grad(pairs, row, label, grad, places, inside, OF_WEIGHT: tl.constexpr):
    """grad * d product / d row, of the weight or of the input, at some features, in double."""
    x = tl.load(pairs.input + row * pairs.width + places, mask=inside, other=0.0).to(tl.float64)
    w = tl.load(pairs.weight + label * pairs.width + places, mask=inside, other=0.0).to(tl.float64)
    if pairs.input_norm is None:
        return grad * (x if OF_WEIGHT else w)
    else:
        x_norm, w_norm = tl.load(pairs.input_norm + row), tl.load(pairs.class_norm + label)
        x, w = x / x_norm, w / w_norm
        cosine = tl.load(pairs.product + row)
        if OF_WEIGHT:
            return grad / w_norm * (x - cosine * w)
        else:
            return grad / x_norm * (w - cosine * x)


@triton.jit
def label_input_kernel(pairs, grad_product, gradient, BLOCK: tl.constexpr):
    """Adds the label's gradient to each row of the input's."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(pairs.labels + row)
    if label >= 0:
        grad = tl.load(grad_product + row)
        for first in range(0, pairs.width, BLOCK):
            places = first + tl.arange(0, BLOCK)
            inside = places < pairs.width
            place = gradient + row * pairs.width + places
            before = tl.load(place, mask=inside, other=0.0)
            added = product_grad(pairs, row, label, grad, places, inside, False)
            tl.store(place, (before.to(tl.float64) + added).to(before.dtype), mask=inside)


@triton.jit
def label_weight_kernel(pairs, grad_product, gradient, order, ends, BLOCK: tl.constexpr):
    """Adds the label's gradients to the weight's: the first row of each class, in the order by class, adds them all."""
    first_row = tl.program_id(0)
    label = tl.load(pairs.labels + tl.load(order + first_row))
    label_before = tl.load(pairs.labels + tl.load(order + tl.maximum(first_row - 1, 0)))
    if (label >= 0) & ((first_row == 0) | (label != label_before)):
        end = tl.load(ends + first_row)
        for first in range(0, pairs.width, BLOCK):
            places = first + tl.arange(0, BLOCK)
            inside = places < pairs.width
            place = gradient + label * pairs.width + places
            before = tl.load(place, mask=inside, other=0.0)
            total = before.to(tl.float64)
            for index in range(first_row, end):
                row = tl.load(order + index)
                total += product_grad(pairs, row, label, tl.load(grad_product + row), places, inside, True)
            tl.store(place, total.to(before.dtype), mask=inside)


def row_norms(rows: Tensor) -> Tensor:
    """Lengths in float64, infinite for a row of zeros; no copy of the rows is made where they are contiguous."""
    rows = rows.contiguous()
    count, width = rows.shape
    norms = torch.empty(count, dtype=torch.float64, device=rows.device)
    block = _block(width)
    together = max(1, _VALUES // block)
    grid = (triton.cdiv(count, together),)
    launch.start(norm_kernel, grid, (rows, norms, count, width), rows.device, _WARPS, ROWS=together, BLOCK=block)
    return norms


def project_rows(rows: Tensor, norm: Tensor, gradient: Tensor, divide: bool) -> None:
    """See project_kernel; `gradient` is changed in place."""
    rows = rows.contiguous()
    _start(project_kernel, len(rows), (rows, norm.contiguous(), gradient, rows.shape[1]), rows, DIVIDE=divide)


def target_products(pairs: Pairs, rows: int) -> None:
    """Fills ``pairs.product``."""
    _start(product_kernel, rows, (pairs,), pairs.input)


def add_label_gradients(pairs: Pairs, grad_product: Tensor, input: Tensor | None, weight: Tensor | None) -> None:
    """Adds to the gradients of input and weight; the same bits at every run."""
    rows = len(grad_product)
    if input is not None:
        _start(label_input_kernel, rows, (pairs, grad_product, input), grad_product)
    if weight is not None:
        labels, order = torch.sort(pairs.labels, stable=True)
        ends = torch.searchsorted(labels, labels, right=True)
        _start(label_weight_kernel, rows, (pairs, grad_product, weight, order, ends), grad_product)


def _start(kernel: Any, programs: int, arguments: tuple[Any, ...], like: Tensor, **constants: Any) -> None:
    width = arguments[0].width if isinstance(arguments[0], Pairs) else arguments[3]
    block = _block(width)
    most = launch.most_registers(_WARPS)
    launch.start(kernel, (programs,), arguments, like.device, _WARPS, BLOCK=block, **constants, maxnreg=most)


def _block(width: int) -> int:
    return min(_WIDEST, max(16, triton.next_power_of_2(width))) if _forced_block is None else _forced_block


_forced_block: int | None = None
