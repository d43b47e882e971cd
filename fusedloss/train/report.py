"""Tables over finished runs: means, and differences paired by seed and split that say how sure they are."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusedloss.atomic_io import StorageError
from fusedloss.features.checks import as_list, as_path, check_choice
from fusedloss.train import bootstrap
from fusedloss.train.bootstrap import Predictions
from fusedloss.train.comparison import CONFIDENCE, Comparison, GroupNoise, compare, holm
from fusedloss.train.recipe import Recipe
from fusedloss.train.run_folder import CONFIG, RunFolder

# Column of a run's row -> heading, and whether more is better (None: no direction).
METRICS: dict[str, tuple[str, bool | None]] = {
    "top1": ("top-1", True),
    "top5": ("top-5", True),
    "macro_f1_fg": ("macro F1", True),
    "weighted_f1_fg": ("weighted F1", True),
    "macro_p_fg": ("macro precision", True),
    "macro_r_fg": ("macro recall", True),
    "bal_acc": ("bal. acc", True),
    "rec_many": ("many", True),
    "rec_med": ("medium", True),
    "rec_few": ("few", True),
    "ece15": ("ECE", False),
    "ece15_ts": ("ECE at T", False),
    "aece15": ("adaptive ECE", False),
    "o_ece": ("over-conf. ECE", False),
    "u_ece": ("under-conf. ECE", False),
    "nll": ("nll", False),
    "train_s": ("time s", None),
    "ms_step": ("ms/step", None),
}
# Times depend on what else the machine did: their differences are shown, not judged.
NOT_JUDGED = ("train_s", "ms_step")
DEFAULT_METRICS = (
    "top1",
    "macro_f1_fg",
    "bal_acc",
    "rec_many",
    "rec_med",
    "rec_few",
    "ece15",
    "train_s",
)
LEVEL = 1 - CONFIDENCE
FAMILIES = ("table", "row")
MARKS = {"better": "*", "worse": "*", "higher": "*", "lower": "*", "=": "", "?": "?", "": ""}
TESTS = {
    "splits": "over {splits} splits, Student's t with the variance that overlapping training sets need (Nadeau and "
    "Bengio 2003)",
    "seeds and test groups": "on one split, the variances over seeds (t quantile) and over test groups (bootstrap) "
    "added: another split's training rows may change it",
    "seeds": "over seeds alone, where predictions are the same",
}


class RunKey(NamedTuple):
    """What tells the runs of one recipe apart: the seeds of the split and of the training."""

    split: int
    seed: int


@dataclass(frozen=True)
class StoredRun:
    """The flat row of a finished run, and its folder."""

    row: dict[str, Any]
    folder: Path | None = None

    @cached_property
    def predictions(self) -> Predictions | str:
        """What it said of the test rows, or why that is not known."""
        if self.folder is None:
            return "predictions were not stored"
        try:
            return RunFolder(self.folder).predictions()
        except StorageError as error:
            return str(error)


@dataclass(frozen=True)
class RecipeRuns:
    """The runs of one recipe, by split and seed."""

    name: str
    runs: dict[RunKey, StoredRun]

    def values(self, metric: str) -> np.ndarray:
        return np.array([self.runs[key].row[metric] for key in sorted(self.runs)], dtype=np.float64)

    @property
    def splits(self) -> int:
        return len({key.split for key in self.runs})


@dataclass(frozen=True)
class Difference:
    """The difference of a row to the baseline in one metric.

    ``verdict`` is ``"better"`` or ``"worse"`` (``"higher"`` or ``"lower"`` for a metric without direction) where
    ``p_adjusted`` is at most 0.05, ``"="`` where it is not, ``"?"`` where there is too little to test, ``""`` where
    nothing is judged.
    """

    metric: str
    comparison: Comparison
    p_adjusted: float
    verdict: str


def collect_rows(folders: Sequence[str | Path]) -> list[RecipeRuns]:
    """Finished runs in and below the folders; runs that differ only in seed and split make one row.

    Raises:
        StorageError: no finished run, the same recipe, seed and split twice, or runs on different banks or shares of
            test rows.
        TypeError: anything but a sequence of paths.
    """
    paths = [as_path("folders", folder) for folder in as_list("folders", folders)]
    runs = [RunFolder(path.parent) for folder in paths for path in sorted(folder.rglob(CONFIG))]
    finished = [run for run in runs if (run.path / "result.json").exists()]
    if not finished:
        raise StorageError(f"folders must hold finished runs; got none in {', '.join(map(str, paths))}")
    names: dict[str, str] = {}
    rows: dict[str, dict[RunKey, StoredRun]] = {}
    common: tuple[Any, ...] | None = None
    for run in finished:
        config = run.config()
        recipe = Recipe.from_dict(config["recipe"])
        data = (config["bank"]["fingerprint"], recipe.test_fraction)
        if common not in (None, data):
            raise StorageError(
                f"folders must hold runs on one bank with one share of test rows; got {run.path}, on another bank or "
                f"share than {finished[0].path} (report them separately)"
            )
        common = data
        name = _name(run.path)
        key = f"{name} {recipe.replace(seed=0, split_seed=0, lr=1.0).to_dict()}"
        found = rows.setdefault(key, {})
        names[key] = name if name not in (n for k, n in names.items() if k != key) else f"{name} ({len(names) + 1})"
        pair = RunKey(recipe.split_seed, recipe.seed)
        if pair in found:
            raise StorageError(
                f"folders must hold every recipe, seed and split once; got seed {pair.seed} of split {pair.split} "
                f"again in {run.path} (remove one)"
            )
        found[pair] = StoredRun(run.result()["row"], run.path)
    return [RecipeRuns(names[key], found) for key, found in rows.items()]


def differences(
    rows: Sequence[RecipeRuns], baseline: RecipeRuns, metrics: Sequence[str], family: str = "table"
) -> dict[str, list[Difference]]:
    """The difference of every other row to the baseline in each metric, by the row's name.

    Tests as in ``comparison.compare``, corrected by Holm's method for all judged cells of the table, or, with
    ``family="row"``, for those of each row by itself.

    Raises:
        ValueError: another family.
    """
    check_choice("family", family, FAMILIES)
    others = [row for row in rows if row is not baseline]
    compared = [[_compared(row, baseline, metric) for metric in metrics] for row in others]
    judged = [
        [math.nan if metric in NOT_JUDGED else c.p for metric, c in zip(metrics, line, strict=True)]
        for line in compared
    ]
    if family == "row":
        adjusted = [holm(line) for line in judged]
    else:
        flat = iter(holm([p for line in judged for p in line]))
        adjusted = [[next(flat) for _ in line] for line in judged]
    return {
        row.name: [
            Difference(metric, c, p, _verdict(metric, c, p)) for metric, c, p in zip(metrics, line, ps, strict=True)
        ]
        for row, line, ps in zip(others, compared, adjusted, strict=True)
    }


def difference(row: RecipeRuns, baseline: RecipeRuns, metric: str) -> Difference:
    """The difference of one row to the baseline in one metric, as a table of this cell alone has it."""
    found = _compared(row, baseline, metric)
    return Difference(metric, found, found.p, _verdict(metric, found, found.p))


def summary_cells(rows: Sequence[RecipeRuns], metrics: Sequence[str]) -> list[list[str]]:
    """Heading and one line per row: name, runs, splits, learning rates, mean ± standard deviation of metrics."""
    lines = [["row", "runs", "splits", "lr", *(_heading(metric) for metric in metrics)]]
    for row in rows:
        rates = sorted({run.row["lr"] for run in row.runs.values()})
        cells = [_mean_cell(row.values(metric), metric) for metric in metrics]
        shown = ", ".join(f"{lr:g}" for lr in rates)
        lines.append([row.name, str(len(row.runs)), str(row.splits), shown, *cells])
    return lines


def difference_cells(found: dict[str, list[Difference]], baseline: RecipeRuns) -> list[list[str]]:
    """Heading and one line per row: mean paired difference ± half of its interval, and its mark."""
    metrics = [one.metric for one in next(iter(found.values()))]
    lines = [[f"difference to {baseline.name}", "pairs", *(_heading(metric) for metric in metrics)]]
    for name, each in found.items():
        pairs = max((one.comparison.pairs for one in each), default=0)
        lines.append([name, str(pairs), *(_difference_cell(one) for one in each)])
    return lines


def verdicts(found: dict[str, list[Difference]], baseline: RecipeRuns) -> list[str]:
    """One sentence per row: where it is better, worse, or not told apart from the baseline."""
    words = {
        "better": "better in",
        "worse": "worse in",
        "higher": "higher in",
        "lower": "lower in",
        "hint": "perhaps other (p at most .05 before the correction; more seeds or splits would tell) in",
        "=": "not told apart in",
        "?": "too little to judge",
    }
    lines = []
    for name, each in found.items():
        said: dict[str, list[str]] = {}
        for one in each:
            kind = "hint" if one.verdict == "=" and one.comparison.p <= LEVEL else one.verdict
            text = _heading(one.metric)
            if one.verdict in ("better", "worse", "higher", "lower"):
                text += f" ({_number(one.comparison.mean, one.metric, sign=True)}, p {_p_text(one.p_adjusted)})"
            said.setdefault(kind, []).append(text)
        parts = [f"{words[kind]} {', '.join(said[kind])}" for kind in words if kind in said]
        if parts:
            lines.append(f"{name} against {baseline.name}: {'; '.join(parts)}.")
    return lines


def notes(found: dict[str, list[Difference]], family: str = "table") -> list[str]:
    """How to read the tables: what ± is, what was tested and how, and what a ``?`` lacks."""
    lines = ["Row ± standard deviation over its runs."]
    cells = [one for each in found.values() for one in each]
    if not cells:
        return lines
    lines.append(
        "Difference: mean over pairs of runs with the same seed and split, ± half of its "
        f"{CONFIDENCE:.0%} interval (of that cell alone)."
    )
    for tested, text in TESTS.items():
        splits = {one.comparison.splits for one in cells if one.verdict and one.comparison.tested == tested}
        if splits:
            lines.append(f"Tested {text.format(splits=' or '.join(map(str, sorted(splits))))}.")
    judged = sum(one.verdict not in ("?", "") for one in cells)
    if judged:
        among = f"the {judged} judged cells of the table" if family == "table" else "the judged cells of its row"
        lines.append(f"* p at most {LEVEL:.2f} after Holm's correction for {among}.")
    missing: dict[str, list[str]] = {}
    for one in cells:
        if one.verdict == "?" and _heading(one.metric) not in missing.setdefault(one.comparison.needed, []):
            missing[one.comparison.needed].append(_heading(one.metric))
    lines += [f"? {', '.join(headings)}: needs {needed}." for needed, headings in missing.items()]
    if any(one.metric in NOT_JUDGED for one in cells):
        lines.append("Times are not judged.")
    return lines


def find_baseline(rows: Sequence[RecipeRuns], name: str | None) -> RecipeRuns:
    """The row of that name, or the first.

    Raises:
        ValueError: no row has the name.
    """
    for row in rows:
        if name in (None, row.name):
            return row
    raise ValueError(f"baseline must be one of {', '.join(row.name for row in rows)}; got {name!r}")


def as_text(cells: Sequence[Sequence[str]]) -> str:
    """Columns aligned for a terminal."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_markdown(cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(cells[0]), *lines[1:]])


def as_csv(rows: Sequence[RecipeRuns]) -> str:
    """All columns of every run, one line each."""
    return _csv([{"row": row.name} | row.runs[key].row for row in rows for key in sorted(row.runs)])


def differences_csv(found: dict[str, list[Difference]], baseline: RecipeRuns) -> str:
    """Every difference with its interval, p-value, and what was tested, one line each."""
    return _csv(
        [
            {
                "row": name,
                "baseline": baseline.name,
                "metric": one.metric,
                "difference": one.comparison.mean,
                "low": one.comparison.low,
                "high": one.comparison.high,
                "p": one.comparison.p,
                "p_holm": one.p_adjusted,
                "verdict": one.verdict,
                "pairs": one.comparison.pairs,
                "splits": one.comparison.splits,
                "tested": one.comparison.tested,
                "needed": one.comparison.needed,
            }
            for name, each in found.items()
            for one in each
        ]
    )


def _csv(lines: list[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(lines[0]), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def _compared(row: RecipeRuns, baseline: RecipeRuns, metric: str) -> Comparison:
    keys = sorted(row.runs.keys() & baseline.runs.keys())
    pairs = [(row.runs[key], baseline.runs[key]) for key in keys]
    by_split: dict[int, list[float]] = {}
    for key, (one, other) in zip(keys, pairs, strict=True):
        by_split.setdefault(key.split, []).append(one.row[metric] - other.row[metric])
    shares = [run.row["n_test"] / run.row["n_train"] for run, _ in pairs]
    return compare(
        by_split,
        test_over_train=float(np.mean(shares)) if shares else 0.0,
        group_noise=_group_noise(pairs, metric) if len(by_split) == 1 and metric not in NOT_JUDGED else None,
    )


def _group_noise(pairs: Sequence[tuple[StoredRun, StoredRun]], metric: str) -> GroupNoise | str:
    """Variance over draws of test groups of the mean difference, or why it is not known."""
    if metric not in bootstrap.METRICS:
        return f"{metric} is not a score of stored predictions"
    draws, groups = [], []
    for one, other in pairs:
        first, second = one.predictions, other.predictions
        if isinstance(first, str) or isinstance(second, str):
            return first if isinstance(first, str) else str(second)
        if not np.array_equal(first.row, second.row):
            return f"{one.folder} and {other.folder} have other test rows"
        draws.append(first.draws[metric] - second.draws[metric])
        groups.append(first.differing_groups(second, metric))
    # A draw without a row of the classes in question has no score.
    means = np.mean(draws, axis=0)
    known = means[~np.isnan(means)]
    differing = len(np.unique(np.concatenate(groups)))
    return GroupNoise(float(known.var(ddof=1)) if len(known) > 1 else 0.0, min(differing, len(known)))


def _verdict(metric: str, found: Comparison, p_adjusted: float) -> str:
    if metric in NOT_JUDGED:
        return ""
    if not found.tested:
        return "?"
    if p_adjusted > LEVEL:
        return "="
    more_is_better = METRICS.get(metric, ("", None))[1]
    if more_is_better is None:
        return "higher" if found.mean > 0 else "lower"
    return "better" if (found.mean > 0) == more_is_better else "worse"


def _name(path: Path) -> str:
    path = path.resolve()
    return path.parent.name if re.fullmatch(r"(split-\d+-)?seed-\d+", path.name) else path.name


def _heading(metric: str) -> str:
    return METRICS.get(metric, (metric, None))[0]


def _mean_cell(values: np.ndarray, metric: str) -> str:
    mean = _number(float(values.mean()), metric)
    return f"{mean}±{_number(float(values.std(ddof=1)), metric)}" if len(values) > 1 else mean


def _difference_cell(one: Difference) -> str:
    found = one.comparison
    text = _number(found.mean, one.metric, sign=True)
    if found.tested and one.metric not in NOT_JUDGED:
        text += f"±{_number((found.high - found.low) / 2, one.metric)}"
    return text + MARKS[one.verdict]


def _p_text(p: float) -> str:
    return "< .001" if p < 0.001 else _number(p, "p")


def _number(value: float, metric: str, sign: bool = False) -> str:
    if math.isnan(value):
        return "n/a"
    digits = 1 if metric in NOT_JUDGED else 3
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if digits == 3 and abs(value) < 1 else text
