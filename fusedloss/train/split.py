"""Rows for training, validation and test, such that no group is on two sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fusedloss.features.checks import as_fraction, as_integer, as_numpy


@dataclass(frozen=True)
class Split:
    """Sorted row numbers of the three parts."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def split_rows(
    labels: Any,
    groups: Any,
    *,
    test_fraction: float = 0.2,
    val_fraction: float = 0.1,
    seed: int = 42,
) -> Split:
    """Split rows by group, or class by class when there are no groups; the same seed gives the same split.

    With groups, the fractions are shares of the groups (``sklearn.model_selection.GroupShuffleSplit``), and
    the test groups do not depend on ``val_fraction``. Without, each class keeps at least one row in training.

    Args:
        labels: class of each row ``(N,)``, integers or strings.
        groups: group of each row ``(N,)``, integers or strings, or None.
        test_fraction, val_fraction: shares of all groups (or rows), their sum below 1; 0 leaves a part empty.
        seed: of the shuffling, in ``[0, 2**32)``.

    Raises:
        ValueError, TypeError: arguments out of range, or fewer groups than parts.

    Example:
        >>> split = split_rows(np.zeros(10, int), np.arange(10))
        >>> len(split.train), len(split.val), len(split.test)
        (7, 1, 2)
    """
    labels = _column("labels", labels)
    groups = None if groups is None else _column("groups", groups, len(labels))
    test_fraction, val_fraction = as_fraction("test_fraction", test_fraction), as_fraction("val_fraction", val_fraction)
    if test_fraction + val_fraction >= 1:
        raise ValueError(f"test_fraction + val_fraction must be below 1; got {test_fraction} + {val_fraction}")
    seed = as_integer("seed", seed, 0, 2**32)
    order = np.arange(len(labels))
    share = val_fraction / (1 - test_fraction)
    if groups is None:
        test = _per_class(labels, order, test_fraction, np.random.RandomState(seed))
        remaining = np.setdiff1d(order, test)
        val = _per_class(labels, remaining, share, np.random.RandomState((seed + 1) % 2**32))
    else:
        test = _whole_groups(groups, order, test_fraction, seed)
        remaining = np.setdiff1d(order, test)
        val = _whole_groups(groups, remaining, share, seed + 1)
    return Split(np.setdiff1d(remaining, val), val, test)


def _column(name: str, values: Any, num_rows: int | None = None) -> np.ndarray:
    array = as_numpy(values, name)
    if array.ndim != 1 or len(array) == 0 or (num_rows is not None and len(array) != num_rows):
        shape = "(N,) with N at least 1" if num_rows is None else f"({num_rows},), one per label"
        raise ValueError(f"{name} must have shape {shape}; got {array.shape}")
    if array.dtype.kind not in "iuUS":
        raise TypeError(f"{name} must be integers or strings; got {array.dtype}")
    return array


def _whole_groups(groups: np.ndarray, rows: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    from sklearn.model_selection import GroupShuffleSplit

    if fraction == 0:
        return np.empty(0, dtype=np.int64)
    if len(np.unique(groups[rows])) < 2:
        raise ValueError(
            f"groups must number at least one for each part of the split; got {len(np.unique(groups))} in all"
        )
    shuffle = GroupShuffleSplit(n_splits=1, test_size=fraction, random_state=seed % 2**32)
    return np.sort(rows[next(shuffle.split(rows, groups=groups[rows]))[1]])


def _per_class(labels: np.ndarray, rows: np.ndarray, fraction: float, random: np.random.RandomState) -> np.ndarray:
    chosen = []
    for label in np.unique(labels[rows]):
        members = rows[labels[rows] == label]
        # Random rounding keeps the expected share of classes too small for a whole row
        count = int(np.floor(fraction * len(members) + random.random_sample()))
        chosen.append(random.permutation(members)[: min(count, len(members) - 1)])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)
