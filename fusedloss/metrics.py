"""What a long-tailed classifier is judged by, from logits or probabilities and labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedloss.calibration import checked_probabilities, confidence_error
from fusedloss.core.checks import as_labels, as_tensor, check_integer
from fusedloss.temperature import BLOCK_ELEMENTS

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
    values = as_tensor("logits_or_probs", logits_or_probs)
    if values.dim() != 2 or values.shape[1] == 0:
        raise ValueError(f"logits_or_probs must have shape (N, K); got {tuple(values.shape)}")
    labels = as_labels("labels", labels, values.shape[:1], values.shape[1])
    rows = max(1, BLOCK_ELEMENTS // values.shape[1])
    scores = ClassificationScores(
        values.shape[1], class_names, background_prefix, train_counts,
        probabilities=all(_are_probabilities(block) for block in _blocks(values, rows)),
    )  # fmt: skip
    for block, target in zip(_blocks(values, rows), labels.cpu().split(rows), strict=True):
        scores.update(block, target)
    return scores.report()


class ClassificationScores:
    """``classification_report`` of predictions that come in blocks: ``update`` with each, then ``report``.

    Of a row it keeps its confidence, its likelihood and whether it is right: 17 bytes, whatever the number of classes.

    Args:
        num_classes: K.
        class_names, background_prefix, train_counts: as in ``classification_report``.
        probabilities: blocks are probabilities instead of logits.

    Raises:
        ValueError, TypeError: arguments that do not fit the number of classes.

    Example:
        >>> scores = ClassificationScores(2)
        >>> scores.update([[2.0, 0.0], [0.0, 1.0]], [0, 1])
        >>> scores.update([[3.0, 0.0]], [1])
        >>> round(scores.report()["top1"], 3)
        0.667
    """

    def __init__(
        self,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        background_prefix: str = "__bg_",
        train_counts: Any = None,
        *,
        probabilities: bool = False,
    ) -> None:
        self.num_classes = check_integer("num_classes", num_classes, at_least=1)
        self.names = _names(class_names, num_classes)
        if not isinstance(background_prefix, str):
            raise TypeError(f"background_prefix must be a string; got {type(background_prefix).__name__}")
        self.background = np.array(
            [bool(background_prefix) and name.startswith(background_prefix) for name in self.names]
        )
        self.counts = None if train_counts is None else as_tensor("train_counts", train_counts).cpu().numpy()
        if self.counts is not None and self.counts.shape != (num_classes,):
            raise ValueError(
                f"train_counts must have shape ({num_classes},), one value per class; got {self.counts.shape}"
            )
        self.probabilities = probabilities
        self.support, self.predicted, self.hits = (np.zeros(num_classes, dtype=np.int64) for _ in range(3))
        self.rows = self.among_five = 0
        self._confidence: list[np.ndarray] = []
        self._correct: list[np.ndarray] = []
        self._nll: list[np.ndarray] = []

    def update(self, logits: Any, labels: Any) -> None:
        """Add a block of logits (or probabilities) ``(n, K)`` and labels ``(n,)``; errors as the report's."""
        values = _as_float64(logits, self.rows)
        if values.shape[1] != self.num_classes:
            raise ValueError(f"logits must have shape (n, {self.num_classes}); got {tuple(values.shape)}")
        given = values if self.probabilities else torch.softmax(values, dim=1)
        probs, target = checked_probabilities(given, labels)
        if len(target) == 0:
            return
        best = torch.from_numpy(probs).topk(min(5, self.num_classes), dim=1).indices.numpy()
        prediction = probs.argmax(1)
        correct = prediction == target
        self.support += np.bincount(target, minlength=self.num_classes)
        self.predicted += np.bincount(prediction, minlength=self.num_classes)
        self.hits += np.bincount(target[correct], minlength=self.num_classes)
        self.rows += len(target)
        self.among_five += int((best == target[:, None]).any(1).sum())
        self._confidence.append(probs.max(axis=1))
        self._correct.append(correct)
        log_p = values.log() if self.probabilities else torch.log_softmax(values, dim=1)
        self._nll.append(-log_p.gather(1, torch.from_numpy(target)[:, None])[:, 0].numpy())

    @property
    def confidence(self) -> np.ndarray:
        """The largest probability of each row so far, float64."""
        return np.concatenate([np.empty(0), *self._confidence])

    @property
    def correct(self) -> np.ndarray:
        """Whether the prediction of each row so far is right."""
        return np.concatenate([np.empty(0, dtype=bool), *self._correct])

    @property
    def nll(self) -> np.ndarray:
        """Minus the log probability of each row's label so far, float64, in nats."""
        return np.concatenate([np.empty(0), *self._nll])

    def report(self) -> dict[str, Any]:
        """What ``classification_report`` returns, of all blocks together."""
        per_class = scores_of_counts(self.support, self.predicted, self.hits)
        confidence, correct, rows = self.confidence, self.correct, self.rows
        report: dict[str, Any] = {
            "n": rows,
            "top1": int(correct.sum()) / rows if rows else math.nan,
            "top5": self.among_five / rows if rows else math.nan,
        }
        report |= summary_scores(per_class, self.background)
        report |= _recall_by_frequency(per_class, self.counts)
        report |= {
            "ece15": confidence_error(confidence, correct),
            "aece15": confidence_error(confidence, correct, kind="adaptive"),
            "o_ece": confidence_error(confidence, correct, kind="over"),
            "u_ece": confidence_error(confidence, correct, kind="under"),
            "nll": _mean(self.nll),
        }
        report["per_class"] = [self._class_row(k, per_class) for k in range(self.num_classes)]
        return report

    def _class_row(self, k: int, per_class: dict[str, np.ndarray]) -> dict[str, Any]:
        return {
            "index": k,
            "name": self.names[k],
            "support": int(self.support[k]),
            "predicted": int(self.predicted[k]),
            "train_count": None if self.counts is None else int(self.counts[k]),
            "precision": float(per_class["precision"][k]),
            "recall": float(per_class["recall"][k]),
            "f1": float(per_class["f1"][k]),
        }


def class_scores(prediction: np.ndarray, labels: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """Support, predictions, precision, recall (0/0 is 0) and F1 (NaN for an absent class), each ``(K,)``."""
    support = np.bincount(labels, minlength=num_classes)
    predicted = np.bincount(prediction, minlength=num_classes)
    hits = np.bincount(labels[prediction == labels], minlength=num_classes)
    return scores_of_counts(support, predicted, hits)


def scores_of_counts(support: np.ndarray, predicted: np.ndarray, hits: np.ndarray) -> dict[str, np.ndarray]:
    """``class_scores`` from the numbers of rows, predictions and right predictions of each class, each ``(K,)``."""
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


def negative_log_likelihood(logits_or_probs: Any, labels: Any) -> float:
    """Mean ``-log p_y`` in nats: from logits without rounding p to 0, from probabilities as they are."""
    values = _as_float64(logits_or_probs)
    if len(values) == 0:
        return math.nan
    target = as_labels("labels", labels, values.shape[:1], values.shape[1]).cpu()
    log_p = values.log() if _are_probabilities(values) else torch.log_softmax(values, dim=1)
    return float(-log_p.gather(1, target[:, None]).mean())


def _as_float64(values: Any, first_row: int = 0) -> Tensor:
    tensor = as_tensor("logits_or_probs", values).to(dtype=torch.float64, device="cpu")
    if tensor.dim() != 2 or tensor.shape[1] == 0:
        raise ValueError(f"logits_or_probs must have shape (N, K); got {tuple(tensor.shape)}")
    wrong = torch.isnan(tensor).any(1)
    if bool(wrong.any()):
        rows = (first_row + wrong.nonzero()[:5, 0]).tolist()
        raise ValueError(f"logits_or_probs must hold no NaN; got some in rows {rows}")
    return tensor


def _blocks(values: Tensor, rows: int) -> Iterator[Tensor]:
    for start, block in zip(range(0, max(1, len(values)), rows), values.split(rows), strict=True):
        yield _as_float64(block, start)


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
