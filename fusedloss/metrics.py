"""What a long-tailed classifier is judged by, from logits or probabilities and labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedloss.calibration import calibration_error, checked_probabilities
from fusedloss.core.checks import as_labels, as_tensor

MANY_ABOVE, FEW_UP_TO = 100, 20


def classification_report(
    logits_or_probs: Any,
    labels: Any,
    class_names: Sequence[str] | None = None,
    background_prefix: str = "__bg_",
    train_counts: Any = None,
) -> dict[str, Any]:
    """Accuracy, macro and weighted scores, recall by class frequency and calibration of one set of predictions.

    ``F1_c = 2 TP / (2 TP + FP + FN)`` over all samples. Foreground (``_fg``) means take the classes that have
    a sample or a prediction and whose name does not start with ``background_prefix``; a 0/0 precision or
    recall among them counts 0, as in scikit-learn with ``zero_division=0``. ``bal_acc`` is the mean recall of
    all classes with a sample. ``rec_many``, ``rec_med`` and ``rec_few`` are mean recalls of classes with more
    than 100, 21 to 100, and at most 20 training samples.

    Args:
        logits_or_probs: ``(N, K)``; rows that are non-negative and sum to 1 are taken as probabilities.
        labels: class indices ``(N,)``.
        class_names: K names; needed to recognise background classes.
        background_prefix: prefix of background class names; ``""`` treats no class as background.
        train_counts: training samples per class ``(K,)``; without them the ``rec_*`` entries are NaN.

    Returns:
        ``n, top1, top5, bal_acc, macro_f1_fg, weighted_f1_fg, macro_p_fg, macro_r_fg, rec_many, rec_med,
        rec_few, ece15, aece15, o_ece, u_ece, nll`` (fractions; nll in nats), ``k_many, k_med, k_few``
        (classes behind the recalls), and ``per_class``: a list of dicts with ``index, name, support,
        predicted, train_count, precision, recall, f1``.

    Raises:
        ValueError: shapes or lengths that do not fit, logits that are NaN.
        IndexError: a label outside ``[0, K)``.

    Example:
        >>> report = classification_report([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]], [0, 1, 1])
        >>> round(report["top1"], 3), round(report["macro_f1_fg"], 3)
        (0.667, 0.667)
    """
    probs, labels = checked_probabilities(to_probabilities(logits_or_probs), labels)
    num_classes = probs.shape[1]
    names = _names(class_names, num_classes)
    if not isinstance(background_prefix, str):
        raise TypeError(f"background_prefix must be a string; got {type(background_prefix).__name__}")
    counts = None if train_counts is None else as_tensor("train_counts", train_counts).cpu().numpy()
    if counts is not None and counts.shape != (num_classes,):
        raise ValueError(f"train_counts must have shape ({num_classes},), one value per class; got {counts.shape}")
    per_class = class_scores(probs.argmax(1), labels, num_classes)
    background = [bool(background_prefix) and name.startswith(background_prefix) for name in names]
    report: dict[str, Any] = {
        "n": len(labels),
        "top1": _top_k(probs, labels, 1),
        "top5": _top_k(probs, labels, 5),
    }
    report |= summary_scores(per_class, np.array(background))
    report |= _recall_by_frequency(per_class, counts)
    report |= {
        "ece15": calibration_error(probs, labels),
        "aece15": calibration_error(probs, labels, kind="adaptive"),
        "o_ece": calibration_error(probs, labels, kind="over"),
        "u_ece": calibration_error(probs, labels, kind="under"),
        "nll": negative_log_likelihood(logits_or_probs, labels),
    }
    report["per_class"] = [
        {
            "index": k,
            "name": names[k],
            "support": int(per_class["support"][k]),
            "predicted": int(per_class["predicted"][k]),
            "train_count": None if counts is None else int(counts[k]),
            "precision": float(per_class["precision"][k]),
            "recall": float(per_class["recall"][k]),
            "f1": float(per_class["f1"][k]),
        }
        for k in range(num_classes)
    ]
    return report


def class_scores(prediction: np.ndarray, labels: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """Support, predictions, precision, recall (0/0 is 0) and F1 (NaN for an absent class), each ``(K,)``."""
    support = np.bincount(labels, minlength=num_classes)
    predicted = np.bincount(prediction, minlength=num_classes)
    hits = np.bincount(labels[prediction == labels], minlength=num_classes)
    with np.errstate(invalid="ignore"):
        return {
            "support": support,
            "predicted": predicted,
            "precision": hits / np.maximum(predicted, 1),
            "recall": hits / np.maximum(support, 1),
            "f1": 2 * hits / (support + predicted),
        }


def summary_scores(per_class: dict[str, np.ndarray], background: np.ndarray | None = None) -> dict[str, float]:
    """Balanced accuracy over classes with a sample, and macro and weighted scores over foreground classes."""
    support = per_class["support"]
    seen = (support > 0) | (per_class["predicted"] > 0)
    foreground = seen if background is None else seen & ~background
    f1, weight = per_class["f1"][foreground], support[foreground]
    return {
        "bal_acc": _mean(per_class["recall"][support > 0]),
        "macro_f1_fg": _mean(f1),
        "weighted_f1_fg": float((f1 * weight).sum() / weight.sum()) if weight.sum() else math.nan,
        "macro_p_fg": _mean(per_class["precision"][foreground]),
        "macro_r_fg": _mean(per_class["recall"][foreground]),
    }


def to_probabilities(logits_or_probs: Any) -> np.ndarray:
    """Float64 probabilities ``(N, K)``: rows that already are some stay, others go through the softmax."""
    values = _as_float64(logits_or_probs)
    return values.numpy() if _are_probabilities(values) else torch.softmax(values, dim=1).numpy()


def negative_log_likelihood(logits_or_probs: Any, labels: Any) -> float:
    """Mean ``-log p_y`` in nats: from logits without rounding p to 0, from probabilities as they are."""
    values = _as_float64(logits_or_probs)
    if len(values) == 0:
        return math.nan
    target = as_labels("labels", labels, values.shape[:1], values.shape[1]).cpu()
    log_p = values.log() if _are_probabilities(values) else torch.log_softmax(values, dim=1)
    return float(-log_p.gather(1, target[:, None]).mean())


def _as_float64(values: Any) -> Tensor:
    tensor = as_tensor("logits_or_probs", values).to(dtype=torch.float64, device="cpu")
    if tensor.dim() != 2 or tensor.shape[1] == 0:
        raise ValueError(f"logits_or_probs must have shape (N, K); got {tuple(tensor.shape)}")
    if bool(torch.isnan(tensor).any()):
        rows = torch.isnan(tensor).any(1).nonzero()[:5, 0].tolist()
        raise ValueError(f"logits_or_probs must hold no NaN; got some in rows {rows}")
    return tensor


def _are_probabilities(values: Tensor) -> bool:
    return bool((values >= 0).all()) and bool(((values.sum(1) - 1).abs() < 1e-3).all())


def _names(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    if class_names is None:
        return [str(k) for k in range(num_classes)]
    if isinstance(class_names, str) or not isinstance(class_names, Iterable):
        raise TypeError(f"class_names must be a sequence of {num_classes} strings; got {type(class_names).__name__}")
    names = [str(name) for name in class_names]
    if len(names) != num_classes:
        raise ValueError(f"class_names must be {num_classes} strings, one per class; got {len(names)}")
    return names


def _top_k(probs: np.ndarray, labels: np.ndarray, k: int) -> float:
    if len(labels) == 0:
        return math.nan
    if k == 1:
        return float((probs.argmax(1) == labels).mean())
    best = torch.from_numpy(probs).topk(min(k, probs.shape[1]), dim=1).indices.numpy()
    return float((best == labels[:, None]).any(1).mean())


def _recall_by_frequency(per_class: dict[str, np.ndarray], counts: np.ndarray | None) -> dict[str, float]:
    if counts is None:
        return {
            f"{kind}_{band}": (math.nan if kind == "rec" else 0)
            for kind in ("rec", "k")
            for band in ("many", "med", "few")
        }
    tested = per_class["support"] > 0
    bands = {
        "many": counts > MANY_ABOVE,
        "med": (counts > FEW_UP_TO) & (counts <= MANY_ABOVE),
        "few": counts <= FEW_UP_TO,
    }
    recalls = {f"rec_{band}": _mean(per_class["recall"][tested & chosen]) for band, chosen in bands.items()}
    return recalls | {f"k_{band}": int((tested & chosen).sum()) for band, chosen in bands.items()}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
