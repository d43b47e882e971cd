"""Sums and squares of features by class on a GPU: one pass over the features, without atomics.

A stable sort of the labels brings the rows of a class together. Each class is cut into chunks of so many
rows, a program sums one chunk, and another adds a class's chunks in order: no program sees two classes, so
that one class with most of the rows, or rows that come sorted, cost what even ones do. The number of chunks
is bounded without asking the device. What follows (``update_class_stats``, ``moments``) is small, and PyTorch's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedloss.backends.reference.class_stats import moments as moments
from fusedloss.backends.reference.class_stats import update_class_stats as update_class_stats
from fusedloss.backends.reference.class_stats import usable_rows
from fusedloss.core.checks import check_labels
from fusedloss.core.dtypes import compute_dtype

from . import launch


class Features(NamedTuple):
    """Features (row, column) at pointer + row * row_step + column * column_step; `width` columns."""

    pointer: Any
    row_step: int
    column_step: int
    width: int


class Chunks(NamedTuple):
    """Rows by class: `order` lists them, first_row[c]..first_row[c + 1] are class c's; so with chunks."""

    order: Any
    first_row: Any
    first_chunk: Any
    class_of: Any  # (chunks,): at least the number of classes where there is no such chunk


class Centers(NamedTuple):
    """What is subtracted: shift (K, D), or a new class's first row, which is then written there."""

    shift: Any
    seen: Any


@triton.jit
def read_features(features, rows, columns, mask, T: tl.constexpr):
    place = rows.to(tl.int64)[:, None] * features.row_step + (columns.to(tl.int64) * features.column_step)[None, :]
    return tl.load(features.pointer + place, mask=mask, other=0.0).to(T)


@triton.jit
def center_of(features, chunks, centers, class_index, first_row, before, columns, T: tl.constexpr):
    """The class's shift; the first chunk of a new class writes it, and no chunk reads what is written."""
    inside = columns < features.width
    seen = tl.load(centers.seen + class_index)
    new = tl.where(inside, seen, 1) == 0
    place = centers.shift + class_index * features.width + columns
    known = tl.load(place, mask=tl.where(inside, seen, 0) != 0, other=0.0)
    first = tl.load(chunks.order + first_row + tl.zeros([1], tl.int64))
    row = tl.sum(read_features(features, first, columns, new[None, :], T), 0)
    tl.store(place, row, mask=tl.where(new, before, 1) == 0)
    return tl.where(new, row, known)


@triton.jit
def chunk_kernel(features, chunks, centers, sums, squares, num_classes, blocks, PER_FEATURE: tl.constexpr,
                 T: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Sum and square of f - center over the rows of one chunk, for one block of columns."""
    chunk = tl.program_id(0).to(tl.int64)
    class_index = tl.load(chunks.class_of + chunk)
    if class_index < num_classes:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < features.width
        first_row = tl.load(chunks.first_row + class_index)
        before = chunk - tl.load(chunks.first_chunk + class_index)
        center = center_of(features, chunks, centers, class_index, first_row, before, columns, T)
        begin = first_row + before * CHUNK
        end = tl.minimum(begin + CHUNK, tl.load(chunks.first_row + class_index + 1))
        total = tl.zeros([ROWS, BLOCK], T)
        square = tl.zeros([ROWS, BLOCK], T)
        for step in range(0, CHUNK, ROWS):
            places = begin + step + tl.arange(0, ROWS)
            live = places < end
            rows = tl.load(chunks.order + places, mask=live, other=0)
            mask = live[:, None] & inside[None, :]
            deviation = tl.where(mask, read_features(features, rows, columns, mask, T) - center[None, :], 0.0)
            total += deviation
            square += deviation * deviation
        tl.store(sums + chunk * features.width + columns, tl.sum(total, 0), mask=inside)
        if PER_FEATURE:
            tl.store(squares + chunk * features.width + columns, tl.sum(square, 0), mask=inside)
        else:
            tl.store(squares + chunk * blocks + tl.program_id(1), tl.sum(tl.sum(square, 0), 0))


@triton.jit
def add_chunks(parts, first, last, width, columns, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    # In float64: the error of a sum doesn't grow with the number of rows.
    total = tl.zeros([CHUNKS, BLOCK], tl.float64)
    for start in range(first, last, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        mask = (chunk < last)[:, None] & (columns < width)[None, :]
        place = chunk.to(tl.int64)[:, None] * width + columns[None, :]
        total += tl.load(parts + place, mask=mask, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def class_kernel(
    chunks, sums, squares, total, square, width, blocks, PER_FEATURE: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the chunks of one class, for one block of columns, in order."""
    class_index = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    first = tl.load(chunks.first_chunk + class_index)
    last = tl.load(chunks.first_chunk + class_index + 1)
    place = class_index * width + columns
    class_sum = add_chunks(sums, first, last, width, columns, CHUNKS, BLOCK)
    tl.store(total + place, class_sum.to(total.dtype.element_ty), mask=inside)
    if PER_FEATURE:
        class_square = add_chunks(squares, first, last, width, columns, CHUNKS, BLOCK)
        tl.store(square + place, class_square.to(square.dtype.element_ty), mask=inside)
    else:
        if tl.program_id(1) == 0:
            # One number for each chunk and block of columns: the class's lie in one run.
            one = add_chunks(squares, first * blocks, last * blocks, 1, tl.arange(0, 1), BLOCK, 1)
            tl.store(square + class_index, tl.sum(one, 0).to(square.dtype.element_ty))


def class_stats(
    features: Tensor, labels: Tensor, shift: Tensor, seen: Tensor, ignore_index: int, per_feature: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row count, sum and square of each class's features about its shift; the contract is the reference's."""
    num_classes, width = shift.shape
    if labels.device.type == "cpu":
        check_labels(labels, num_classes, ignore_index)
    tile = launch.feature_tile(width, features.dtype, features.device)
    labelled, usable = labels != ignore_index, usable_rows(features)
    count, chunks = _chunks(torch.where(labelled & usable, labels, num_classes), num_classes, tile.chunk)
    own_shift = shift.contiguous()
    blocks = triton.cdiv(width, tile.block)
    total = shift.new_empty(shift.shape)
    square = shift.new_empty(shift.shape if per_feature else num_classes)
    most = len(chunks.class_of)
    sums = shift.new_empty(most, width)
    squares = shift.new_empty(most, width if per_feature else blocks)
    view = Features(features, features.stride(0), features.stride(1), width)
    launch.start(
        chunk_kernel, (most, blocks),
        (view, chunks, Centers(own_shift, seen.contiguous()), sums, squares, num_classes, blocks),
        shift.device, tile.warps, tile.stages,
        PER_FEATURE=per_feature, T=launch.triton_dtype(shift.dtype), ROWS=tile.rows, BLOCK=tile.block,
        CHUNK=tile.chunk,
    )  # fmt: skip
    launch.start(
        class_kernel, (num_classes, blocks), (chunks, sums, squares, total, square, width, blocks),
        shift.device, tile.warps, tile.stages, PER_FEATURE=per_feature, CHUNKS=tile.rows, BLOCK=tile.block,
    )  # fmt: skip
    if own_shift is not shift:
        shift.copy_(own_shift)
    return count, total, square, (labelled & ~usable).sum()


def _chunks(labels: Tensor, num_classes: int, chunk: int) -> tuple[Tensor, Chunks]:
    """Row count of each class, and its rows in the order of the batch, cut into chunks of at most `chunk`."""
    by_class, order = torch.where(labels < 0, num_classes, labels).clamp(max=num_classes).sort(stable=True)
    bounds = torch.arange(num_classes + 1, device=labels.device)
    first_row = torch.searchsorted(by_class, bounds)
    count = first_row.diff()
    last_chunk = ((count + chunk - 1) // chunk).cumsum(0)
    first_chunk = torch.cat([last_chunk.new_zeros(1), last_chunk])
    most = min(len(labels), num_classes) + len(labels) // chunk
    class_of = torch.searchsorted(last_chunk, torch.arange(most, device=labels.device), right=True)
    return count, Chunks(order, first_row, first_chunk, class_of)


def row_magnitudes(rows: Tensor) -> Tensor:
    magnitudes: Tensor = torch.linalg.vector_norm(rows, 1, dim=1, dtype=compute_dtype(rows.dtype))
    return magnitudes
