"""Tensors as rows: where the classes of every row lie in a tensor (B, K) or (B, K, d) of any strides."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class View(NamedTuple):
    """A tensor by rows: element (outer, inner, class) lies at
    pointer + (outer * outer_step + inner * inner_step) * ALIGN + class * class_step."""

    pointer: Any
    outer_step: Any
    inner_step: Any
    class_step: Any


class Layout(NamedTuple):
    """The rows of all tensors of one call: `outer` x `inner` rows of `num_classes`."""

    outer: int
    inner: int
    num_classes: int
    align: int  # divides every row step and the number of classes, so that loads are as wide as memory allows
    swapped: bool  # outer counts positions and inner samples
    flat: bool  # samples and positions are one run of rows


class Steps(NamedTuple):
    """View without its pointer."""

    outer_step: int
    inner_step: int
    class_step: int


class Places(NamedTuple):
    """Where the rows of a call lie: of each tensor, of the labels, and of contiguous tensors of the rows' shape."""

    layout: Layout
    steps: tuple[Steps, ...]
    label_steps: Steps | None
    row_view: View


# Below this many positions the samples are the run of rows that a tile covers.
_FEWEST_POSITIONS = 32


def places_of(tensors: Sequence[torch.Tensor], labels: torch.Tensor | None) -> Places:
    """One layout for `tensors` of one shape (B, K) or (B, K, d) and the labels (B,) or (B, d) beside them."""
    strides = tuple(tensor.stride() for tensor in tensors)
    return _places(tensors[0].shape, strides, None if labels is None else labels.stride())


# Training asks for the same few again and again, and waits for the answer.
@functools.lru_cache(4096)
def _places(
    shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], label_stride: tuple[int, ...] | None
) -> Places:
    samples, num_classes = shape[0], shape[1]
    positions = shape[2] if len(shape) == 3 else 1
    # Without its classes a tensor has the shape of the labels.
    by_rows = [(*stride[:1], *stride[2:]) for stride in strides]
    of_labels = [] if label_stride is None else [label_stride]
    flat = all(_is_one_run(samples, positions, stride) for stride in by_rows + of_labels)
    swapped = not flat and positions < min(samples, _FEWEST_POSITIONS)
    steps = [_row_steps(positions, stride, swapped, flat) for stride in by_rows]
    align = math.gcd(16, num_classes, *(step for pair in steps for step in pair))
    outer, inner = (1, samples * positions) if flat else (positions, samples) if swapped else (samples, positions)
    layout = Layout(outer, inner, num_classes, align, swapped, flat)
    wide = tuple(
        Steps(pair[0] // align, pair[1] // align, stride[1]) for pair, stride in zip(steps, strides, strict=True)
    )
    label_steps = None if label_stride is None else Steps(*_row_steps(positions, label_stride, swapped, flat), 0)
    row_view = View(None, 1 if swapped else inner, outer if swapped else 1, 0)
    return Places(layout, wide, label_steps, row_view)


def _is_one_run(samples: int, positions: int, stride: tuple[int, ...]) -> bool:
    """Whether one step leads from each row to the next, over sample borders too."""
    return len(stride) == 1 or positions == 1 or samples == 1 or stride[0] == positions * stride[-1]


def _row_steps(positions: int, stride: tuple[int, ...], swapped: bool, flat: bool) -> tuple[int, int]:
    sample, position = stride[0], stride[-1] if len(stride) == 2 else 0
    if flat:
        return 0, sample if len(stride) == 1 or positions == 1 else position
    return (position, sample) if swapped else (sample, position)
