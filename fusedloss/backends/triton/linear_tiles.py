"""A narrow 16-bit head on a GPU: tiles of logits that are never written, formed once for each thing asked of them.

One kernel gives each row's sums, one the gradient of the input, one that of the weight: five products for the three
of a chunk whose logits are written and read again, which costs more where rows are narrow. No atomics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from . import launch
from .launch import ProductTile

# Classes that the programs of one row tile share, so that few rows fill a GPU too.
_SHARES = 16


class Head(NamedTuple):
    """Operands (contiguous), what makes a product z, and the rows' labels (-1 for none); None costs nothing."""

    input: Any
    weight: Any
    rows: Any
    classes: Any
    width: Any
    labels: Any
    scale: Any
    bias: Any
    class_weight: Any
    target_override: Any


class RowCoefficients(NamedTuple):
    """dL/dz_j = softmax exp(z_j - shift) - smooth_loss w_j, and `target` at the label, where dL/dproduct is
    `target_product`; float32 (B,) each. They are ``row_loss.GradCoefficients`` otherwise."""

    shift: Any
    softmax: Any
    smooth_loss: Any
    target: Any
    target_product: Any


@triton.jit
def products(head, left, right, DOT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    """<x_i, w_j> for i in left and j in right."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, head.width, STEP):
        features = start + tl.arange(0, STEP)
        inside = features < head.width
        x = tl.load(head.input + left.to(tl.int64)[:, None] * head.width + features[None, :],
                    mask=(left < head.rows)[:, None] & inside[None, :], other=0.0)  # fmt: skip
        w = tl.load(head.weight + right.to(tl.int64)[None, :] * head.width + features[:, None],
                    mask=(right < head.classes)[None, :] & inside[:, None], other=0.0)  # fmt: skip
        total = tl.dot(x.to(DOT), w.to(DOT), total)
    return total


@triton.jit
def logits_of(head, product, right):
    """z, -inf beyond the last class."""
    inside = right < head.classes
    z = product
    if head.scale is not None:
        z = z * tl.load(head.scale + right, mask=inside, other=0.0)[None, :]
    if head.bias is not None:
        z = z + tl.load(head.bias + right, mask=inside, other=0.0)[None, :]
    return tl.where(inside[None, :], z, float("-inf"))


@triton.jit
def class_weights(head, right):
    inside = right < head.classes
    weight = inside.to(tl.float32)
    if head.class_weight is not None:
        weight = tl.load(head.class_weight + right, mask=inside, other=0.0)
    return weight


@triton.jit
def tile_sums_kernel(head, sums, blocks_per_share, SMOOTH: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr,
                     COLUMNS: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """sums (shares, 4, B): largest z and sum of exp but for the label's, sum of w z, z of the label."""
    left = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = left < head.rows
    label = tl.load(head.labels + left, mask=valid, other=-1).to(tl.int32)
    # A 0 that the compiler can't see: Triton 3.6 fails on loops that add reductions to constants.
    zero = (left < 0).to(tl.float32)
    top, others, smooth, label_z = zero - float("inf"), zero, zero, zero
    first = tl.program_id(1) * blocks_per_share
    for block in range(first, min(first + blocks_per_share, tl.cdiv(head.classes, COLUMNS))):
        right = block * COLUMNS + tl.arange(0, COLUMNS)
        z = logits_of(head, products(head, left, right, DOT, ROWS, COLUMNS, STEP), right)
        is_label = right[None, :] == label[:, None]
        if head.target_override is None:
            label_z += tl.sum(tl.where(is_label, z, 0.0), 1)
        if SMOOTH:
            weight = class_weights(head, right)[None, :]
            smooth += tl.sum(tl.where(is_label | (weight == 0), 0.0, weight * z), 1)
        z = tl.where(is_label, float("-inf"), z)
        higher = tl.maximum(top, tl.max(z, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        others = others * tl.exp(top - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)
        top = higher
    place = sums + tl.program_id(1).to(tl.int64) * 4 * head.rows + left
    tl.store(place, top, mask=valid)
    tl.store(place + head.rows, others, mask=valid)
    tl.store(place + 2 * head.rows, smooth, mask=valid)
    tl.store(place + 3 * head.rows, label_z, mask=valid)


@triton.jit
def grads_of(head, rows, left, right, product, SMOOTH: tl.constexpr):
    """dL/dz and dL/dproduct of a tile, 0 beyond its last row and class."""
    valid = left < head.rows
    label = tl.load(head.labels + left, mask=valid, other=-1).to(tl.int32)
    shift = tl.load(rows.shift + left, mask=valid, other=0.0)
    softmax = tl.load(rows.softmax + left, mask=valid, other=0.0)
    z = logits_of(head, product, right)
    grad = softmax[:, None] * tl.exp(z - shift[:, None])
    if SMOOTH:
        grad -= tl.load(rows.smooth_loss + left, mask=valid, other=0.0)[:, None] * class_weights(head, right)[None, :]
    grad = tl.where(valid[:, None] & (right < head.classes)[None, :] & (softmax != 0)[:, None], grad, 0.0)
    scaled = grad
    if head.scale is not None:
        scaled = grad * tl.load(head.scale + right, mask=right < head.classes, other=0.0)[None, :]
    is_label = right[None, :] == label[:, None]
    of_product = tl.load(rows.target_product + left, mask=valid, other=0.0)
    of_z = 0.0 * of_product
    if head.target_override is None:
        of_z = tl.load(rows.target + left, mask=valid, other=0.0)
    return tl.where(is_label, of_z[:, None], grad), tl.where(is_label, of_product[:, None], scaled)


@triton.jit
def input_tile_kernel(head, rows, gradient, SMOOTH: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr,
                      COLUMNS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """gradient (B, D) in float32: of ROWS rows, BLOCK features."""
    left = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    features = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, head.classes, COLUMNS):
        right = start + tl.arange(0, COLUMNS)
        product = products(head, left, right, DOT, ROWS, COLUMNS, STEP)
        _, grad = grads_of(head, rows, left, right, product, SMOOTH)
        w = tl.load(head.weight + right.to(tl.int64)[:, None] * head.width + features[None, :],
                    mask=(right < head.classes)[:, None] & (features < head.width)[None, :], other=0.0)  # fmt: skip
        total = tl.dot(grad.to(DOT), w.to(DOT), total)
    tl.store(gradient + left.to(tl.int64)[:, None] * head.width + features[None, :], total,
             mask=(left < head.rows)[:, None] & (features < head.width)[None, :])  # fmt: skip


@triton.jit
def weight_tile_kernel(head, rows, gradient, scale_sum, bias_sum, SMOOTH: tl.constexpr, DOT: tl.constexpr,
                       ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """gradient (K, D) in float32: of COLUMNS classes, BLOCK features; the first block of features adds up columns."""
    right = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    features = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = right < head.classes
    total = tl.zeros([COLUMNS, BLOCK], tl.float32)
    zero = (right < 0).to(tl.float32)
    scale, bias = zero, zero
    for start in range(0, head.rows, ROWS):
        left = start + tl.arange(0, ROWS)
        product = products(head, left, right, DOT, ROWS, COLUMNS, STEP)
        of_z, grad = grads_of(head, rows, left, right, product, SMOOTH)
        if scale_sum is not None:
            scale += tl.sum(tl.where(of_z == 0, 0.0, of_z * product), 0)
            bias += tl.sum(of_z, 0)
        if gradient is not None:
            x = tl.load(head.input + left.to(tl.int64)[:, None] * head.width + features[None, :],
                        mask=(left < head.rows)[:, None] & (features < head.width)[None, :], other=0.0)  # fmt: skip
            total = tl.dot(tl.trans(grad).to(DOT), x.to(DOT), total)
    if gradient is not None:
        tl.store(gradient + right.to(tl.int64)[:, None] * head.width + features[None, :], total,
                 mask=inside[:, None] & (features < head.width)[None, :])  # fmt: skip
    if scale_sum is not None:
        if tl.program_id(1) == 0:
            tl.store(scale_sum + right, scale, mask=inside)
            tl.store(bias_sum + right, bias, mask=inside)


def tile_sums(head: Head, smooth: bool) -> Tensor:
    """(4, B) float32: largest z and sum of exp but for the label's, sum of w z but for the label's, z of the label."""
    tile = _tile(head, "sums")
    blocks = triton.cdiv(head.classes, tile.columns)
    shares = min(_SHARES, blocks)
    each = triton.cdiv(blocks, shares)
    shares = triton.cdiv(blocks, each)
    sums = torch.empty(shares, 4, head.rows, dtype=torch.float32, device=head.input.device)
    _start(tile_sums_kernel, (triton.cdiv(head.rows, tile.rows), shares), (head, sums, each), tile, SMOOTH=smooth)
    top = sums[:, 0].amax(0)
    shift = torch.where(top == -torch.inf, 0.0, top)
    others = (sums[:, 1] * (sums[:, 0] - shift).exp()).sum(0)
    return torch.stack([top, others, sums[:, 2].sum(0), sums[:, 3].sum(0)])


def grad_input(head: Head, rows: RowCoefficients, smooth: bool) -> Tensor:
    """(B, D) in float32."""
    tile = _tile(head, "input")
    grad = torch.empty(head.rows, head.width, dtype=torch.float32, device=head.input.device)
    grid = (triton.cdiv(head.rows, tile.rows), triton.cdiv(head.width, tile.block))
    _start(input_tile_kernel, grid, (head, rows, grad), tile, SMOOTH=smooth, BLOCK=tile.block)
    return grad


def grad_weight(
    head: Head, rows: RowCoefficients, smooth: bool, needs_weight: bool, needs_columns: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(K, D), and the sums of dL/dz times the product and of dL/dz, (K,), in float32; None where not needed."""
    tile = _tile(head, "weight")
    like = {"dtype": torch.float32, "device": head.input.device}
    grad = torch.empty(head.classes, head.width, **like) if needs_weight else None
    scale, bias = (torch.empty(head.classes, **like) if needs_columns else None for _ in range(2))
    grid = (triton.cdiv(head.classes, tile.columns), triton.cdiv(head.width, tile.block) if needs_weight else 1)
    _start(weight_tile_kernel, grid, (head, rows, grad, scale, bias), tile, SMOOTH=smooth, BLOCK=tile.block)
    return grad, scale, bias


def _tile(head: Head, kernel: str) -> ProductTile:
    return launch.product_tile("linear_ce", kernel, head.width, head.input.dtype, head.input.device)


def _start(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], tile: ProductTile, **constants: Any) -> None:
    operand = arguments[0].input
    # The interpreter's NumPy knows no bfloat16.
    on_device = tl.float16 if operand.dtype == torch.float16 else tl.bfloat16
    dot = tl.float32 if isinstance(kernel, InterpretedFunction) else on_device
    sizes = {"DOT": dot, "ROWS": tile.rows, "COLUMNS": tile.columns, "STEP": tile.step}
    most = launch.most_registers(tile.warps)
    launch.start(kernel, grid, arguments, operand.device, tile.warps, tile.stages, **sizes, **constants, maxnreg=most)
