"""Which rows an epoch goes through, and in which order."""

from __future__ import annotations

import torch
from torch import Tensor


class RowOrder:
    """Every row once in a fresh order, or as many rows drawn so that all classes are equally likely.

    Its state is its generator's: draws go on where a checkpoint left them.
    """

    def __init__(self, labels: Tensor, seed: int, balanced: bool) -> None:
        self.rows, self.balanced = len(labels), balanced
        self.generator = torch.Generator().manual_seed(seed)
        if balanced:
            on_host = labels.cpu()
            self.by_class = on_host.argsort(stable=True)
            _, self.counts = on_host.unique(return_counts=True)
            self.first = self.counts.cumsum(0) - self.counts

    def epoch(self) -> Tensor:
        """int64 row numbers, on the CPU."""
        if not self.balanced:
            return torch.randperm(self.rows, generator=self.generator)
        chosen = torch.randint(len(self.counts), (self.rows,), generator=self.generator)
        place = torch.rand(self.rows, generator=self.generator, dtype=torch.float64) * self.counts[chosen]
        return self.by_class[self.first[chosen] + place.long()]
