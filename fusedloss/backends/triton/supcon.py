"""Supervised contrast on a GPU: tiles of similarities that are never written, an online log-sum-exp, no atomics.

One kernel gives each anchor's sums. The other gives the gradient of each row: the gradients of a tile's similarities
serve both directions of its pairs, so that each row is written by one program, once for each block of features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedloss.backends.reference.supcon import IGNORED
from fusedloss.core.operands import AnchorSums, SavedAnchors, SupConInputs, SupConMask

from . import launch


class Rows(NamedTuple):
    """Features (row, column) at features + row * width + column, and who is whose positive; None costs nothing."""

    features: Any
    count: Any  # M
    width: Any  # D
    codes: Any  # int32 (M,), with labels
    mask: Any  # uint8 (B, B), in place of codes
    samples: Any  # B, with a mask
    weights: Any  # (3, M), or None
    temperature: Any  # ()
    anchors: Any  # A


class Sums(NamedTuple):
    """What the first kernel writes, (A,) each; per_positive is read."""

    loss: Any
    shift: Any
    sum: Any
    per_positive: Any


class Coefficients(NamedTuple):
    """What the second kernel multiplies exp(s - shift) and the mean over positives by, (M,) each."""

    shift: Any
    softmax: Any
    positive: Any
    moment: Any  # (A,): sum of gradient * (s - shift) over the anchor's own contrasts, or None


@triton.jit
def similarities(rows, left, right, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                 STEP: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """<x_i, x_j> / T for i in left and j in right, summed over the features in the same order for every tile."""
    total = tl.zeros([ROWS, COLUMNS], T)
    for start in range(0, rows.width, STEP):
        dims = start + tl.arange(0, STEP)
        inside = dims < rows.width
        a = tl.load(rows.features + left.to(tl.int64)[:, None] * rows.width + dims[None, :],
                    mask=(left < rows.count)[:, None] & inside[None, :], other=0.0)  # fmt: skip
        b = tl.load(rows.features + right.to(tl.int64)[None, :] * rows.width + dims[:, None],
                    mask=(right < rows.count)[None, :] & inside[:, None], other=0.0)  # fmt: skip
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=T)
    return total / tl.load(rows.temperature)


@triton.jit
def contrasts(rows, left, right, IGNORED: tl.constexpr):
    """Which pairs (i, j) are contrasts, and in which j is a positive of i."""
    contrasted = (left[:, None] != right[None, :]) & (left < rows.anchors)[:, None] & (right < rows.count)[None, :]
    if rows.mask is not None:
        place = (left % rows.samples).to(tl.int64)[:, None] * rows.samples + (right % rows.samples)[None, :]
        positive = tl.load(rows.mask + place, mask=contrasted, other=0) != 0
    else:
        code = tl.load(rows.codes + left, mask=left < rows.anchors, other=IGNORED)
        other = tl.load(rows.codes + right, mask=right < rows.count, other=IGNORED)
        contrasted = contrasted & (other != IGNORED)[None, :]
        positive = (code[:, None] == other[None, :]) & (code >= 0)[:, None]
    return contrasted, contrasted & positive


@triton.jit
def weight_of(rows, right, positive):
    """Weight of column j in the sums of exp of rows that it is or isn't a positive of."""
    inside = right < rows.count
    negative = tl.load(rows.weights + right, mask=inside, other=0.0)
    as_positive = tl.load(rows.weights + rows.count + right, mask=inside, other=0.0)
    return tl.where(positive, as_positive[None, :], negative[None, :])


@triton.jit
def share_of(rows, right):
    return tl.load(rows.weights + 2 * rows.count + right, mask=right < rows.count, other=0.0)


@triton.jit
def shift_of(top):
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def sums_kernel(rows, sums, IGNORED: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
                COLUMNS: tl.constexpr, STEP: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """Loss, largest similarity and sum of exp of ROWS anchors."""
    left = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # A 0 that the compiler can't see: Triton 3.6 fails on loops that add reductions to constants.
    zero = (left < 0).to(T)
    top, total, mean, shares = zero - float("inf"), zero, zero, zero
    for start in range(0, rows.count, COLUMNS):
        right = start + tl.arange(0, COLUMNS)
        s = similarities(rows, left, right, PRECISION, ROWS, COLUMNS, STEP, T)
        contrasted, positive = contrasts(rows, left, right, IGNORED)
        share = positive.to(T)
        if rows.weights is not None:
            weight = weight_of(rows, right, positive)
            contrasted = contrasted & (weight > 0)
            share = share * share_of(rows, right)[None, :]
        candidates = tl.where(contrasted, s, float("-inf"))
        before, top = shift_of(top), tl.maximum(top, tl.max(candidates, 1))
        shift = shift_of(top)
        e = tl.exp(candidates - shift[:, None])
        if rows.weights is not None:
            e = tl.where(contrasted, e * weight, 0.0)
        total = total * tl.exp(before - shift) + tl.sum(e, 1)
        mean = mean + (before - shift) * shares + tl.sum(tl.where(positive, share * (s - shift[:, None]), 0.0), 1)
        shares = shares + tl.sum(share, 1)
    inside = left < rows.anchors
    per_positive = tl.load(sums.per_positive + left, mask=inside, other=0.0)
    loss = tl.where(per_positive > 0, tl.log(total) - mean * per_positive, 0.0)
    tl.store(sums.loss + left, loss, mask=inside)
    tl.store(sums.shift + left, shift_of(top), mask=inside)
    tl.store(sums.sum + left, total, mask=inside)


@triton.jit
def grad_of(rows, coefficients, s, left, right, IGNORED: tl.constexpr, T: tl.constexpr):
    """dL_i/ds_ij of anchors i in left for j in right."""
    contrasted, positive = contrasts(rows, left, right, IGNORED)
    inside = left < rows.anchors
    shift = tl.load(coefficients.shift + left, mask=inside, other=0.0)
    softmax = tl.load(coefficients.softmax + left, mask=inside, other=0.0)
    positive_coefficient = tl.load(coefficients.positive + left, mask=inside, other=0.0)
    e = tl.exp(tl.minimum(s - shift[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)) * softmax[:, None]
    of_positives = tl.broadcast_to(positive_coefficient[:, None], e.shape)
    if rows.weights is not None:
        e = e * weight_of(rows, right, positive)
        of_positives = of_positives * share_of(rows, right)[None, :]
    return tl.where(contrasted, e, 0.0) - tl.where(positive, of_positives, 0.0)


@triton.jit
def gradient_kernel(rows, coefficients, grad, num_grad_rows, IGNORED: tl.constexpr, PRECISION: tl.constexpr,
                    SAME: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
                    BLOCK: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """The gradient of ROWS rows in BLOCK features.

    Without SAME (ROWS = COLUMNS) the similarities of the way back are computed as the first kernel did, to the bit:
    the largest of an anchor must be its shift, where similarities are so large that a rounding changes exp by factors.
    """
    left = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], T)
    moment = (left < 0).to(T)
    shift = tl.load(coefficients.shift + left, mask=left < rows.anchors, other=0.0)
    # Rows that are no anchors get their gradient from anchors alone.
    stop = tl.where(tl.program_id(0) * ROWS < rows.anchors, rows.count, rows.anchors)
    for start in range(0, stop, COLUMNS):
        right = start + tl.arange(0, COLUMNS)
        s = similarities(rows, left, right, PRECISION, ROWS, COLUMNS, STEP, T)
        forth = grad_of(rows, coefficients, s, left, right, IGNORED, T)
        if coefficients.moment is not None:
            # An anchor's gradients add up to 0, so that any reference will do: one near the values keeps the digits.
            moment += tl.sum(forth * (s - shift[:, None]), 1)
        if SAME:
            back = tl.trans(grad_of(rows, coefficients, tl.trans(s), right, left, IGNORED, T))
        else:
            other = similarities(rows, right, left, PRECISION, ROWS, COLUMNS, STEP, T)
            back = tl.trans(grad_of(rows, coefficients, other, right, left, IGNORED, T))
        x = tl.load(rows.features + right.to(tl.int64)[:, None] * rows.width + dims[None, :],
                    mask=(right < rows.count)[:, None] & (dims < rows.width)[None, :], other=0.0)  # fmt: skip
        total = tl.dot(forth + back, x, total, input_precision=PRECISION, out_dtype=T)
    place = grad + left.to(tl.int64)[:, None] * rows.width + dims[None, :]
    tl.store(place, total, mask=(left < num_grad_rows)[:, None] & (dims < rows.width)[None, :])
    if coefficients.moment is not None:
        if tl.program_id(1) == 0:
            tl.store(coefficients.moment + left, moment, mask=left < rows.anchors)


def supcon_stats(inputs: SupConInputs) -> AnchorSums:
    """The loss of each anchor, its shift and its sum of exponentials; the contract is the reference's."""
    rows = _rows(inputs)
    features, anchors = inputs.features, inputs.num_anchors
    tile = _tile(inputs, "sums")
    sums = AnchorSums(*(features.new_empty(anchors) for _ in AnchorSums._fields))
    launch.start(
        sums_kernel, (triton.cdiv(anchors, tile.rows),), (rows, Sums(*sums, inputs.per_positive.contiguous())),
        features.device, tile.warps, tile.stages, IGNORED=IGNORED, PRECISION=_precision(inputs),
        ROWS=tile.rows, COLUMNS=tile.columns, STEP=tile.step, T=launch.triton_dtype(features.dtype),
    )  # fmt: skip
    return sums


def supcon_backward(inputs: SupConInputs, saved: SavedAnchors, grad_loss: Tensor, mask: SupConMask) -> list[Tensor]:
    """The gradients that `mask` names, from those of the losses; rows from ``num_grad_rows`` on have zeros."""
    rows, tile = _rows(inputs), _tile(inputs, "gradient")
    features, anchors = inputs.features, inputs.num_anchors
    grad = features.new_zeros(features.shape)
    moment = features.new_empty(anchors) if mask.temperature else None
    grad_loss = torch.where(inputs.per_positive > 0, grad_loss, 0.0) / inputs.temperature
    coefficients = features.new_zeros(3, len(features))
    coefficients[0, :anchors] = saved.shift
    coefficients[1, :anchors] = torch.where(grad_loss == 0, 0.0, grad_loss / saved.sum)
    coefficients[2, :anchors] = grad_loss * inputs.per_positive
    arguments = Coefficients(coefficients[0], coefficients[1], coefficients[2], moment)
    # A temperature's gradient needs the anchors' rows alone.
    count, width = (inputs.num_grad_rows, features.shape[1]) if mask.features else (anchors, 1)
    launch.start(
        gradient_kernel, (triton.cdiv(max(count, anchors if mask.temperature else 0), tile.rows),
                          triton.cdiv(width, tile.block)),
        (rows, arguments, grad, inputs.num_grad_rows), features.device, tile.warps,
        tile.stages, IGNORED=IGNORED, PRECISION=_precision(inputs), SAME=inputs.normalized, ROWS=tile.rows,
        COLUMNS=tile.columns, STEP=tile.step, BLOCK=tile.block, T=launch.triton_dtype(features.dtype),
        maxnreg=launch.most_registers(tile.warps),
    )  # fmt: skip
    grads = [grad] if mask.features else []
    return grads if moment is None else [*grads, -moment.sum()]


def _rows(inputs: SupConInputs) -> Rows:
    """The tensors as the kernels address them: contiguous, whatever they were."""
    count, width = inputs.features.shape
    mask, weights = inputs.mask, inputs.weights
    return Rows(
        inputs.features.contiguous(),
        count,
        width,
        inputs.codes.contiguous(),
        None if mask is None else mask.contiguous().view(torch.uint8),
        1 if mask is None else len(mask),
        None if weights is None else weights.contiguous(),
        inputs.temperature,
        inputs.num_anchors,
    )


def _tile(inputs: SupConInputs, kernel: str) -> launch.ProductTile:
    # Square ones in both kernels alike where a rounding of the similarities counts.
    features = inputs.features
    return launch.product_tile(
        "supcon", kernel if inputs.normalized else "any length", features.shape[1], features.dtype, features.device
    )


def _precision(inputs: SupConInputs) -> str:
    """Three tensor-core products keep float32's digits of cosines; larger values are multiplied in float32 itself."""
    return "tf32x3" if inputs.normalized and inputs.features.dtype == torch.float32 else "ieee"
