"""Centred features in the eigenvectors of their covariance within classes: the Hessian is near diagonal there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fusedloss.train.solvers.rows import RowSource, check_labels

# Rows on which the mean of p (1 - p) is estimated.
_PROBE_ROWS = 8192


class Chunk(NamedTuple):
    """Consecutive rows: features ``(B, R)`` in the basis or ``(B, D)`` centred, labels, and which rows they are."""

    features: Tensor
    labels: Tensor
    rows: slice


@dataclass
class CentredRows:
    """Rows minus their weighted mean, and the eigenvectors of their weighted covariance about the class means.

    Attributes:
        mean: ``(D,)``.
        vectors: ``(D, D)``, an eigenvector per column.
        mass: ``(K,)`` float64, the weight of each class's rows.
        probe: some rows in the basis ``(P, D)``, evenly spaced, and their weights ``(P,)``, which sum to 1.
    """

    source: RowSource
    dtype: torch.dtype
    mean: Tensor
    vectors: Tensor
    mass: Tensor
    probe: tuple[Tensor, Tensor]
    kept: Chunk | None = field(default=None)

    @property
    def rotated(self) -> bool:
        """Whether chunks are in the basis: they are where a copy is kept; others would be rotated at each pass."""
        return self.kept is not None

    def chunks(self) -> Iterator[Chunk]:
        """All rows, in order."""
        if self.kept is not None:
            yield self.kept
            return
        start = 0
        for features, labels in self.source:
            rows = slice(start, start + len(labels))
            yield Chunk(features.to(self.dtype) - self.mean, labels, rows)
            start = rows.stop


def centred_rows(
    source: RowSource, weight: Tensor, num_classes: int, dtype: torch.dtype, keep_bytes: int
) -> CentredRows:
    """Two passes over the rows, and a third where a copy in the basis takes at most `keep_bytes`.

    Args:
        weight: ``(N,)`` float64 weights of the rows.

    Raises:
        ValueError: labels outside ``[0, K)``, features that are not finite, or a source of another length.
    """
    device = weight.device
    sums = torch.zeros(num_classes, source.width, dtype=torch.float64, device=device)
    mass = torch.zeros(num_classes, dtype=torch.float64, device=device)
    start = 0
    for features, labels in source:
        part = weight[start : start + len(labels)]
        _check_chunk(features, labels, len(part), num_classes)
        sums.index_add_(0, labels, part[:, None] * features.double())
        mass.index_add_(0, labels, part)
        start += len(labels)
    if start != len(source):
        raise ValueError(f"rows must yield {len(source)} rows; got {start}")
    if not bool(torch.isfinite(sums).all()):
        raise ValueError("features must be finite; got NaN or infinity")
    total = float(mass.sum())
    mean = (sums.sum(0) / total).to(dtype)
    step = -(-len(source) // _PROBE_ROWS)
    moment = torch.zeros(source.width, source.width, dtype=torch.float64, device=device)
    probes, start = [], 0
    for features, labels in source:
        centred = features.to(dtype) - mean
        probes.append(centred[-start % step :: step])
        scaled = centred * weight[start : start + len(labels), None].to(dtype)
        moment += scaled.t() @ centred
        start += len(labels)
    between = sums - mass[:, None] * mean.double()
    moment -= between.t() @ (between / mass.clamp(min=1e-30)[:, None])
    vectors = torch.linalg.eigh((moment / total).to(dtype)).eigenvectors
    probe_weight = weight[::step]
    probe = torch.cat(probes) @ vectors, (probe_weight / probe_weight.sum()).to(dtype)
    found = CentredRows(source, dtype, mean, vectors, mass, probe)
    if len(source) * source.width * dtype.itemsize <= keep_bytes:
        found.kept = _copy(found)
    return found


def _check_chunk(features: Tensor, labels: Tensor, count: int, num_classes: int) -> None:
    if len(labels) != count or len(features) != count:
        raise ValueError(f"rows must yield as many as their length says; got {len(labels)} labels for {count} rows")
    check_labels(labels, num_classes)


def _copy(rows: CentredRows) -> Chunk:
    count = len(rows.source)
    features = rows.vectors.new_empty(count, rows.source.width)
    labels = torch.empty(count, dtype=torch.int64, device=features.device)
    for chunk in rows.chunks():
        torch.mm(chunk.features, rows.vectors, out=features[chunk.rows])
        labels[chunk.rows] = chunk.labels
    return Chunk(features, labels, slice(0, count))
