"""Is a mean of paired differences more than chance? Intervals and p-values from several variances; Holm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

# A t quantile with one degree of freedom is 12.7, so two runs or splits say next to nothing.
LEAST = 3
CONFIDENCE = 0.95


class Variance(NamedTuple):
    """Estimated variance of a mean from one source, and its degrees of freedom."""

    value: float
    freedom: float


@dataclass(frozen=True)
class GroupNoise:
    """Variance of the mean difference of one split over draws of its test groups.

    ``groups`` are those in which the two sides differ: a variance rests on no more of them.
    """

    variance: float
    groups: int


@dataclass(frozen=True)
class Comparison:
    """A mean paired difference: its interval, its two-sided p-value, and what both rest on.

    ``tested`` is ``"splits"``, ``"seeds and test groups"``, ``"seeds"``, or ``""`` where there is too little to test
    anything; then ``needed`` says what is missing, and interval and p-value are NaN.
    """

    mean: float
    low: float
    high: float
    p: float
    pairs: int
    splits: int
    tested: str
    needed: str = ""


def compare(
    by_split: Mapping[Any, Sequence[float] | np.ndarray],
    *,
    test_over_train: float = 0.0,
    group_noise: GroupNoise | str | None = None,
    confidence: float = CONFIDENCE,
) -> Comparison:
    """Test whether paired differences have mean 0.

    A difference is that of two runs with the same seed and split. Runs of one split share its test rows, so their
    number says nothing about other test rows, and each case has its own sources of chance:

    * Three splits or more: a mean per split, and Student's t over the splits. Random splits of one bank overlap in
      their training rows, so the variance is ``(1 / splits + test_over_train) S^2`` (Nadeau and Bengio, Machine
      Learning 52, 2003).
    * One split, three seeds or more: the variance over seeds (``seeds - 1`` degrees of freedom) and that over test
      groups, ``group_noise``, are added as in ``interval``. The result holds for this one training set.
    * Anything else is not tested.

    Args:
        by_split: the differences of each split.
        test_over_train: test rows over training rows of a split.
        group_noise: for one split; None where test rows have no part in the metric, a string that says why it is not
            known.
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: a confidence or a share out of range.

    Example:
        >>> found = compare({1: [0.02, 0.03], 2: [0.03, 0.01], 3: [0.02, 0.04]}, test_over_train=0.3)
        >>> found.tested, round(found.mean, 3), round(found.p, 3)
        ('splits', 0.025, 0.024)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1); got {confidence}")
    if not (math.isfinite(test_over_train) and test_over_train >= 0):
        raise ValueError(f"test_over_train must be finite and at least 0; got {test_over_train}")
    each = {split: np.asarray(values, dtype=np.float64) for split, values in by_split.items() if len(values)}
    pairs = sum(map(len, each.values()))
    means = np.array([values.mean() for values in each.values()])
    mean = float(means.mean()) if len(means) else math.nan
    needed = _needed(each, mean, group_noise)
    if needed:
        return Comparison(mean, math.nan, math.nan, math.nan, pairs, len(each), "", needed)
    if len(each) >= LEAST:
        tested, parts = "splits", [_variance_of_mean(means, 1 / len(means) + test_over_train)]
    else:
        (values,) = each.values()
        tested, parts = "seeds", [_variance_of_mean(values, 1 / len(values))]
        if isinstance(group_noise, GroupNoise) and group_noise.groups > 0:
            tested = "seeds and test groups"
            parts.append(Variance(group_noise.variance, group_noise.groups - 1))
    half = interval(parts, confidence)
    return Comparison(mean, mean - half, mean + half, p_value(mean, parts), pairs, len(each), tested)


def interval(parts: Iterable[Variance], confidence: float = CONFIDENCE) -> float:
    """Half the width of a confidence interval of a mean whose variance is a sum of estimated parts.

    ``h^2 = sum_i t_i^2 V_i`` with the t quantile of each part's degrees of freedom. The chance to miss the mean is at
    most ``1 - confidence``, whatever the parts' sizes: the distribution function of chi-square with one degree of
    freedom is concave (Banerjee, Sankhya 22, 1960; Welch's approximation may exceed its level).
    """
    return _half_width(parts, 1 - confidence)


def p_value(mean: float, parts: Sequence[Variance]) -> float:
    """The least level at which ``interval`` leaves out 0: two-sided, 1 for a mean of 0."""
    from scipy.optimize import brentq

    if mean == 0:
        return 1.0
    if not any(part.value for part in parts):
        return 0.0

    def excess(log_level: float) -> float:
        return _half_width(parts, 10**log_level) - abs(mean)

    least, most = -30.0, -1e-12
    if excess(least) < 0:
        return 0.0
    return 1.0 if excess(most) > 0 else float(10 ** brentq(excess, least, most, xtol=1e-9))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values of one family of tests: the chance of any false rejection stays below the level.

    NaN is no test and stays NaN. Source: Holm, Scandinavian Journal of Statistics 6, 1979.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted = [math.nan] * len(p_values)
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _half_width(parts: Iterable[Variance], level: float) -> float:
    from scipy.special import stdtrit

    return math.sqrt(sum(part.value * float(stdtrit(part.freedom, level / 2)) ** 2 for part in parts if part.value))


def _variance_of_mean(values: np.ndarray, factor: float) -> Variance:
    # Equal values differ by rounding in their mean.
    spread = 0.0 if (values == values[0]).all() else float(values.var(ddof=1))
    return Variance(factor * spread, len(values) - 1)


def _needed(each: Mapping[Any, np.ndarray], mean: float, group_noise: GroupNoise | str | None) -> str:
    """What is missing for a test, empty for nothing."""
    if not each:
        return "runs with the same seed and split on both sides"
    if math.isnan(mean):
        return "a value in every run"
    if len(each) == 1:
        seeds = len(next(iter(each.values())))
        if seeds < LEAST:
            return f"{LEAST} seeds (has {seeds}) or {LEAST} splits"
        if isinstance(group_noise, str):
            return f"{LEAST} splits, or test groups: {group_noise}"
        if isinstance(group_noise, GroupNoise) and group_noise.groups == 1:
            return f"{LEAST} splits, or predictions that differ in 2 test groups (do in 1)"
        return ""
    return "" if len(each) >= LEAST else f"{LEAST} splits (has {len(each)})"
