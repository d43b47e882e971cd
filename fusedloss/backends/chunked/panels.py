"""Logits kept where the gradient of the weight will be, until each panel of classes turns into its own gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fusedloss.backends.chunked.head import ChunkedHead, HeadGradients

# Classes of a panel: fewer make products less efficient, more leave the cache between the products that share them.
# No power of two, or rows would meet in the cache.
_PANEL_CLASSES = 1264
# Products of so many rows take little longer, row by row, than those of all; measured at 384 to 1024 features.
_ROWS_WORTH_A_CHUNK = 320
# Rows swept at a time stay in the cache; sums over rows are added up once for each such group.
_GROUP_BYTES = 1 << 22
_GROUP_BYTES_WITH_SUMS = 1 << 24


class Panels:
    """The logits of all rows, no more than features are wide: formed, swept some rows at a time, and multiplied.

    Each panel but the first lies a panel below its classes, in the memory of the weight's gradient. So a panel's
    gradient overwrites what is left of the panel after it: the last panel is multiplied first.
    """

    def __init__(self, head: ChunkedHead, sums: HeadGradients) -> None:
        assert sums.weight is not None
        self.head, self.sums = head, sums
        self.count, self.width = head.inputs.input.shape
        self.num_classes = len(head.operand)
        self.rows = head.rows(slice(0, self.count))
        self.first = sums.weight.new_empty(self.count, min(_PANEL_CLASSES, self.num_classes))
        self.memory = sums.weight.view(-1)

    @staticmethod
    def worthwhile(head: ChunkedHead, sums: HeadGradients) -> bool:
        """Whether all rows fit, and chunks of rows would be several and short."""
        rows, width = head.inputs.input.shape
        if sums.weight is None or not head.most_rows < rows <= width:
            return False
        on_cpu = head.inputs.input.device.type == "cpu"
        return on_cpu and head.most_rows < _ROWS_WORTH_A_CHUNK and head.dtype == head.compute_dtype

    def _classes(self) -> list[slice]:
        firsts = range(0, self.num_classes, _PANEL_CLASSES)
        return [slice(first, min(first + _PANEL_CLASSES, self.num_classes)) for first in firsts]

    def _panel(self, classes: slice) -> Tensor:
        """``(rows, classes of the panel)``."""
        if classes.start == 0:
            return self.first
        place, size = (classes.start - _PANEL_CLASSES) * self.width, self.count * (classes.stop - classes.start)
        return self.memory[place : place + size].view(self.count, -1)

    def _pairs(self, part: slice, group: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The logits of some rows, and where they are in `group` ``(rows, K)``."""
        size = _PANEL_CLASSES
        yield self.first[part], group[:, : self.first.shape[1]]
        whole = self.num_classes // size
        if whole > 1:
            panels = self.memory[: (whole - 1) * size * self.width].view(whole - 1, -1)[:, : self.count * size]
            yield (
                panels.view(whole - 1, self.count, size)[:, part].transpose(0, 1),
                group[:, size : whole * size].view(len(group), whole - 1, size),
            )
        if whole and whole * size < self.num_classes:
            yield self._panel(slice(whole * size, self.num_classes))[part], group[:, whole * size :]

    def form(self) -> None:
        """Writes all logits."""
        for classes in self._classes():
            torch.mm(self.rows, self.head.operand[classes].t(), out=self._panel(classes))

    def groups(self, with_sums: bool) -> Iterator[tuple[slice, Tensor]]:
        """Some rows and their logits ``(rows, K)``; what is there at the next step goes back as their gradient."""
        size = _GROUP_BYTES_WITH_SUMS if with_sums else _GROUP_BYTES
        most = max(1, size // (self.num_classes * self.head.dtype.itemsize))
        buffer = self.head.prepared(self.head.operand.new_empty(min(most, self.count), self.num_classes))
        for first in range(0, self.count, most):
            part = slice(first, min(first + most, self.count))
            group = buffer[: part.stop - part.start]
            for kept, place in self._pairs(part, group):
                place.copy_(kept)
            yield part, group
            for kept, place in self._pairs(part, group):
                kept.copy_(place)

    def multiply(self, finish: Callable[[slice], None]) -> None:
        """Forms both gradients; calls `finish` with each panel's classes while their gradient is in the cache."""
        operand, of_weight = self.head.operand, self.sums.weight
        of_input = None if self.sums.input is None else self.sums.input.zero_()
        assert of_weight is not None
        for classes in reversed(self._classes()):
            grad_logits = self._panel(classes)
            if of_input is not None:
                torch.addmm(of_input, grad_logits, operand[classes], out=of_input)
            torch.mm(grad_logits.t(), self.rows, out=of_weight[classes])
            finish(classes)
        self.sums.started = True
