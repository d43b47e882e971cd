"""Scores of draws of test groups against the report of rows that are written out as often as they were drawn."""

import numpy as np
import pytest
from simulated_runs import predictions_of

from fusedloss.calibration import calibration_error
from fusedloss.metrics import classification_report
from fusedloss.train import bootstrap

COUNTS = np.array([500, 101, 100, 60, 21, 20, 3, 9])


def a_test_set(rows=150):
    random = np.random.default_rng(0)
    labels = random.choice(8, rows, p=COUNTS / COUNTS.sum())
    logits = 2 * np.eye(8)[labels] + 1.5 * random.normal(size=(rows, 8))
    return logits, labels, random.integers(0, 40, rows) * 7 - 3


def of_rows(logits, labels, chosen, names):
    report = classification_report(logits[chosen], labels[chosen], names, train_counts=COUNTS)
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    # Two columns of which the larger is the calibrated confidence, on the side that is right where the prediction is.
    sure, hit = (1 + probs.max(1)) / 2, probs.argmax(1) == labels
    report["ece15_ts"] = calibration_error(np.stack([sure, 1 - sure], 1)[chosen], np.where(hit, 0, 1)[chosen])
    return report


def test_draws_are_reports_of_the_drawn_rows(monkeypatch):
    logits, labels, groups = a_test_set()
    logits[:, 2] += 1
    names = ["__bg_sky", *"bcdefgh"]
    foreground = np.arange(8) > 0
    found = predictions_of(logits, labels, groups, COUNTS, foreground)
    whole = of_rows(logits, labels, np.arange(len(labels)), names)
    assert found.values == pytest.approx({name: whole[name] for name in bootstrap.METRICS})
    distinct = np.unique(groups)
    assert found.num_groups == len(distinct)
    weights = next(bootstrap._draws(len(distinct)))
    assert weights.shape == (bootstrap.DRAWS, len(distinct)) and (weights.sum(1) == len(distinct)).all()
    for number in range(0, 1000, 97):
        times = weights[number].astype(int)
        chosen = np.concatenate([np.repeat(np.flatnonzero(groups == g), times[i]) for i, g in enumerate(distinct)])
        truth = of_rows(logits, labels, chosen, names)
        for name in bootstrap.METRICS:
            assert found.draws[name][number] == pytest.approx(truth[name], nan_ok=True), name
    # The size of the blocks changes nothing.
    monkeypatch.setattr(bootstrap, "BLOCK", 40 * 7)
    again = predictions_of(logits, labels, groups, COUNTS, foreground).draws
    for name, values in again.items():
        np.testing.assert_array_equal(values, found.draws[name])


def test_the_variance_of_draws_is_that_of_new_test_sets():
    random = np.random.default_rng(3)
    rows_per_group, groups = 4, 100

    def accuracy():
        right = np.repeat(random.random(groups) < 0.7, rows_per_group) ^ (random.random(400) < 0.05)
        logits = np.where(right[:, None], [3.0, 0.0], [0.0, 3.0])
        return predictions_of(logits, np.zeros(400, int), np.arange(400) // rows_per_group, np.array([400, 400]))

    new = np.std([accuracy().values["top1"] for _ in range(200)])
    drawn = np.mean([accuracy().draws["top1"].std() for _ in range(10)])
    assert drawn == pytest.approx(new, rel=0.17)
    # By single rows it would be about half of that.
    assert drawn > 1.7 * np.sqrt(0.7 * 0.3 / 400)


def test_groups_that_differ_depend_on_the_metric():
    labels, groups = np.array([0, 0, 5, 5, 6]), np.array([10, 11, 12, 13, 14])
    one, other = 3 * np.eye(8)[[0, 1, 5, 2, 6]], 3 * np.eye(8)[[0, 2, 5, 5, 1]]
    first, second = (predictions_of(logits, labels, groups, COUNTS) for logits in (one, other))
    found = {name: list(first.differing_groups(second, name)) for name in bootstrap.METRICS}
    assert found["top1"] == found["bal_acc"] == [3, 4] and found["macro_f1_fg"] == [1, 3, 4]
    assert found["rec_few"] == [3, 4] and found["rec_many"] == [] and found["nll"] == [0, 1, 2, 3, 4]


def test_many_groups_get_fewer_draws():
    assert bootstrap.number_of_draws(1000) == 1000 and bootstrap.number_of_draws(10**6) == bootstrap.LEAST_DRAWS
