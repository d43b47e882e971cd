"""Intervals, p-values and Holm's correction against definitions, other libraries and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import t, ttest_1samp

from fusedloss.train.comparison import GroupNoise, Variance, compare, holm, interval, p_value


def test_splits_are_a_t_test_over_their_means():
    random = np.random.default_rng(0)
    by_split = {split: random.normal(0.01, 0.02, size=random.integers(1, 5)) for split in range(6)}
    means = np.array([values.mean() for values in by_split.values()])
    truth = ttest_1samp(means, 0)
    found = compare(by_split)
    assert (found.tested, found.splits) == ("splits", 6) and found.pairs == sum(map(len, by_split.values()))
    assert found.mean == pytest.approx(means.mean()) and found.p == pytest.approx(truth.pvalue, rel=1e-6)
    assert (found.low, found.high) == pytest.approx(tuple(truth.confidence_interval(0.95)))


def test_overlapping_training_sets_widen_the_interval():
    by_split = {0: [0.01], 1: [0.03], 2: [0.02], 3: [0.03]}
    alone, corrected = compare(by_split), compare(by_split, test_over_train=0.25)
    # Variance 1/4 + 1/4 in place of 1/4.
    assert corrected.high - corrected.low == pytest.approx((alone.high - alone.low) * math.sqrt(2))
    assert corrected.p > alone.p


def test_one_split_adds_seeds_and_test_groups():
    each = np.array([0.01, 0.03, 0.02, 0.04])
    found = compare({7: each}, group_noise=GroupNoise(4e-5, 31))
    half = math.sqrt(t.isf(0.025, 3) ** 2 * each.var(ddof=1) / 4 + t.isf(0.025, 30) ** 2 * 4e-5)
    assert found.tested == "seeds and test groups"
    assert (found.low, found.high) == pytest.approx((each.mean() - half, each.mean() + half))
    # More seeds do not make the test set larger.
    many = compare({7: np.tile(each, 1000)}, group_noise=GroupNoise(4e-5, 31))
    assert many.high - many.low > 0.99 * 2 * t.isf(0.025, 30) * math.sqrt(4e-5)


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.9999])
def test_the_p_value_is_the_level_of_the_interval_that_ends_at_zero(confidence):
    parts = [Variance(3e-4, 2), Variance(1e-4, 40), Variance(0.0, 5)]
    assert p_value(interval(parts, confidence), parts) == pytest.approx(1 - confidence, rel=1e-5)
    assert p_value(-interval(parts, confidence), parts) == pytest.approx(1 - confidence, rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("freedom", [(2, 2), (2, 30), (4, 200)])
def test_intervals_of_sums_keep_their_level(share, freedom):
    random = np.random.default_rng(1)
    sizes = np.array([share, 1 - share])
    draws = 20000
    variances = sizes * np.stack([random.chisquare(f, draws) / f for f in freedom], axis=1)
    quantiles = t.isf(0.025, np.array(freedom))
    missed = (random.normal(size=draws) ** 2 > (variances * quantiles**2).sum(1)).mean()
    assert missed < 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)
    # The function's own width, on some of the draws.
    for line in variances[:5]:
        parts = [Variance(v, f) for v, f in zip(line, freedom, strict=True)]
        assert interval(parts) == pytest.approx(math.sqrt((line * quantiles**2).sum()))


@pytest.mark.parametrize("seed_noise", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("row_noise", [0.3, 1.0])
def test_recipes_that_err_on_other_rows_are_equal(seed_noise, row_noise):
    """Differences d_sg = a_s + b_g + e_sg of seeds and test groups: what a fixed test set happens to favour is b."""
    random = np.random.default_rng(4)
    seeds, groups, draws, wrong, by_seeds = 4, 60, 2000, 0, 0
    for _ in range(draws):
        each = seed_noise / math.sqrt(groups) * random.normal(size=(seeds, 1)) + random.normal(size=groups)
        each = each + row_noise * random.normal(size=(seeds, groups))
        noise = GroupNoise(each.mean(0).var(ddof=1) / groups, groups)
        wrong += compare({0: each.mean(1)}, group_noise=noise).p <= 0.05
        by_seeds += compare({0: each.mean(1)}).p <= 0.05
    assert wrong / draws <= 0.06
    assert by_seeds / draws > 0.1, "seeds alone would do"


@pytest.mark.parametrize("splits", [3, 5, 15])
def test_splits_that_share_training_rows_keep_the_level(splits):
    """A correlation of test / (test + train) rows between splits, which the corrected variance is made for."""
    random = np.random.default_rng(5)
    share = 0.2 / 0.7
    correlation, draws = share / (1 + share), 2000
    counts = np.zeros(2)
    for _ in range(draws):
        means = math.sqrt(correlation) * random.normal() + math.sqrt(1 - correlation) * random.normal(size=splits)
        by_split = {split: [mean] for split, mean in enumerate(means)}
        counts += [compare(by_split, test_over_train=share).p <= 0.05, compare(by_split).p <= 0.05]
    corrected, plain = counts / draws
    assert 0.03 < corrected < 0.065 and plain > 0.08


def test_identical_runs_do_not_differ():
    found = compare({0: [0.0] * 3}, group_noise=GroupNoise(0.0, 0))
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)
    # The same value thrice has no variance, though its mean may be an ulp off.
    assert compare({0: [0.1] * 3}, group_noise=GroupNoise(1e-2, 9)).p == pytest.approx(2 * t.sf(1, 8), rel=1e-6)
    assert compare({0: [0.1] * 3}).p == 0


@pytest.mark.parametrize(
    ("by_split", "noise", "needed"),
    [
        ({}, None, "runs with the same seed and split on both sides"),
        ({1: [0.1, 0.2]}, GroupNoise(1e-4, 9), "3 seeds (has 2) or 3 splits"),
        ({1: [0.1] * 9, 2: [0.2] * 9}, None, "3 splits (has 2)"),
        ({1: [0.1, 0.2, 0.3]}, "no groups in x", "3 splits, or test groups: no groups in x"),
        ({1: [0.1, 0.2, 0.3]}, GroupNoise(1e-4, 1), "3 splits, or predictions that differ in 2 test groups (do in 1)"),
        ({1: [0.1, math.nan, 0.3]}, GroupNoise(1e-4, 9), "a value in every run"),
    ],
)
def test_too_little_is_not_tested(by_split, noise, needed):
    found = compare(by_split, group_noise=noise)
    assert found.needed == needed and found.tested == "" and math.isnan(found.p)


def test_holm_is_the_closure_of_bonferroni():
    random = np.random.default_rng(2)
    for _ in range(50):
        p = list(random.random(5) ** 3)
        subsets = [s for size in range(1, 6) for s in itertools.combinations(range(5), size)]
        truth = [max(min(1, len(s) * min(p[j] for j in s)) for s in subsets if i in s) for i in range(5)]
        assert holm(p) == pytest.approx(truth)
    assert holm([0.02, math.nan, 0.01]) == pytest.approx([0.02, math.nan, 0.02], nan_ok=True) and holm([]) == []


@pytest.mark.parametrize("options", [{"confidence": 1.0}, {"test_over_train": -0.1}, {"test_over_train": math.nan}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must"):
        compare({0: [0.1] * 3}, **options)
