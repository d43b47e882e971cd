"""Tables over finished runs: means with standard errors, and differences paired by seed."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusedloss.atomic_io import StorageError
from fusedloss.features.checks import as_list, as_path
from fusedloss.train.recipe import Recipe
from fusedloss.train.run_folder import CONFIG, RunFolder

# Column of a run's row -> heading, and whether more is better (None: not judged).
METRICS: dict[str, tuple[str, bool | None]] = {
    "top1": ("top-1", True),
    "macro_f1_fg": ("macro F1", True),
    "bal_acc": ("bal. acc", True),
    "rec_many": ("many", True),
    "rec_med": ("medium", True),
    "rec_few": ("few", True),
    "ece15": ("ECE", False),
    "ece15_ts": ("ECE at T", False),
    "nll": ("nll", False),
    "train_s": ("time s", None),
}
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
VERDICT_NEEDS = 3
MARKS = {"better": "*", "worse": "*", "=": " ", "?": "?"}


@dataclass(frozen=True)
class RecipeRuns:
    """The runs of one recipe, by seed."""

    name: str
    by_seed: dict[int, dict[str, Any]]

    def values(self, metric: str) -> np.ndarray:
        return np.array([self.by_seed[seed][metric] for seed in sorted(self.by_seed)], dtype=np.float64)


@dataclass(frozen=True)
class Difference:
    """Mean paired difference to the baseline, its standard error, and the number of common seeds."""

    mean: float
    error: float
    n: int
    verdict: str


def collect_rows(folders: Sequence[str | Path]) -> list[RecipeRuns]:
    """Finished runs in and below the folders; runs that differ only in their seed make one row.

    Raises:
        StorageError: no finished run, the same recipe and seed twice, or runs on different banks or splits.
        TypeError: anything but a sequence of paths.
    """
    paths = [as_path("folders", folder) for folder in as_list("folders", folders)]
    runs = [RunFolder(path.parent) for folder in paths for path in sorted(folder.rglob(CONFIG))]
    finished = [run for run in runs if (run.path / "result.json").exists()]
    if not finished:
        raise StorageError(f"folders must hold finished runs; got none in {', '.join(map(str, paths))}")
    names: dict[str, str] = {}
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    common: tuple[Any, ...] | None = None
    for run in finished:
        config = run.config()
        recipe = Recipe.from_dict(config["recipe"])
        data = (config["bank"]["fingerprint"], recipe.split_seed, recipe.test_fraction)
        if common not in (None, data):
            raise StorageError(
                f"folders must hold runs on one bank and split; got {run.path}, on another bank or split than "
                f"{finished[0].path} (report them separately)"
            )
        common = data
        name = _name(run.path)
        key = f"{name} {recipe.replace(seed=0, lr=1.0).to_dict()}"
        by_seed = rows.setdefault(key, {})
        names[key] = name if name not in (n for k, n in names.items() if k != key) else f"{name} ({len(names) + 1})"
        if recipe.seed in by_seed:
            raise StorageError(
                f"folders must hold every recipe and seed once; got seed {recipe.seed} again in {run.path} (remove one)"
            )
        by_seed[recipe.seed] = run.result()["row"]
    return [RecipeRuns(names[key], by_seed) for key, by_seed in rows.items()]


def difference(row: RecipeRuns, baseline: RecipeRuns, metric: str) -> Difference:
    """Mean of the differences over common seeds, with the verdict of two standard errors.

    ``"better"`` and ``"worse"`` lie beyond two standard errors, ``"="`` within, ``"?"`` has fewer than three
    seeds.
    """
    seeds = sorted(row.by_seed.keys() & baseline.by_seed.keys())
    each = np.array([row.by_seed[s][metric] - baseline.by_seed[s][metric] for s in seeds], dtype=np.float64)
    if len(each) == 0:
        return Difference(math.nan, math.nan, 0, "?")
    mean, error = float(each.mean()), standard_error(each)
    if len(each) < VERDICT_NEEDS or math.isnan(mean):
        return Difference(mean, error, len(each), "?")
    if abs(mean) <= 2 * error or mean == 0:
        return Difference(mean, error, len(each), "=")
    more_is_better = METRICS[metric][1] if metric in METRICS else True
    return Difference(mean, error, len(each), "better" if (mean > 0) == more_is_better else "worse")


def standard_error(values: np.ndarray) -> float:
    """Standard deviation (n - 1) over the root of n; NaN for one value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def summary_cells(rows: Sequence[RecipeRuns], metrics: Sequence[str]) -> list[list[str]]:
    """Heading and one line per row: name, seeds, learning rates, mean ± standard error of metrics."""
    lines = [["row", "n", "lr", *(_heading(metric) for metric in metrics)]]
    for row in rows:
        rates = sorted({run["lr"] for run in row.by_seed.values()})
        cells = [_mean_cell(row.values(metric), metric) for metric in metrics]
        lines.append([row.name, str(len(row.by_seed)), ", ".join(f"{lr:g}" for lr in rates), *cells])
    return lines


def difference_cells(rows: Sequence[RecipeRuns], baseline: RecipeRuns, metrics: Sequence[str]) -> list[list[str]]:
    """Heading and one line per other row: paired differences, marked ``*`` beyond two standard errors."""
    metrics = [metric for metric in metrics if METRICS.get(metric, ("", None))[1] is not None]
    lines = [[f"difference to {baseline.name}", "n", *(_heading(metric) for metric in metrics)]]
    for row in rows:
        if row is baseline:
            continue
        each = [difference(row, baseline, metric) for metric in metrics]
        cells = [
            f"{_number(d.mean, m, sign=True)}±{_number(d.error, m)}{MARKS[d.verdict]}"
            for d, m in zip(each, metrics, strict=True)
        ]
        lines.append([row.name, str(max((d.n for d in each), default=0)), *cells])
    return lines


def verdicts(rows: Sequence[RecipeRuns], baseline: RecipeRuns, metrics: Sequence[str]) -> list[str]:
    """One sentence per row: where it is better, worse, or not told apart from the baseline."""
    lines = []
    for row in rows:
        if row is baseline:
            continue
        judged: dict[str, list[str]] = {}
        for metric in metrics:
            if METRICS.get(metric, ("", None))[1] is not None:
                judged.setdefault(difference(row, baseline, metric).verdict, []).append(_heading(metric))
        words = {
            "better": "better in",
            "worse": "worse in",
            "=": "within 2 standard errors in",
            "?": "too few seeds for",
        }
        parts = [f"{words[kind]} {', '.join(judged[kind])}" for kind in words if kind in judged]
        lines.append(f"{row.name} against {baseline.name}: {'; '.join(parts)}.")
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
    runs = [{"row": row.name} | row.by_seed[seed] for row in rows for seed in sorted(row.by_seed)]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(runs[0]), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(runs)
    return buffer.getvalue()


def _name(path: Path) -> str:
    path = path.resolve()
    return path.parent.name if re.fullmatch(r"seed-\d+", path.name) else path.name


def _heading(metric: str) -> str:
    return METRICS.get(metric, (metric, None))[0]


def _mean_cell(values: np.ndarray, metric: str) -> str:
    mean = _number(float(values.mean()), metric)
    return f"{mean}±{_number(standard_error(values), metric)}" if len(values) > 1 else mean


def _number(value: float, metric: str, sign: bool = False) -> str:
    if math.isnan(value):
        return "n/a"
    digits = 1 if metric in ("train_s", "ms_step") else 3
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if digits == 3 and abs(value) < 1 else text
