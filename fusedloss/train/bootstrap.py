"""Scores of one run over draws of its test groups with replacement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fusedloss.metrics import FEW_UP_TO, MANY_ABOVE

DRAWS, LEAST_DRAWS = 1000, 200
# Numbers of a block of draws, and of all draws: many groups get fewer of them.
BLOCK, BUDGET = 2**23, 2**25
BINS = 15
BANDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rec_many": lambda counts: counts > MANY_ABOVE,
    "rec_med": lambda counts: (counts > FEW_UP_TO) & (counts <= MANY_ABOVE),
    "rec_few": lambda counts: counts <= FEW_UP_TO,
}
PREDICTED = ("macro_f1_fg", "weighted_f1_fg", "macro_p_fg")
CALIBRATION = ("ece15", "o_ece", "u_ece", "ece15_ts")
METRICS = ("top1", "top5", "bal_acc", "macro_r_fg", *PREDICTED, *BANDS, *CALIBRATION, "nll")


@dataclass(frozen=True)
class Predictions:
    """What a run said of its test rows.

    Per row ``(n,)``: its number in the bank, label, group, predicted class, whether the label is among the five most
    probable, the largest probability before and after calibration (NaN without one), and ``-log p_label``. Per class
    ``(K,)``: training rows, and whether it is a foreground class.
    """

    row: np.ndarray
    label: np.ndarray
    group: np.ndarray
    predicted: np.ndarray
    among_five: np.ndarray
    confidence: np.ndarray
    calibrated_confidence: np.ndarray
    label_nll: np.ndarray
    train_counts: np.ndarray
    foreground: np.ndarray

    @cached_property
    def num_groups(self) -> int:
        return len(np.unique(self.group))

    @cached_property
    def values(self) -> dict[str, float]:
        """Each of ``METRICS`` on the test rows as they are."""
        scores = self._scores(self._group_sums(), np.ones((1, self.num_groups)))
        return {name: float(value[0]) for name, value in scores.items()}

    @cached_property
    def draws(self) -> dict[str, np.ndarray]:
        """Each of ``METRICS`` on every draw of test groups.

        Runs of one split get the same draws, so that their differences can be taken draw by draw.
        """
        sums = self._group_sums()
        blocks = [self._scores(sums, weights) for weights in _draws(self.num_groups)]
        return {name: np.concatenate([block[name] for block in blocks]) for name in METRICS}

    def differing_groups(self, other: Predictions, metric: str) -> np.ndarray:
        """Group codes in which the two runs differ in what the metric looks at."""
        if metric in (*CALIBRATION, "nll"):
            differs = np.ones(len(self.label), dtype=bool)
        elif metric == "top5":
            differs = self.among_five != other.among_five
        else:
            differs = self.predicted != other.predicted
            if metric not in PREDICTED:
                differs &= (self.predicted == self.label) | (other.predicted == self.label)
            if metric in BANDS:
                differs &= BANDS[metric](self.train_counts)[self.label]
        return np.unique(self._code[differs])

    @cached_property
    def _code(self) -> np.ndarray:
        return np.unique(self.group, return_inverse=True)[1]

    def _group_sums(self) -> dict[str, Any]:
        """Sparse (groups, columns): sums over the rows of a group, from which every score follows."""
        from scipy.sparse import csr_matrix

        num_classes, ones = len(self.train_counts), np.ones(len(self.label))
        hit = (self.predicted == self.label).astype(np.float64)

        def sums(column: np.ndarray, value: np.ndarray, columns: int) -> Any:
            return csr_matrix((value, (self._code, column)), shape=(self.num_groups, columns))

        single = np.zeros(len(self.label), dtype=np.int64)
        result = {
            "support": sums(self.label, ones, num_classes),
            "predicted": sums(self.predicted, ones, num_classes),
            "hits": sums(self.label, hit, num_classes),
            "top5": sums(single, self.among_five.astype(np.float64), 1),
            "nll": sums(single, self.label_nll.astype(np.float64), 1),
        }
        for name, confidence in (("gap", self.confidence), ("gap_ts", self.calibrated_confidence)):
            known = np.nan_to_num(confidence, nan=0.0)
            # Bins are (low, high] as in calibration_error.
            bins = np.clip(np.ceil(known * BINS).astype(np.int64) - 1, 0, BINS - 1)
            result[name] = sums(bins, hit - confidence, BINS)
        return result

    def _scores(self, group_sums: dict[str, Any], weights: np.ndarray) -> dict[str, np.ndarray]:
        """Every score for each line of group weights ``(draws, groups)``."""
        sums = {name: np.asarray((matrix.T @ weights.T).T) for name, matrix in group_sums.items()}
        support, predicted, hits = sums["support"], sums["predicted"], sums["hits"]
        total = support.sum(1)
        tested, foreground = support > 0, ((support > 0) | (predicted > 0)) & self.foreground
        with np.errstate(invalid="ignore", divide="ignore"):
            recall = hits / np.maximum(support, 1)
            f1 = np.where(foreground, 2 * hits / (support + predicted), 0.0)
            weight = np.where(foreground, support, 0.0)
            scores = {
                "top1": hits.sum(1) / total,
                "top5": sums["top5"][:, 0] / total,
                "bal_acc": _masked_mean(recall, tested),
                "macro_f1_fg": _masked_mean(f1, foreground),
                "weighted_f1_fg": (f1 * weight).sum(1) / weight.sum(1),
                "macro_p_fg": _masked_mean(hits / np.maximum(predicted, 1), foreground),
                "macro_r_fg": _masked_mean(recall, foreground),
                "nll": sums["nll"][:, 0] / total,
            }
            for name, band in BANDS.items():
                scores[name] = _masked_mean(recall, tested & band(self.train_counts))
            gap = sums["gap"] / total[:, None]
            scores["ece15"] = np.abs(gap).sum(1)
            scores["o_ece"] = np.maximum(-gap, 0).sum(1)
            scores["u_ece"] = np.maximum(gap, 0).sum(1)
            scores["ece15_ts"] = np.abs(sums["gap_ts"] / total[:, None]).sum(1)
        return scores


def number_of_draws(groups: int) -> int:
    """How many draws there are of so many groups."""
    return int(np.clip(BUDGET // max(groups, 1), LEAST_DRAWS, DRAWS))


def _draws(groups: int) -> Iterator[np.ndarray]:
    """Blocks ``(draws, groups)`` of how often each group is drawn, always the same."""
    random, left = np.random.default_rng(0), number_of_draws(groups)
    while left > 0:
        lines = min(left, max(1, BLOCK // groups))
        drawn = random.integers(0, groups, (lines, groups)) + groups * np.arange(lines)[:, None]
        yield np.bincount(drawn.ravel(), minlength=lines * groups).reshape(lines, groups).astype(np.float64)
        left -= lines


def _masked_mean(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.asarray((values * mask).sum(1) / mask.sum(1))
