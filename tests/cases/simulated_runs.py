"""Runs never trained: logits of a long-tailed test set, partly common to a split, partly new with each seed."""

import numpy as np

from fusedloss.metrics import classification_report
from fusedloss.train.bootstrap import Predictions
from fusedloss.train.report import RunKey, StoredRun

CLASSES, ROWS, ROWS_PER_GROUP = 12, 600, 2
TRAIN_COUNTS = np.array([400, 300, 200, 120, 90, 60, 40, 25, 18, 12, 8, 5])


def simulated_runs(splits, seeds, *, gain=0.0, split_noise=0.0, seed=0):
    """Runs by split and seed; ``gain`` is added to the true class's logit of every row.

    Runs of one split share the rows and what is hard about them. ``split_noise`` moves the gain from split to split.
    """
    runs = {}
    for split in range(splits):
        shared = np.random.default_rng((seed, split))
        labels = shared.choice(CLASSES, ROWS, p=TRAIN_COUNTS / TRAIN_COUNTS.sum())
        base = 1.6 * np.eye(CLASSES)[labels] + np.log(TRAIN_COUNTS / TRAIN_COUNTS.sum()) / 3
        base = base + np.repeat(shared.normal(size=(ROWS // ROWS_PER_GROUP, CLASSES)), ROWS_PER_GROUP, axis=0)
        own = np.random.default_rng((seed, split, 1, round(1000 * gain)))
        gained = (gain + split_noise * own.normal()) * np.eye(CLASSES)[labels]
        for number in range(seeds):
            # What a seed changes: every logit a little, the classes' offsets, and how sure the head is.
            noise = 0.12 * own.normal(size=base.shape) + 0.05 * own.normal(size=CLASSES)
            logits = (base + gained + noise) * np.exp(0.01 * own.normal())
            runs[RunKey(split, number)] = simulated_run(logits, labels, np.arange(ROWS) // ROWS_PER_GROUP)
    return runs


def simulated_run(logits, labels, groups, train_counts=TRAIN_COUNTS):
    """A stored run with these test logits."""
    report = classification_report(logits, labels, train_counts=train_counts)
    row = {name: value for name, value in report.items() if name != "per_class"}
    row |= {"n_test": len(labels), "n_train": 3 * len(labels), "lr": 0.01, "train_s": 1.0}
    run = StoredRun(row)
    # Takes the place of the cached property, which reads a folder.
    run.__dict__["predictions"] = predictions_of(logits, labels, groups, train_counts)
    return run


def predictions_of(logits, labels, groups, train_counts=TRAIN_COUNTS, foreground=None):
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    order = np.argsort(-probs, axis=1, kind="stable")[:, :5]
    return Predictions(
        row=np.arange(len(labels)),
        label=labels,
        group=groups,
        predicted=probs.argmax(1),
        among_five=(order == labels[:, None]).any(1),
        confidence=probs.max(1),
        calibrated_confidence=(1 + probs.max(1)) / 2,
        label_nll=-np.log(probs[np.arange(len(labels)), labels]),
        train_counts=train_counts,
        foreground=np.ones(len(train_counts), dtype=bool) if foreground is None else foreground,
    )
