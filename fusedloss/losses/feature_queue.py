"""A memory bank: the last rows that were pushed, first in, first out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedloss.core.checks import check_integer
from fusedloss.distributed import gathered
from fusedloss.functional.supcon_arguments import check_features, checked_labels
from fusedloss.losses.settings_repr import SettingsRepr


class FeatureQueue(SettingsRepr):
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
        self.in_features = check_integer("in_features", in_features, at_least=1)
        self.size = check_integer("size", size, at_least=1)
        self.group = group
        self.register_buffer("stored_features", torch.zeros(self.size, self.in_features))
        self.register_buffer("stored_labels", torch.zeros(self.size, dtype=torch.int64))
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
        check_features("features", features, self.in_features, self.stored_features)
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

    def _pieces(self, start: int, count: int) -> list[tuple[int, int, int]]:
        """(where in the queue, first and last of the rows) up to the queue's end, and from its beginning."""
        before = min(count, self.size - start)
        return [(start, 0, before), (0, before, count)]

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self._pushed = int(self.pushed)
