"""Which rows an epoch goes through, and in which order."""

from __future__ import annotations

import torch
from torch import Tensor


class RowOrder:
    """Every row once in a fresh order, or as many rows drawn so that all classes are equally likely.

    Drawn on the labels' device. Its state is its generator's: draws go on where a checkpoint left them.
    """

    def __init__(self, labels: Tensor, seed: int, balanced: bool) -> None:
        self.rows, self.balanced = len(labels), balanced
        self.generator = torch.Generator(labels.device).manual_seed(seed)
        if balanced:
            self.by_class = labels.argsort(stable=True)
            _, self.counts = labels.unique(return_counts=True)
            self.first = self.counts.cumsum(0) - self.counts

    def epoch(self) -> Tensor:
        """int64 row numbers."""
        generator, device = self.generator, self.generator.device
        if not self.balanced:
            return torch.randperm(self.rows, generator=generator, device=device)
        chosen = torch.randint(len(self.counts), (self.rows,), generator=generator, device=device)
        place = torch.rand(self.rows, generator=generator, dtype=torch.float64, device=device)
        place *= self.counts[chosen]
        return self.by_class[self.first[chosen] + place.long()]
