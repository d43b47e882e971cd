r"""How often the report stars nothing: cross-entropy against itself, over seeds and splits of one bank.

    python -m bench.star_rate demo/bank runs/star_rate --output bench/results/star_rate.csv \
        --settings '{"epochs": 20, "lr": [0.01], "val_fraction": 0.2}' \
        --against '{"class_weights": "effective", "beta": 0.999}'

Trains the same recipe with every split and seed (60 runs; finished ones are read). Each draw takes two disjoint sets of
runs, gives them common seeds and compares them as two rows of a table. A row counts as starred when any of its metrics
is. Beside it the rule of two standard errors over the pairs, whatever their splits. ``--against`` then draws one side
from the runs of another recipe, with the same seeds: what is found where there is something to find.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fusedloss.features import FeatureBank
from fusedloss.train import Recipe
from fusedloss.train.report import DEFAULT_METRICS, NOT_JUDGED, RecipeRuns, RunKey, StoredRun, collect_rows, differences
from fusedloss.train.sweep import sweep

JUDGED = [metric for metric in DEFAULT_METRICS if metric not in NOT_JUDGED]
# Splits and seeds of a side; 0 splits: any runs, each pair from splits of its own.
DESIGNS = ((1, 3), (1, 5), (3, 1), (3, 3), (5, 1), (5, 2), (6, 5), (0, 3), (0, 5))
Runs = dict[RunKey, StoredRun]


class Rates(NamedTuple):
    """Shares of draws: rows with a star, cells with one, and rows beyond two standard errors."""

    rows: float
    cells: float
    two_errors: float


def draw(random: np.random.Generator, one: Runs, other: Runs, splits: int, seeds: int) -> tuple[Runs, Runs]:
    """Two disjoint sets of runs with common keys."""
    same = one is other
    if splits == 0:
        keys = sorted(one)
        chosen = [keys[i] for i in random.permutation(len(keys))[: 2 * seeds]]
        pairs = zip(chosen[:seeds], chosen[seeds:], strict=True)
        left, right = zip(*pairs, strict=True)
        return (
            {RunKey(i, 0): one[key] for i, key in enumerate(left)},
            {RunKey(i, 0): other[key] for i, key in enumerate(right)},
        )
    all_splits = sorted({key.split for key in one})
    first, second = {}, {}
    for split in random.permutation(all_splits)[:splits]:
        keys = [key for key in sorted(one) if key.split == split]
        order = random.permutation(len(keys))
        for number in range(seeds):
            place = RunKey(int(split), number)
            first[place] = one[keys[order[number]]]
            # Runs of another recipe have the same seeds: their pairs are those that a sweep makes.
            second[place] = other[keys[order[number + seeds if same else number]]]
    return first, second


def beyond_two_errors(first: Runs, second: Runs) -> bool:
    """Whether any metric's mean paired difference lies beyond two standard errors."""
    for metric in JUDGED:
        each = np.array([first[key].row[metric] - second[key].row[metric] for key in first])
        if abs(each.mean()) > 2 * each.std(ddof=1) / math.sqrt(len(each)):
            return True
    return False


def star_rate(one: Runs, other: Runs, design: tuple[int, int], draws: int, seed: int = 0) -> Rates:
    """Shares of so many draws of a design."""
    random = np.random.default_rng(seed)
    rows = cells = two_errors = 0
    for _ in range(draws):
        first, second = draw(random, one, other, *design)
        baseline = RecipeRuns("baseline", first)
        (found,) = differences([baseline, RecipeRuns("row", second)], baseline, JUDGED).values()
        stars = sum(difference.verdict in ("better", "worse") for difference in found)
        rows, cells = rows + (stars > 0), cells + stars / len(found)
        two_errors += beyond_two_errors(first, second)
    return Rates(rows / draws, cells / draws, two_errors / draws)


def possible(runs: Runs, against_itself: bool) -> Iterator[tuple[int, int]]:
    """The designs that so many runs allow."""
    splits = len({key.split for key in runs})
    least = min(sum(key.split == split for key in runs) for split in {key.split for key in runs})
    for design in DESIGNS:
        needed = design[1] * (2 if against_itself else 1)
        if (design[0] == 0 and against_itself and len(runs) >= needed) or (0 < design[0] <= splits and needed <= least):
            yield design


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.star_rate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bank", type=Path, help="folder of a feature bank; make demo writes that of the glyphs")
    parser.add_argument("folder", type=Path, help="folder for the runs")
    parser.add_argument("--splits", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--settings", default="{}", help="JSON object of settings of both recipes")
    parser.add_argument("--against", help="JSON object of settings of another recipe")
    parser.add_argument("--output", type=Path, help="CSV file")
    options = parser.parse_args()
    settings = json.loads(options.settings)
    rows = {"CE": Recipe.from_dict(settings)}
    if options.against:
        rows["other"] = Recipe.from_dict(settings | json.loads(options.against))
    bank = FeatureBank.open(options.bank)
    sweep(bank, rows, range(options.seeds), options.folder, splits=range(options.splits), pictures=False)
    collected = [collect_rows([options.folder / name])[0].runs for name in rows]
    one, lines = collected[0], []
    for name, other in zip(["CE", options.against], collected, strict=False):
        for design in possible(one, one is other):
            rates = star_rate(one, other, design, options.draws)
            line = {
                "rows": f"CE and {name}",
                "splits": design[0] or "mixed",
                "seeds": design[1],
                "draws": options.draws,
                "runs": len(one),
                "starred_rows": round(rates.rows, 4),
                "starred_cells": round(rates.cells, 4),
                "rows_beyond_2_errors": round(rates.two_errors, 4),
            }
            lines.append(line)
            print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
    if options.output:
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main()
