"""Supervised contrast on a GPU: tiles of similarities that are never written, an online log-sum-exp, no atomics.

One kernel gives each anchor's sums. The other gives the gradient of each row: the slopes of a tile count for both
directions of its pairs, so that each row is written by one program, once for each block of features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedloss.backends.reference.supcon import IGNORED

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


class Found(NamedTuple):
    """What the first kernel writes, (A,) each; per_positive is read."""

    loss: Any
    shift: Any
    sum: Any
    per_positive: Any


class Slopes(NamedTuple):
    """Coefficients of the second kernel, (M,) each: of exp(s - shift), and of the mean over positives."""

    shift: Any
    softmax: Any
    mean: Any
    moment: Any  # (A,): sum of slope * (s - shift) over the anchor's own contrasts, or None


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
    """Which pairs (i, j) count at all, and in which j is a positive of i."""
    counted = (left[:, None] != right[None, :]) & (left < rows.anchors)[:, None] & (right < rows.count)[None, :]
    if rows.mask is not None:
        place = (left % rows.samples).to(tl.int64)[:, None] * rows.samples + (right % rows.samples)[None, :]
        positive = tl.load(rows.mask + place, mask=counted, other=0) != 0
    else:
        code = tl.load(rows.codes + left, mask=left < rows.anchors, other=IGNORED)
        other = tl.load(rows.codes + right, mask=right < rows.count, other=IGNORED)
        counted = counted & (other != IGNORED)[None, :]
        positive = (code[:, None] == other[None, :]) & (code >= 0)[:, None]
    return counted, counted & positive


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
def sums_kernel(rows, found, IGNORED: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
                COLUMNS: tl.constexpr, STEP: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """Loss, largest similarity and sum of exp of ROWS anchors."""
    left = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # A 0 that the compiler can't see: Triton 3.6 fails on loops that add reductions to constants.
    zero = (left < 0).to(T)
    top, total, mean, shares = zero - float("inf"), zero, zero, zero
    for start in range(0, rows.count, COLUMNS):
        right = start + tl.arange(0, COLUMNS)
        s = similarities(rows, left, right, PRECISION, ROWS, COLUMNS, STEP, T)
        counted, positive = contrasts(rows, left, right, IGNORED)
        share = positive.to(T)
        if rows.weights is not None:
            weight = weight_of(rows, right, positive)
            counted = counted & (weight > 0)
            share = share * share_of(rows, right)[None, :]
        candidates = tl.where(counted, s, float("-inf"))
        before, top = shift_of(top), tl.maximum(top, tl.max(candidates, 1))
        shift = shift_of(top)
        e = tl.exp(candidates - shift[:, None])
        if rows.weights is not None:
            e = tl.where(counted, e * weight, 0.0)
        total = total * tl.exp(before - shift) + tl.sum(e, 1)
        mean = mean + (before - shift) * shares + tl.sum(tl.where(positive, share * (s - shift[:, None]), 0.0), 1)
        shares = shares + tl.sum(share, 1)
    inside = left < rows.anchors
    per_positive = tl.load(found.per_positive + left, mask=inside, other=0.0)
    loss = tl.where(per_positive > 0, tl.log(total) - mean * per_positive, 0.0)
    tl.store(found.loss + left, loss, mask=inside)
    tl.store(found.shift + left, shift_of(top), mask=inside)
    tl.store(found.sum + left, total, mask=inside)


@triton.jit
def slope_of(rows, slopes, s, left, right, IGNORED: tl.constexpr, T: tl.constexpr):
    """dL_i/ds_ij of anchors i in left for j in right."""
    counted, positive = contrasts(rows, left, right, IGNORED)
    inside = left < rows.anchors
    shift = tl.load(slopes.shift + left, mask=inside, other=0.0)
    softmax = tl.load(slopes.softmax + left, mask=inside, other=0.0)
    mean = tl.load(slopes.mean + left, mask=inside, other=0.0)
    e = tl.exp(tl.minimum(s - shift[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)) * softmax[:, None]
    taken = tl.broadcast_to(mean[:, None], e.shape)
    if rows.weights is not None:
        e = e * weight_of(rows, right, positive)
        taken = taken * share_of(rows, right)[None, :]
    return tl.where(counted, e, 0.0) - tl.where(positive, taken, 0.0)


@triton.jit
def gradient_kernel(rows, slopes, gradient, learned, IGNORED: tl.constexpr, PRECISION: tl.constexpr,
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
    shift = tl.load(slopes.shift + left, mask=left < rows.anchors, other=0.0)
    # Rows that are no anchors have slopes from anchors alone.
    stop = tl.where(tl.program_id(0) * ROWS < rows.anchors, rows.count, rows.anchors)
    for start in range(0, stop, COLUMNS):
        right = start + tl.arange(0, COLUMNS)
        s = similarities(rows, left, right, PRECISION, ROWS, COLUMNS, STEP, T)
        forth = slope_of(rows, slopes, s, left, right, IGNORED, T)
        if slopes.moment is not None:
            # An anchor's slopes add up to 0, so that any reference will do: one near the values keeps the digits.
            moment += tl.sum(forth * (s - shift[:, None]), 1)
        if SAME:
            back = tl.trans(slope_of(rows, slopes, tl.trans(s), right, left, IGNORED, T))
        else:
            other = similarities(rows, right, left, PRECISION, ROWS, COLUMNS, STEP, T)
            back = tl.trans(slope_of(rows, slopes, other, right, left, IGNORED, T))
        x = tl.load(rows.features + right.to(tl.int64)[:, None] * rows.width + dims[None, :],
                    mask=(right < rows.count)[:, None] & (dims < rows.width)[None, :], other=0.0)  # fmt: skip
        total = tl.dot(forth + back, x, total, input_precision=PRECISION, out_dtype=T)
    place = gradient + left.to(tl.int64)[:, None] * rows.width + dims[None, :]
    tl.store(place, total, mask=(left < learned)[:, None] & (dims < rows.width)[None, :])
    if slopes.moment is not None:
        if tl.program_id(1) == 0:
            tl.store(slopes.moment + left, moment, mask=left < rows.anchors)


def supcon_stats(
    features: Tensor,
    codes: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    per_positive: Tensor,
    temperature: Tensor,
    anchors: int,
    unit: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each anchor, its shift and its sum of exp; the contract is the reference's."""
    tile = _tile(features, unit, "sums")
    loss, shift, total = (features.new_empty(anchors) for _ in range(3))
    rows = _rows(features, codes, mask, weights, temperature, anchors)
    launch.start(
        sums_kernel, (triton.cdiv(anchors, tile.rows),), (rows, Found(loss, shift, total, per_positive)),
        features.device, tile.warps, tile.stages, IGNORED=IGNORED, PRECISION=_precision(features, unit),
        ROWS=tile.rows, COLUMNS=tile.columns, STEP=tile.step, T=launch.triton_dtype(features.dtype),
    )  # fmt: skip
    return loss, shift, total


def supcon_backward(
    features: Tensor,
    codes: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    per_positive: Tensor,
    temperature: Tensor,
    row_shift: Tensor,
    row_sum: Tensor,
    upstream: Tensor,
    anchors: int,
    learned: int,
    unit: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """dL/dfeatures, zero from row `learned` on, and dL/dtemperature, as `wanted`."""
    tile = _tile(features, unit, "gradient")
    gradient = torch.zeros_like(features)
    moment = features.new_empty(anchors) if wanted[1] else None
    upstream = torch.where(per_positive > 0, upstream, 0.0) / temperature
    slopes = features.new_zeros(3, len(features))
    slopes[0, :anchors] = row_shift
    slopes[1, :anchors] = torch.where(upstream == 0, 0.0, upstream / row_sum)
    slopes[2, :anchors] = upstream * per_positive
    rows = _rows(features, codes, mask, weights, temperature, anchors)
    # A temperature's gradient needs the anchors' rows alone.
    count, width = (learned, features.shape[1]) if wanted[0] else (anchors, 1)
    launch.start(
        gradient_kernel, (triton.cdiv(max(count, anchors if wanted[1] else 0), tile.rows),
                          triton.cdiv(width, tile.block)),
        (rows, Slopes(slopes[0], slopes[1], slopes[2], moment), gradient, learned), features.device, tile.warps,
        tile.stages, IGNORED=IGNORED, PRECISION=_precision(features, unit), SAME=unit, ROWS=tile.rows,
        COLUMNS=tile.columns, STEP=tile.step, BLOCK=tile.block, T=launch.triton_dtype(features.dtype),
        maxnreg=launch.most_registers(tile.warps),
    )  # fmt: skip
    found = [gradient] if wanted[0] else []
    return found if moment is None else [*found, -moment.sum()]


def _rows(
    features: Tensor, codes: Tensor, mask: Tensor | None, weights: Tensor | None, temperature: Tensor, anchors: int
) -> Rows:
    bytes_of_mask = None if mask is None else mask.contiguous().view(torch.uint8)
    count, width = features.shape
    samples = 1 if mask is None else len(mask)
    return Rows(features, count, width, codes, bytes_of_mask, samples, weights, temperature, anchors)


def _tile(features: Tensor, unit: bool, kernel: str) -> launch.ProductTile:
    # Square ones in both kernels alike where a rounding of the similarities counts.
    return launch.product_tile(
        "supcon", kernel if unit else "any length", features.shape[1], features.dtype, features.device
    )


def _precision(features: Tensor, unit: bool) -> str:
    """Three tensor-core products keep float32's digits of cosines; larger values are multiplied in float32 itself."""
    return "tf32x3" if unit and features.dtype == torch.float32 else "ieee"
