"""Tensors as rows: where the classes of every row lie in a tensor (B, K) or (B, K, d) of any strides."""

from __future__ import annotations

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

    def view(self, tensor: torch.Tensor) -> View:
        """`tensor` (B, K) or (B, K, d) as rows."""
        outer, inner = _row_steps(tensor, 1, self.swapped, self.flat)
        return View(tensor, outer // self.align, inner // self.align, tensor.stride(1))

    def label_view(self, labels: torch.Tensor) -> View:
        """`labels` (B,) or (B, d) by rows, in steps of one element."""
        outer, inner = _row_steps(labels, 0, self.swapped, self.flat)
        return View(labels, outer, inner, 0)

    def row_view(self) -> View:
        """Where a row's own values lie in contiguous tensors of the rows' shape."""
        return View(None, 1 if self.swapped else self.inner, self.outer if self.swapped else 1, 0)


# Below this many positions the samples are the run of rows that a tile covers.
_FEWEST_POSITIONS = 32


def layout_of(tensors: Sequence[torch.Tensor], labels: torch.Tensor | None) -> Layout:
    """One layout for `tensors` of one shape (B, K) or (B, K, d) and the labels beside them."""
    shape = tensors[0].shape
    samples, num_classes = shape[0], shape[1]
    positions = shape[2] if len(shape) == 3 else 1
    flat = all(_is_one_run(tensor, 1) for tensor in tensors) and (labels is None or _is_one_run(labels, 0))
    swapped = not flat and positions < min(samples, _FEWEST_POSITIONS)
    steps = [step for tensor in tensors for step in _row_steps(tensor, 1, swapped, flat)]
    align = math.gcd(16, num_classes, *steps)
    outer, inner = (1, samples * positions) if flat else (positions, samples) if swapped else (samples, positions)
    return Layout(outer, inner, num_classes, align, swapped, flat)


def _is_one_run(tensor: torch.Tensor, classes: int) -> bool:
    """Whether one step leads from each row to the next, over sample borders too."""
    if tensor.dim() == 1 + classes or tensor.shape[-1] == 1 or tensor.shape[0] == 1:
        return True
    return tensor.stride(0) == tensor.shape[-1] * tensor.stride(-1)


def _row_steps(tensor: torch.Tensor, classes: int, swapped: bool, flat: bool) -> tuple[int, int]:
    sample = tensor.stride(0)
    position = tensor.stride(-1) if tensor.dim() == 2 + classes else 0
    if flat:
        one_position = tensor.dim() == 1 + classes or tensor.shape[-1] == 1
        return 0, sample if one_position else position
    return (position, sample) if swapped else (sample, position)
