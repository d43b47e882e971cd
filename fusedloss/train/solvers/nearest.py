"""k nearest neighbours among stored rows."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from fusedloss.core.checks import check_choice, check_integer, check_number
from fusedloss.core.normalize import unit_rows
from fusedloss.train.solvers.rows import RowSource, check_labels

# Similarities of some queries to some stored rows.
_BLOCK_BYTES = 1 << 25
_QUERIES = 1024


class NearestNeighbours(nn.Module):
    """Votes of the k most similar stored rows, each ``exp(similarity / temperature)``.

    The similarity is the cosine, or minus half the squared distance. Logits are the logarithms of
    ``(1 - smoothing) * votes_k / votes + smoothing / K``.

    Args:
        rows: features and labels in ``[0, K)``, which are stored in float32.
        num_classes: K.
        k: at least 1; no more than there are rows count.
        temperature: positive; infinity gives every neighbour one vote.
        metric: ``"cosine"`` or ``"euclidean"``.
        smoothing: in (0, 1); without it a class that no neighbour has would have logit -inf.

    Raises:
        ValueError, TypeError: arguments out of range, labels that are no class, no row.

    Source: Wu et al. 2018, arXiv:1805.01978 (weighted votes); ``sklearn.neighbors.KNeighborsClassifier``.

    >>> import torch
    >>> from fusedloss.train.solvers.rows import TensorRows
    >>> rows = TensorRows(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
    >>> NearestNeighbours(rows, 2, k=2)(torch.tensor([[2.0, 0.1]])).argmax(1)
    tensor([0])
    """

    features: Tensor
    labels: Tensor
    centre: Tensor

    def __init__(
        self,
        rows: RowSource,
        num_classes: int,
        k: int = 20,
        temperature: float = 0.07,
        metric: Literal["cosine", "euclidean"] = "cosine",
        smoothing: float = 0.01,
    ) -> None:
        super().__init__()
        check_integer("num_classes", num_classes, at_least=1)
        check_integer("k", k, at_least=1)
        if temperature != math.inf:
            check_number("temperature", temperature, above=0.0)
        check_choice("metric", metric, ("cosine", "euclidean"))
        check_number("smoothing", smoothing, above=0.0, below=1.0)
        if len(rows) == 0:
            raise ValueError("rows must number at least 1; got 0")
        self.num_classes, self.k, self.temperature = num_classes, k, temperature
        self.metric, self.smoothing = metric, smoothing
        chunks = [(features.float(), labels) for features, labels in rows]
        features, labels = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        check_labels(labels, num_classes)
        # Squared distances in float32 lose what a common offset takes
        centre = features.double().mean(0).float() if metric == "euclidean" else torch.zeros_like(features[0])
        self.register_buffer("centre", centre)
        self.register_buffer("features", unit_rows(features) if metric == "cosine" else features - centre)
        self.register_buffer("labels", labels)

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(B, K)`` of features ``(B, D)``."""
        if features.dim() != 2 or features.shape[1] != self.features.shape[1]:
            raise ValueError(f"features must be (B, {self.features.shape[1]}); got {tuple(features.shape)}")
        parts = [self._logits(part) for part in features.float().split(_QUERIES)]
        return torch.cat(parts) if parts else features.new_empty(0, self.num_classes, dtype=torch.float32)

    def _logits(self, queries: Tensor) -> Tensor:
        similarity, index = self._nearest(queries)
        # The nearest has weight 1: nothing overflows at a small temperature
        weight = ((similarity - similarity[:, :1]) / self.temperature).exp().double()
        votes = weight.new_zeros(len(queries), self.num_classes).scatter_add_(1, self.labels[index], weight)
        share = votes / votes.sum(1, keepdim=True)
        return torch.log((1 - self.smoothing) * share + self.smoothing / self.num_classes).float()

    def _nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities ``(B, k)``, falling, and the numbers of the stored rows."""
        queries = unit_rows(queries) if self.metric == "cosine" else queries - self.centre
        best: Tensor | None = None
        index = torch.empty(0, dtype=torch.int64)
        size = max(self.k, _BLOCK_BYTES // (4 * max(1, len(queries))))
        for start in range(0, len(self.features), size):
            found, place = self._similarity(queries, self.features[start : start + size]).topk(
                min(self.k, len(self.features) - start, size), dim=1
            )
            place = place + start
            if best is not None:
                found, place = torch.cat([best, found], 1), torch.cat([index, place], 1)
                found, order = found.topk(min(self.k, found.shape[1]), dim=1)
                place = place.gather(1, order)
            best, index = found, place
        assert best is not None
        return best, index

    def _similarity(self, queries: Tensor, stored: Tensor) -> Tensor:
        if self.metric == "cosine":
            return queries @ stored.t()
        half = 0.5 * stored.square().sum(1)
        return torch.addmm(half, queries, stored.t(), beta=-1).sub_(0.5 * queries.square().sum(1, keepdim=True))
