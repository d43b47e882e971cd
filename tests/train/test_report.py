"""Tables: what is starred, what a row says, and how often nothing is starred."""

import csv
import math

import numpy as np
import pytest
from simulated_runs import ROWS, simulated_runs

from bench.star_rate import JUDGED, star_rate
from fusedloss.features import FeatureBank
from fusedloss.train import Recipe, report
from fusedloss.train.report import RecipeRuns, RunKey, StoredRun, collect_rows, difference, differences
from fusedloss.train.sweep import sweep


def rows_of(values, **columns):
    """Runs with these values of top1, by split and seed, without predictions."""
    return {
        RunKey(*key): StoredRun({"top1": value, "n_test": 20, "n_train": 60, "lr": 0.1} | columns)
        for key, value in values.items()
    }


def shifted(name, base, shifts, metric="top1"):
    runs = {
        key: StoredRun(run.row | {metric: run.row[metric] + shift})
        for (key, run), shift in zip(base.runs.items(), shifts, strict=True)
    }
    return RecipeRuns(name, runs)


@pytest.fixture
def base():
    random = np.random.default_rng(0)
    values = {(split, seed): 0.5 + 0.05 * random.normal() for split in range(5) for seed in range(2)}
    return RecipeRuns("CE", rows_of(values, nll=1.0, T=1.5, train_s=3.0))


def test_pairs_have_the_same_split_and_seed(base):
    other = shifted("other", base, [0.02, 0.03, 0.03, 0.02, 0.025, 0.025, 0.03, 0.02, 0.02, 0.03])
    del other.runs[RunKey(4, 1)]
    other.runs[RunKey(9, 0)] = StoredRun(base.runs[RunKey(0, 0)].row | {"top1": 0.0})
    found = difference(other, base, "top1").comparison
    means = [0.025, 0.025, 0.025, 0.025, 0.02]
    assert (found.pairs, found.splits, found.tested) == (9, 5, "splits")
    assert found.mean == pytest.approx(np.mean(means))
    # Variance (1/5 + 20/60) S^2.
    half = 2.7764451 * math.sqrt((1 / 5 + 1 / 3) * np.var(means, ddof=1))
    assert found.high - found.mean == pytest.approx(half, rel=1e-6)


@pytest.mark.parametrize(
    ("metric", "sign", "verdict"),
    [("top1", 1, "better"), ("top1", -1, "worse"), ("nll", 1, "worse"), ("T", -1, "lower"), ("train_s", 1, "")],
)
def test_verdicts_follow_the_direction_of_the_metric(base, metric, sign, verdict):
    shifts = sign * np.array([0.02, 0.03, 0.03, 0.02, 0.025, 0.03, 0.03, 0.02, 0.02, 0.025])
    assert difference(shifted("other", base, shifts, metric), base, metric).verdict == verdict


def test_stars_are_corrected_for_the_cells(base):
    # p is about .02 alone.
    clear = shifted("clear", base, np.repeat([0.03, 0.01, 0.04, 0.02, 0.03], 2))
    alone = difference(clear, base, "top1")
    assert alone.verdict == "better" and 0.005 < alone.comparison.p < 0.05
    noise = [shifted(f"noise {i}", base, np.repeat(np.random.default_rng(i).normal(size=5), 2)) for i in range(9)]
    table = differences([base, clear, *noise], base, ["top1"])
    assert list(table) == ["clear", *(row.name for row in noise)]
    assert table["clear"][0].verdict == "=" and table["clear"][0].p_adjusted > 10 * alone.comparison.p * 0.9
    by_row = differences([base, clear, *noise], base, ["top1"], family="row")
    assert by_row["clear"][0].verdict == "better" and by_row["clear"][0].p_adjusted == alone.comparison.p
    assert "more seeds or splits would tell) in top-1" in report.verdicts(table, base)[0]
    with pytest.raises(ValueError, match="family must be one of table, row; got 'cell'"):
        differences([base, clear], base, ["top1"], family="cell")


def test_columns_without_direction_are_shown(base):
    other = shifted("other", base, [0.02, 0.03] * 5)
    found = differences([base, other], base, ["top1", "T", "train_s"])
    cells = report.difference_cells(found, base)
    assert cells[0] == ["difference to CE", "pairs", "top-1", "T", "time s"]
    assert cells[1] == ["other", "10", "+.025±.000*", "+.000±.000", "+0.0"]
    lines = list(csv.DictReader(report.differences_csv(found, base).splitlines()))
    assert [(line["metric"], line["verdict"]) for line in lines] == [("top1", "better"), ("T", "="), ("train_s", "")]
    assert lines[0]["tested"] == "splits" and float(lines[1]["p"]) == 1


def test_a_question_mark_says_what_is_missing(base):
    few = RecipeRuns("few", {key: run for key, run in base.runs.items() if key.split < 2})
    found = differences([few, shifted("other", few, [0.1] * 4)], few, ["top1", "train_s"])
    assert report.difference_cells(found, few)[1] == ["other", "4", "+.100?", "+0.0"]
    assert "? top-1: needs 3 splits (has 2)." in report.notes(found)
    assert report.verdicts(found, few) == ["other against few: too little to judge top-1."]
    one = RecipeRuns("CE", {RunKey(0, s): StoredRun(base.runs[RunKey(0, 0)].row) for s in range(3)})
    found = differences([one, shifted("other", one, [0.1, 0.2, 0.1])], one, ["top1", "T"])
    notes = report.notes(found)
    assert "? top-1: needs 3 splits, or test groups: predictions were not stored." in notes
    assert "? T: needs 3 splits, or test groups: T is not a score of stored predictions." in notes


def test_test_groups_widen_what_seeds_alone_say():
    base = RecipeRuns("CE", simulated_runs(1, 5))
    other = RecipeRuns("other", simulated_runs(1, 5, gain=0.1))
    each = np.array([other.runs[key].row["top1"] - base.runs[key].row["top1"] for key in base.runs])
    found = difference(other, base, "top1").comparison
    seeds_alone = 2.7764451 * each.std(ddof=1) / math.sqrt(5)
    assert found.tested == "seeds and test groups" and found.high - found.mean > 1.1 * seeds_alone
    apart = simulated_runs(1, 5, seed=1)
    for run in apart.values():
        run.predictions.row[:] += 1
    assert "other test rows" in difference(RecipeRuns("other", apart), base, "top1").comparison.needed


def test_the_simulated_runs_are_like_real_ones():
    runs = simulated_runs(12, 6)
    table = np.array([[runs[RunKey(p, s)].row["top1"] for s in range(6)] for p in range(12)])
    over_seeds, over_splits = table.std(axis=1, ddof=1).mean(), table.mean(axis=1).std(ddof=1)
    # On the demo's glyphs: .0033 over seeds and .0134 over splits of 2160 test rows.
    assert 0.15 < over_seeds / over_splits < 0.45
    assert over_splits == pytest.approx(0.0134 * math.sqrt(2160 / ROWS), rel=0.6)


DESIGNS = [(1, 3), (1, 5), (3, 1), (3, 3), (6, 5), (0, 5)]


@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_nothing_against_itself_is_hardly_ever_starred(design):
    runs = simulated_runs(6, 10)
    rates = star_rate(runs, runs, design, draws=150)
    assert rates.rows <= 0.05, rates
    assert rates.two_errors > 0.1, "the rule of two standard errors would do as well"


@pytest.mark.parametrize("design", [(1, 5), (5, 2)], ids=str)
def test_a_real_difference_is_found(design):
    gain = 0.5
    base, other = simulated_runs(6, 10), simulated_runs(6, 10, gain=gain, split_noise=0.05)
    sizes = [other[key].row["nll"] - base[key].row["nll"] for key in base]
    assert -0.3 < np.mean(sizes) < -0.1
    rates = star_rate(base, other, design, draws=40)
    assert rates.rows >= 0.9, rates
    assert set(JUDGED) == {"top1", "macro_f1_fg", "bal_acc", "rec_many", "rec_med", "rec_few", "ece15"}


@pytest.mark.slow
def test_trained_runs_against_themselves(tmp_path):
    """60 small runs of cross-entropy over 6 splits and 10 seeds, on long-tailed features."""
    random = np.random.default_rng(0)
    counts = (300 * 0.72 ** np.arange(14) + 8).astype(int)
    labels = np.repeat(np.arange(14), counts)
    features = random.normal(size=(len(labels), 24)) + 1.3 * random.normal(size=(14, 24))[labels]
    bank = FeatureBank.from_arrays(features, labels, groups=random.permutation(len(labels)) // 2)
    recipe = Recipe.from_dict({"epochs": 15, "batch_size": 64})
    sweep(bank, {"CE": recipe}, range(10), tmp_path, splits=range(6), device="cpu", pictures=False)
    (row,) = collect_rows([tmp_path])
    assert len(row.runs) == 60
    for design in DESIGNS:
        rates = star_rate(row.runs, row.runs, design, draws=2000)
        print(design, rates)
        assert rates.rows <= 0.05, (design, rates)
