"""Calibration errors of predicted probabilities, and the temperature that repairs them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedloss.core.checks import as_labels, as_tensor, check_choice, check_integer
from fusedloss.temperature import BLOCK_ELEMENTS, ELEMENTS_IN_FLOAT64, Blocks, TemperatureFit, fit_to_blocks

KINDS = ("ece", "adaptive", "over", "under", "classwise")


@dataclass(frozen=True)
class ReliabilityBins:
    """Per bin: number of samples, mean confidence and accuracy (NaN in an empty bin), all ``(bins,)``."""

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def calibration_error(probs: Any, labels: Any, n_bins: int = 15, kind: str = "ece") -> float:
    """Binned gap between confidence and accuracy, ``sum_b n_b / N |accuracy_b - confidence_b|``.

    Bins are ``(low, high]`` of equal width; a confidence of 0 belongs to the first bin, 1 to the last.

    Args:
        probs: probabilities ``(N, K)``; a tensor or an array.
        labels: class indices ``(N,)``.
        n_bins: number of bins.
        kind: ``"ece"``; ``"over"`` and ``"under"``, its signed halves (they add up to it); ``"adaptive"``,
            bins of equal mass, where equal confidences share one bin; ``"classwise"``, the mean over all K
            classes of the gap of each column of probabilities.

    Returns:
        The error as a fraction; NaN when there is no sample.

    Raises:
        ValueError: wrong shapes, values that are not probabilities, ``n_bins`` below 1, or an unknown
            ``kind``.
        IndexError: a label outside ``[0, K)``.

    Source: Naeini et al. 2015 (ece), Nixon et al. 2019 (adaptive, classwise).

    Example:
        >>> calibration_error([[1.0, 0.0], [1.0, 0.0]], [0, 1])
        0.5
    """
    check_choice("kind", kind, KINDS)
    n_bins = check_integer("n_bins", n_bins, at_least=1)
    probs, labels = checked_probabilities(probs, labels)
    if len(labels) == 0:
        return math.nan
    if kind == "classwise":
        columns = range(probs.shape[1])
        errors = [_gap(_equal_width(probs[:, k], n_bins), probs[:, k], labels == k, "ece") for k in columns]
        return float(np.mean(errors))
    return confidence_error(probs.max(axis=1), probs.argmax(axis=1) == labels, n_bins, kind)


def confidence_error(confidence: np.ndarray, correct: np.ndarray, n_bins: int = 15, kind: str = "ece") -> float:
    """``calibration_error`` of confidences ``(N,)`` in [0, 1] and whether each prediction is right, but classwise."""
    if len(confidence) == 0:
        return math.nan
    bins = _equal_mass(confidence, n_bins) if kind == "adaptive" else _equal_width(confidence, n_bins)
    return _gap(bins, confidence, correct, kind)


def reliability_bins(probs: Any, labels: Any, n_bins: int = 15) -> ReliabilityBins:
    """Count, confidence and accuracy of each equal-width confidence bin: what a reliability diagram draws.

    Args:
        probs, labels, n_bins: as in ``calibration_error``.

    Example:
        >>> reliability_bins([[1.0, 0.0], [0.75, 0.25]], [0, 1], n_bins=2).accuracy
        array([nan, 0.5])
    """
    n_bins = check_integer("n_bins", n_bins, at_least=1)
    probs, labels = checked_probabilities(probs, labels)
    return confidence_bins(probs.max(axis=1), probs.argmax(axis=1) == labels, n_bins)


def confidence_bins(confidence: np.ndarray, correct: np.ndarray, n_bins: int = 15) -> ReliabilityBins:
    """``reliability_bins`` of confidences ``(N,)`` in [0, 1] and whether each prediction is right."""
    bins = _equal_width(confidence, n_bins)
    count = np.bincount(bins, minlength=n_bins)
    with np.errstate(invalid="ignore"):
        return ReliabilityBins(
            count,
            np.bincount(bins, confidence, n_bins) / count,
            np.bincount(bins, correct, n_bins) / count,
        )


def fit_temperature(
    logits: Tensor | Blocks,
    labels: Tensor | None = None,
    *,
    max_iterations: int = 100,
    start: float | None = None,
) -> TemperatureFit:
    """Temperature T in [0.01, 100] that minimises the negative log-likelihood of ``softmax(logits / T)``.

    The likelihood is convex in ``1 / T``; a safeguarded iteration on its first four derivatives finds its one optimum,
    from that of a sample of rows. Dividing by one temperature never changes the predicted class. Rows are worked
    through in blocks: a pass or two in float32 where they are many, all in float64 where they are few or float64.

    Args:
        logits: ``(N, K)``, held out from training; or a function that gives, each time it is called, an iterable of
            blocks ``(logits, labels)`` of all rows, so that the logits need never be in memory together.
        labels: int64 ``(N,)``; None with a function.
        max_iterations: passes over the rows at most.
        start: a first guess of T, such as the temperature of a sample; a good one saves a pass over a function's rows.

    Returns:
        A ``TemperatureFit``; ``converged`` is False when T stopped at a bound (all right, all wrong, or no
        signal).

    Raises:
        ValueError: wrong shapes, no sample, or logits that are not finite.
        IndexError: a label outside ``[0, K)``.

    Source: Guo et al., ICML 2017.

    Example:
        >>> z = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
        >>> round(fit_temperature(z, torch.tensor([0, 0, 1])).temperature, 3)   # 2 / log 2
        2.885
    """
    max_iterations = check_integer("max_iterations", max_iterations, at_least=1)
    if start is not None and not (isinstance(start, Real) and 0.0 < start < math.inf):
        raise ValueError(f"start must be a temperature above 0 or None; got {start!r}")
    if callable(logits) and not isinstance(logits, Tensor):
        if labels is not None:
            raise TypeError(f"labels must be None where logits are a function; got {type(labels).__name__}")
        return fit_to_blocks(logits, max_iterations, start)
    logits = as_tensor("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape (N, K); got {tuple(logits.shape)}")
    target = as_labels("labels", labels, logits.shape[:1], logits.shape[1]).to(logits.device)
    rows = max(1, BLOCK_ELEMENTS // logits.shape[1])
    if logits.numel() <= ELEMENTS_IN_FLOAT64:
        logits = logits.double()
    return fit_to_blocks(lambda: zip(logits.split(rows), target.split(rows), strict=True), max_iterations, start)


def checked_probabilities(probs: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Float64 probabilities ``(N, K)`` and int64 labels ``(N,)``, or an error that says what is wrong."""
    values = as_tensor("probs", probs).to(dtype=torch.float64, device="cpu")
    if values.dim() != 2 or values.shape[1] == 0:
        raise ValueError(f"probs must have shape (N, K); got {tuple(values.shape)}")
    good = torch.isfinite(values).all(1) & (values >= 0).all(1) & ((values.sum(1) - 1).abs() <= 1e-2)
    if not bool(good.all()):
        row = int((~good).nonzero()[0])
        raise ValueError(
            f"probs must be probabilities, at least 0 and with rows that sum to 1; got the sum "
            f"{float(values[row].sum()):g} in row {row}, least value {float(values[row].min()):g}"
        )
    return values.numpy(), as_labels("labels", labels, values.shape[:1], values.shape[1]).cpu().numpy()


def _equal_width(confidence: np.ndarray, n_bins: int) -> np.ndarray:
    edges = np.linspace(0.0, 1.0, n_bins + 1)
    return np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, n_bins - 1)


def _equal_mass(confidence: np.ndarray, n_bins: int) -> np.ndarray:
    order = np.sort(confidence)
    # a value belongs to the bin of its first occurrence, so ties are never split
    return np.searchsorted(order, confidence, side="left") * min(n_bins, len(order)) // len(order)


def _gap(bins: np.ndarray, confidence: np.ndarray, correct: np.ndarray, kind: str) -> float:
    gap = (np.bincount(bins, confidence) - np.bincount(bins, correct)) / len(bins)
    if kind == "over":
        gap = gap.clip(min=0)
    elif kind == "under":
        gap = (-gap).clip(min=0)
    return float(np.abs(gap).sum())
