"""A memory bank: the last rows that were pushed, first in, first out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusedloss.distributed import gathered
from fusedloss.functional.supcon_checks import check_features, checked_labels


class FeatureQueue(nn.Module):
    """The last `size` feature rows with their labels, as contrasts for ``fusedloss.supcon``.

    Everything is in ``state_dict()``, so that a resumed run goes on with the same rows. Until it is full, ``features``
    and ``labels`` hold the rows pushed so far. With `group`, each push adds the rows of all ranks, in the order of the
    ranks, and every rank holds the same queue.

    Args:
        in_features: D.
        size: rows kept.
        group: a ``torch.distributed`` process group, or None for this process's rows alone.

    Raises:
        ValueError, TypeError: rows or labels that don't fit.

    Example:
        >>> import torch, fusedloss
        >>> queue = fusedloss.FeatureQueue(in_features=2, size=3)
        >>> for value in (1.0, 2.0):
        ...     queue.push(torch.full((2, 2), value), torch.tensor([0, 1]))
        >>> queue.features[:, 0], queue.labels
        (tensor([2., 1., 2.]), tensor([1, 1, 0]))
    """

    stored_features: Tensor
    stored_labels: Tensor
    pushed: Tensor

    def __init__(self, in_features: int, size: int, group: Any = None) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("size", size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.in_features, self.size, self.group = in_features, size, group
        self.register_buffer("stored_features", torch.zeros(size, in_features))
        self.register_buffer("stored_labels", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))
        # The number of rows ever pushed, known without asking the device.
        self._pushed = 0

    @property
    def features(self) -> Tensor:
        """``(min(pushed, size), D)``, without gradient."""
        return self.stored_features[: min(self._pushed, self.size)]

    @property
    def labels(self) -> Tensor:
        """int64, one for each row of ``features``."""
        return self.stored_labels[: min(self._pushed, self.size)]

    def __len__(self) -> int:
        return min(self._pushed, self.size)

    @torch.no_grad()
    def push(self, features: Tensor, labels: Tensor) -> None:
        """Adds rows ``(B, D)`` with their labels ``(B,)``; the oldest rows make room."""
        check_features("features", features, self.stored_features)
        labels = checked_labels("labels", labels, len(features), self.stored_features)
        if self.group is not None:
            features, labels = gathered(features, self.group), gathered(labels, self.group)
        count = len(features)
        first = max(0, count - self.size)
        start = (self._pushed + first) % self.size
        for place, begin, end in self._pieces(start, count - first):
            self.stored_features[place : place + end - begin] = features[first + begin : first + end]
            self.stored_labels[place : place + end - begin] = labels[first + begin : first + end]
        self._pushed += count
        self.pushed += count

    def reset(self) -> None:
        """Forgets every row."""
        self._pushed = 0
        self.pushed.zero_()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, size={self.size}"

    def _pieces(self, start: int, count: int) -> list[tuple[int, int, int]]:
        """(where in the queue, first and last of the rows) up to the queue's end, and from its beginning."""
        before = min(count, self.size - start)
        return [(start, 0, before), (0, before, count)]

    def _load_from_state_dict(self, state_dict, prefix, *arguments, **keywords) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments, **keywords)
        self._pushed = int(self.pushed)
