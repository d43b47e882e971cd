"""Rows to fit on, chunk by chunk: the same solver reads a tensor in memory and a memory map through a transform."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

# A chunk of float32 features.
_CHUNK_BYTES = 1 << 24


class RowSource(Protocol):
    """Rows in a fixed order, read as often as a solver likes: each pass gives the same chunks."""

    @property
    def width(self) -> int:
        """D, the number of features."""

    def __len__(self) -> int:
        """N, the number of rows."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features ``(B, D)``, floating point, and labels ``(B,)``, int64, of the next rows."""


class TensorRows:
    """Features ``(N, D)`` and labels ``(N,)`` that are in memory, on one device.

    Raises:
        ValueError, TypeError: shapes, types or devices that don't fit.

    >>> import torch
    >>> rows = TensorRows(torch.eye(3), torch.tensor([0, 1, 1]))
    >>> len(rows), rows.width
    (3, 3)
    """

    def __init__(self, features: Tensor, labels: Tensor, chunk_rows: int | None = None) -> None:
        if features.dim() != 2 or not features.is_floating_point():
            raise ValueError(f"features must be (N, D) in floating point; got {tuple(features.shape)} {features.dtype}")
        if labels.shape != features.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(f"labels must be int64 ({len(features)},); got {labels.dtype} {tuple(labels.shape)}")
        if labels.device != features.device:
            raise ValueError(f"labels must be on {features.device}; got {labels.device}")
        self.features, self.labels = features, labels
        self.chunk_rows = chunk_rows or _chunk_rows(features.shape[1])

    @property
    def width(self) -> int:
        return self.features.shape[1]

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.features.split(self.chunk_rows), self.labels.split(self.chunk_rows), strict=True)


class ArrayRows:
    """Some rows of an array ``(M, D)``, such as a memory map, each chunk through `transform` to float32.

    Args:
        features: anything that ``features[indices]`` reads rows of, with a ``shape``.
        labels: ``(M,)`` integers.
        rows: ``(N,)`` row numbers, in the order of reading (sorted is fastest); None for all.
        transform: from raw float32 features ``(B, D)`` on the device to prepared ones ``(B, D')``; None for none.
        device: where chunks go.
        chunk_rows: rows of a chunk; None: some 16 MB.

    >>> import numpy as np
    >>> rows = ArrayRows(np.eye(4, dtype=np.float16), np.array([0, 1, 0, 1]), np.array([1, 3]))
    >>> [(features.shape, labels.tolist()) for features, labels in rows]
    [(torch.Size([2, 4]), [1, 1])]
    """

    def __init__(
        self,
        features: Any,
        labels: Any,
        rows: np.ndarray | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str = "cpu",
        chunk_rows: int | None = None,
    ) -> None:
        self.features, self.transform, self.device = features, transform, torch.device(device)
        self.rows = np.arange(features.shape[0]) if rows is None else np.asarray(rows)
        self.labels = torch.from_numpy(np.asarray(labels)[self.rows].astype(np.int64)).to(self.device)
        self.chunk_rows = chunk_rows or _chunk_rows(features.shape[1])
        self.width = self._read(slice(0, 1)).shape[1] if transform is not None else int(features.shape[1])

    def __len__(self) -> int:
        return len(self.rows)

    def _read(self, part: slice) -> Tensor:
        read = torch.from_numpy(np.asarray(self.features[self.rows[part]], dtype=np.float32)).to(self.device)
        return read if self.transform is None else self.transform(read)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.rows), self.chunk_rows):
            part = slice(start, start + self.chunk_rows)
            yield self._read(part), self.labels[part]


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise ValueError for a label of a chunk outside ``[0, K)``."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"labels must be in [0, {num_classes}); got {int(labels.min())} to {int(labels.max())}")


def _chunk_rows(width: int) -> int:
    return max(256, _CHUNK_BYTES // (4 * max(1, width)))
