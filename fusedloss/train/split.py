"""Rows for training, validation and test, such that no group is on two sides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Split:
    """Sorted row numbers of the three parts."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def split_rows(
    labels: np.ndarray,
    groups: np.ndarray | None,
    *,
    test_fraction: float = 0.2,
    val_fraction: float = 0.1,
    seed: int = 42,
) -> Split:
    """Split rows by group, or class by class when there are no groups; the same seed gives the same split.

    With groups, the fractions are shares of the groups (``sklearn.model_selection.GroupShuffleSplit``), and
    the test groups do not depend on ``val_fraction``. Without, each class keeps at least one row in training.

    Args:
        labels: class of each row ``(N,)``.
        groups: group of each row ``(N,)``, or None.
        test_fraction, val_fraction: shares of all groups (or rows); 0 leaves a part empty.
        seed: of the shuffling.

    Raises:
        ValueError: too few groups for the parts asked for.

    Example:
        >>> split = split_rows(np.zeros(10, int), np.arange(10))
        >>> len(split.train), len(split.val), len(split.test)
        (7, 1, 2)
    """
    order = np.arange(len(labels))
    if groups is None:
        test = _per_class(labels, order, test_fraction, np.random.RandomState(seed))
        rest = np.setdiff1d(order, test)
        share = val_fraction / (1 - test_fraction)
        val = _per_class(labels, rest, share, np.random.RandomState(seed + 1))
    else:
        test = _whole_groups(groups, order, test_fraction, seed)
        rest = np.setdiff1d(order, test)
        val = _whole_groups(groups, rest, val_fraction / (1 - test_fraction), seed + 1)
    return Split(np.setdiff1d(rest, val), val, test)


def _whole_groups(groups: np.ndarray, rows: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    from sklearn.model_selection import GroupShuffleSplit

    if fraction == 0:
        return np.empty(0, dtype=np.int64)
    if len(np.unique(groups[rows])) < 2:
        raise ValueError(
            f"groups must number at least one for each part of the split, got {len(np.unique(groups))} in all"
        )
    shuffle = GroupShuffleSplit(n_splits=1, test_size=fraction, random_state=seed % 2**32)
    return np.sort(rows[next(shuffle.split(rows, groups=groups[rows]))[1]])


def _per_class(labels: np.ndarray, rows: np.ndarray, fraction: float, random: np.random.RandomState) -> np.ndarray:
    chosen = []
    for label in np.unique(labels[rows]):
        members = rows[labels[rows] == label]
        # random rounding keeps the expected share of classes too small for a whole row
        count = int(np.floor(fraction * len(members) + random.random_sample()))
        chosen.append(random.permutation(members)[: min(count, len(members) - 1)])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)
