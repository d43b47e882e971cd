import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedloss.metrics import ClassificationScores, classification_report


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 80), st.integers(2, 12), st.integers(0, 2**31))
def test_scores_agree_with_scikit_learn(n, k, seed):
    from sklearn import metrics

    generator = np.random.default_rng(seed)
    logits, labels = generator.normal(size=(n, k)), generator.integers(0, max(k // 2, 1), n)
    report = classification_report(logits, labels)
    predicted = logits.argmax(1)
    options = {"zero_division": 0, "average": "macro"}
    assert report["top1"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert report["macro_f1_fg"] == pytest.approx(metrics.f1_score(labels, predicted, **options))
    assert report["macro_p_fg"] == pytest.approx(metrics.precision_score(labels, predicted, **options))
    assert report["macro_r_fg"] == pytest.approx(metrics.recall_score(labels, predicted, **options))
    weighted = metrics.f1_score(labels, predicted, average="weighted", zero_division=0)
    assert report["weighted_f1_fg"] == pytest.approx(weighted)
    recalls = metrics.recall_score(labels, predicted, labels=np.unique(labels), **options)
    assert report["bal_acc"] == pytest.approx(recalls)
    probs = torch.softmax(torch.from_numpy(logits), 1).numpy()
    assert report["nll"] == pytest.approx(metrics.log_loss(labels, probs, labels=np.arange(k)))
    assert report["o_ece"] + report["u_ece"] == pytest.approx(report["ece15"])
    top5 = metrics.top_k_accuracy_score(labels, logits, k=5, labels=np.arange(k)) if k > 5 else 1.0
    assert report["top5"] == pytest.approx(top5)


def test_background_classes_count_as_mistakes_but_not_as_classes():
    from sklearn.metrics import f1_score

    labels = np.array([0, 0, 1, 1, 2, 2])
    predicted = np.array([0, 1, 1, 1, 1, 2])
    logits = np.eye(3)[predicted] * 9
    report = classification_report(logits, labels, ["a", "b", "__bg_noise"])
    assert report["macro_f1_fg"] == pytest.approx(f1_score(labels, predicted, labels=[0, 1], average="macro"))
    everything = classification_report(logits, labels, ["a", "b", "__bg_noise"], background_prefix="")
    assert everything["macro_f1_fg"] == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_recall_by_training_frequency():
    labels = np.array([0, 0, 1, 2, 3])
    logits = np.eye(5)[[0, 0, 1, 0, 3]] * 5
    report = classification_report(logits, labels, train_counts=[101, 100, 21, 20, 0])
    assert (report["rec_many"], report["rec_med"], report["rec_few"]) == (1.0, 0.5, 1.0)
    assert (report["k_many"], report["k_med"], report["k_few"]) == (1, 2, 1)
    assert math.isnan(classification_report(logits, labels)["rec_many"])


def test_an_absent_class_is_left_out_of_macro_f1():
    report = classification_report(np.eye(4)[[0, 1]] * 5, [0, 1])
    assert report["macro_f1_fg"] == 1.0 and math.isnan(report["per_class"][3]["f1"])


def test_probabilities_and_logits_give_one_report():
    logits = torch.randn(30, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.arange(30) % 6
    first, second = (
        classification_report(logits, labels),
        classification_report(torch.softmax(logits, 1), labels),
    )
    assert first.pop("per_class") == second.pop("per_class")
    assert first == pytest.approx(second, nan_ok=True)


def test_a_saturated_logit_keeps_a_finite_likelihood():
    assert classification_report([[2000.0, 0.0]], [1])["nll"] == pytest.approx(2000)


def test_an_empty_set_reports_nan():
    report = classification_report(np.empty((0, 3)), np.empty(0, dtype=int))
    assert report["n"] == 0 and math.isnan(report["top1"]) and math.isnan(report["macro_f1_fg"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[0.1, 0.9]], [2]), IndexError, r"labels must lie in \[0, 2\)"),
        (([[math.nan, 0.9]], [0]), ValueError, r"must hold no NaN; got some in rows \[0\]"),
        (([[0.1, 0.9]], [0, 1]), ValueError, "labels"),
        (([0.1, 0.9], [0, 1]), ValueError, "shape"),
        (([[0.1, 0.9]], [0], ["one"]), ValueError, "class_names must be 2 strings, one per class; got 1"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        classification_report(*arguments)


def test_train_counts_of_the_wrong_length_are_named():
    with pytest.raises(ValueError, match="train_counts"):
        classification_report([[0.1, 0.9]], [0], train_counts=[1])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 17), st.integers(0, 2**31))
def test_blocks_give_the_report_of_all_rows(n, k, size, seed):
    generator = np.random.default_rng(seed)
    logits, labels = 3 * generator.normal(size=(n, k)), generator.integers(0, k, n)
    names = ["__bg_0", *map(str, range(1, k))]
    counts = generator.integers(0, 200, k)
    scores = ClassificationScores(k, names, train_counts=counts)
    for start in range(0, n, size):
        scores.update(logits[start : start + size], labels[start : start + size])
    found, report = scores.report(), classification_report(logits, labels, names, train_counts=counts)
    for row, expected in zip(found.pop("per_class"), report.pop("per_class"), strict=True):
        assert row == pytest.approx(expected, nan_ok=True)
    assert found == pytest.approx(report, nan_ok=True)


def test_the_calibration_errors_of_a_report_are_those_of_its_probabilities():
    from fusedloss.calibration import calibration_error

    logits = 2 * torch.randn(500, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels, probs = torch.arange(500) % 7, torch.softmax(logits, 1)
    report = classification_report(logits, labels)
    for name, kind in {"ece15": "ece", "aece15": "adaptive", "o_ece": "over", "u_ece": "under"}.items():
        assert report[name] == calibration_error(probs, labels, kind=kind)
    assert report["nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-12)


def test_a_report_takes_no_float64_copy():
    script = """
import resource, torch
from fusedloss.metrics import ClassificationScores, classification_report
logits, labels = torch.randn(100000, 200), torch.randint(0, 200, (100000,))
classification_report(logits[:20000], labels[:20000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
classification_report(logits, labels)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    # KiB; one float64 copy is 156000.
    assert int(done.stdout) < 60000


def test_bad_blocks_are_named():
    scores = ClassificationScores(2)
    scores.update([[0.0, 1.0]] * 3, [0, 1, 0])
    with pytest.raises(ValueError, match=r"no NaN; got some in rows \[4\]"):
        scores.update([[0.0, 1.0], [math.nan, 0.0]], [0, 1])
    with pytest.raises(ValueError, match=r"logits must have shape \(n, 2\); got \(1, 3\)"):
        scores.update([[0.0, 1.0, 2.0]], [0])
    with pytest.raises(ValueError, match="probabilities"):
        ClassificationScores(2, probabilities=True).update([[2.0, 1.0]], [0])
