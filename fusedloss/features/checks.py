"""The checks that every array of a feature bank passes, whoever made it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fusedloss.features.manifest import BankError

ROWS_PER_BLOCK = 8192
NAMED_ROWS = 5


def as_numpy(array: Any) -> np.ndarray:
    """A numpy array from a numpy array, a tensor (bfloat16 becomes float32) or nested sequences."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        return (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    return np.asarray(array)


def integer_vector(name: str, values: Any, num_rows: int) -> np.ndarray:
    """`values` as int64 `(num_rows,)`; BankError says what came instead."""
    array = as_numpy(values)
    if array.ndim != 1 or len(array) != num_rows:
        raise BankError(f"{name} must have shape ({num_rows},), one per row of features; got {array.shape}")
    if not np.issubdtype(array.dtype, np.integer):
        raise BankError(f"{name} must be integers; got {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.int64)


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        shown = ", ".join(f"row {row}: {labels[row]}" for row in wrong[:NAMED_ROWS])
        raise BankError(f"labels must lie in [0, {num_classes}); {len(wrong)} do not ({shown})")


def check_finite(features: np.ndarray, paths: Sequence[str] | None = None, first_row: int = 0, note: str = "") -> None:
    """Refuse NaN and infinite features, naming the first rows (their paths too) and how many there are."""
    wrong: list[int] = []
    for start in range(0, len(features), ROWS_PER_BLOCK):
        finite = np.isfinite(features[start : start + ROWS_PER_BLOCK]).all(axis=1)
        wrong += (np.flatnonzero(~finite) + start + first_row).tolist()
    if wrong:
        shown = ", ".join(f"row {row}" + (f" ({paths[row]})" if paths else "") for row in wrong[:NAMED_ROWS])
        more = ", ..." if len(wrong) > NAMED_ROWS else ""
        raise BankError(f"features hold NaN or infinite values in {len(wrong)} rows: {shown}{more}{note}")
