"""A head judged on rows of features, block by block: nothing as large as the rows' logits is ever kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fusedloss.calibration import confidence_error
from fusedloss.metrics import ClassificationScores
from fusedloss.train.predictor import Predictor

TOP_CLASSES = 5


@dataclass(frozen=True)
class Judgement:
    """What is known of the judged rows, in their order.

    ``report`` is a ``metrics.classification_report``; ``scaled_ece`` the calibration error at the fitted temperature,
    NaN without one; labels, predictions, confidences, whether they are right, the nll of the label and the confidence
    at the fitted temperature (NaN without one) ``(N,)``; the first classes and their probabilities ``(N, 5)``.
    """

    report: dict[str, Any]
    scaled_ece: float
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray
    label_nll: np.ndarray
    calibrated_confidence: np.ndarray
    top_class: np.ndarray
    top_probability: np.ndarray


def judge(
    predictor: Predictor,
    features: Any,
    rows: np.ndarray,
    labels: np.ndarray,
    *,
    calibrated: bool = False,
    adjust_prior: float = 0.0,
) -> Judgement:
    """Judge the head on these rows of the features ``(N, D)``, whose labels are `labels`; errors as
    ``Predictor.logits``."""
    num_classes = len(predictor.class_names)
    scores = ClassificationScores(num_classes, predictor.class_names, train_counts=predictor.train_counts)
    temperature = predictor.fitted_temperature
    width = min(TOP_CLASSES, num_classes)
    top_class = np.empty((len(rows), width), dtype=np.int64)
    top_probability = np.empty((len(rows), width), dtype=np.float32)
    predicted, scaled = np.empty(len(rows), dtype=np.int64), np.full(len(rows), np.nan)
    start = 0
    for logits in predictor.logit_blocks(features, calibrated, adjust_prior, rows=rows):
        end = start + len(logits)
        scores.update(logits, labels[start:end])
        probs = torch.softmax(logits.double(), 1)
        top = probs.topk(width, dim=1)
        top_class[start:end], top_probability[start:end] = top.indices.numpy(), top.values.float().numpy()
        predicted[start:end] = probs.argmax(1).numpy()
        if not math.isnan(temperature):
            scaled[start:end] = torch.softmax(logits.double() / temperature, 1).amax(1).numpy()
        start = end
    correct = scores.correct
    scaled_ece = math.nan if math.isnan(temperature) else confidence_error(scaled, correct)
    return Judgement(
        report=scores.report(),
        scaled_ece=scaled_ece,
        labels=labels,
        predicted=predicted,
        confidence=scores.confidence,
        correct=correct,
        label_nll=scores.nll.astype(np.float32),
        calibrated_confidence=scaled.astype(np.float32),
        top_class=top_class,
        top_probability=top_probability,
    )
