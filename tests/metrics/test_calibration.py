import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedloss.calibration import calibration_error, fit_temperature, reliability_bins


def by_hand(confidence, correct, n_bins):
    """The definition, one sample at a time: bins (low, high], 0 in the first, 1 in the last."""
    bins = [[] for _ in range(n_bins)]
    for c, right in zip(confidence, correct, strict=True):
        bins[min(max(math.ceil(c * n_bins - 1e-12) - 1, 0), n_bins - 1)].append((c, right))
    total = len(confidence)
    gaps = [sum(c for c, _ in b) / total - sum(r for _, r in b) / total for b in bins if b]
    return sum(abs(g) for g in gaps), sum(max(g, 0) for g in gaps), sum(max(-g, 0) for g in gaps)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(2, 6), st.integers(0, 2**31))
def test_ece_and_its_halves_follow_the_definition(n, k, seed):
    generator = np.random.default_rng(seed)
    probs = generator.dirichlet(np.full(k, 0.3), n)
    labels = generator.integers(0, k, n)
    ece, over, under = by_hand(probs.max(1), probs.argmax(1) == labels, 15)
    assert calibration_error(probs, labels) == pytest.approx(ece, abs=1e-9)
    assert calibration_error(probs, labels, kind="over") == pytest.approx(over, abs=1e-9)
    assert calibration_error(probs, labels, kind="under") == pytest.approx(under, abs=1e-9)


def test_confidence_one_belongs_to_the_last_bin():
    probs = np.array([[1.0, 0.0]] * 4 + [[0.95, 0.05]] * 4)
    labels = np.array([0, 0, 0, 1, 0, 0, 0, 0])
    bins = reliability_bins(probs, labels)
    assert bins.count[14] == 8 and bins.count.sum() == 8
    assert calibration_error(probs, labels) == pytest.approx(0.975 - 7 / 8)


def test_adaptive_error_keeps_ties_together_and_sees_every_sample():
    probs = np.tile([0.787, 0.213], (30, 1))
    assert calibration_error(probs, np.ones(30, dtype=int), kind="adaptive") == pytest.approx(0.787)
    assert calibration_error(probs[:2], [0, 1], kind="adaptive") == pytest.approx(0.787 - 0.5)


def test_classwise_error_counts_every_class():
    probs = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]])
    assert calibration_error(probs, torch.tensor([0, 0]), kind="classwise") == pytest.approx((0.5 + 0.5 + 0) / 3)


def test_no_sample_is_nan():
    assert math.isnan(calibration_error(np.empty((0, 3)), np.empty(0, dtype=int)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ([[0.5, 0.5]], [0], 15, "mce"),
            ValueError,
            "kind must be 'ece', 'adaptive', 'over', 'under' or 'classwise'; got 'mce'",
        ),
        (([[0.5, 0.5]], [0], 0), ValueError, "n_bins must be at least 1"),
        (([[0.5, 0.5]], [2]), IndexError, r"labels must lie in \[0, 2\)"),
        (([[5.0, 0.5]], [0]), ValueError, "probs must be probabilities"),
        (([[math.nan, 0.5]], [0]), ValueError, "probs must be probabilities"),
        (([[0.5, 0.5]], [0.0]), TypeError, "labels must be integers"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        calibration_error(*arguments)


def test_the_fitted_temperature_is_the_minimum():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (400,), generator=generator)
    logits = 4 * (torch.nn.functional.one_hot(labels, 5) * 0.8 + torch.randn(400, 5, generator=generator))
    fit = fit_temperature(logits, labels)
    assert fit.converged and fit.nll_after < fit.nll_before

    def nll(temperature):
        return float(torch.nn.functional.cross_entropy(logits.double() / temperature, labels))

    assert fit.nll_after == pytest.approx(nll(fit.temperature))
    assert nll(fit.temperature) < min(nll(fit.temperature * 0.99), nll(fit.temperature * 1.01))
    scaled = fit_temperature(logits * 3, labels)
    assert scaled.temperature == pytest.approx(3 * fit.temperature, rel=1e-6)


@pytest.mark.parametrize(
    ("logits", "labels", "temperature"),
    [
        ([[5.0, 0.0], [0.0, 5.0]], [0, 1], 0.01),
        ([[5.0, 0.0], [0.0, 5.0]], [1, 0], 100.0),
        ([[1.0, 1.0]], [0], 1.0),
    ],
)
def test_a_temperature_without_an_inner_optimum_says_so(logits, labels, temperature):
    fit = fit_temperature(torch.tensor(logits), torch.tensor(labels))
    assert not fit.converged and fit.temperature == pytest.approx(temperature)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(3, dtype=torch.int64),
            ValueError,
            r"labels must have shape \(2,\); got \(3,\)",
        ),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), ValueError, "at least one sample"),
        (torch.full((1, 3), math.inf), torch.zeros(1, dtype=torch.int64), ValueError, "finite"),
        (torch.zeros(1, 3), torch.tensor([3]), IndexError, r"labels must lie in \[0, 3\)"),
    ],
)
def test_bad_logits_for_a_temperature_are_named(logits, labels, error, message):
    with pytest.raises(error, match=message):
        fit_temperature(logits, labels)


def drawn_logits(rows, classes, spread=2.0):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    logits = spread * torch.randn(rows, classes, generator=generator)
    logits[torch.arange(rows), labels] += spread * (2 + torch.randn(rows, generator=generator))
    return logits, labels


def reference_temperature(logits, labels):
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    z, y = logits.double().numpy(), labels.numpy()

    def nll(log_beta):
        scaled = z * math.exp(log_beta)
        return float((logsumexp(scaled, axis=1) - scaled[np.arange(len(y)), y]).mean())

    best = minimize_scalar(nll, bounds=(-4, 4), method="bounded", options={"xatol": 1e-10})
    return math.exp(-best.x), nll(0.0), best.fun


@pytest.mark.parametrize("spread", [0.3, 2.0, 8.0])
def test_the_temperature_of_blocks_is_that_of_all_rows(spread):
    logits, labels = drawn_logits(20000, 30, spread)
    temperature, before, after = reference_temperature(logits, labels)
    passes = []

    def blocks():
        passes.append(0)
        return zip(logits.split(777), labels.split(777), strict=True)

    fit = fit_temperature(blocks)
    assert fit.converged and len(passes) <= 4
    assert fit.temperature == pytest.approx(temperature, rel=2e-5)
    assert (fit.nll_before, fit.nll_after) == pytest.approx((before, after), abs=1e-6)
    passes.clear()
    near = fit_temperature(blocks, start=temperature * 1.01)
    assert len(passes) == 1
    assert near.temperature == pytest.approx(temperature, rel=2e-5) and near.nll_before == pytest.approx(before)


def test_the_temperature_takes_no_copy_of_the_logits():
    script = """
import resource, torch
from fusedloss.calibration import fit_temperature
torch.manual_seed(0)
logits, labels = torch.randn(60000, 500), torch.randint(0, 500, (60000,))
logits[torch.arange(60000), labels] += 6
fit_temperature(logits[:10000], labels[:10000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert fit_temperature(logits, labels).converged
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    # KiB; the logits are 117000, in float64 twice as many.
    assert int(done.stdout) < 60000


def test_temperature_blocks_are_checked():
    logits, labels = drawn_logits(10, 3)
    logits[7, 1] = math.inf
    with pytest.raises(ValueError, match="finite; got another value in row 7"):
        fit_temperature(lambda: zip(logits.split(4), labels.split(4), strict=True))
    with pytest.raises(TypeError, match="labels must be None where logits are a function"):
        fit_temperature(lambda: [], labels)
    with pytest.raises(ValueError, match="at least one sample"):
        fit_temperature(lambda: [])
    with pytest.raises(ValueError, match="start must be a temperature above 0"):
        fit_temperature(logits, labels, start=0.0)
