"""One picture of the CSV files: how many times longer rivals take, and the share of the machine's limit.

python -m bench.plot bench/results
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

from bench.report import JUDGED

Row = dict[str, str]
_COLOURS = {"eager": "#4477aa", "compiled": "#ee7733", "one pass": "#999933"}


def read(folder: Path) -> list[Row]:
    """The rows of every CSV file in the folder."""
    found: list[Row] = []
    for path in sorted(folder.glob("*.csv"), reverse=True):
        with path.open(newline="") as file:
            found += csv.DictReader(file)
    return found


def draw(folder: Path) -> Path:
    """Writes ``speed.png`` beside the CSV files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in read(folder) if row.get("median_ms")]
    cases = list(dict.fromkeys((row["title"], row["case"]) for row in rows))
    figure, (ratios, shares) = plt.subplots(
        1, 2, sharey=True, figsize=(13, 1.8 + 0.27 * len(cases)), width_ratios=(3, 2), layout="constrained"
    )
    positions = {case: position for position, case in enumerate(cases)}
    _draw_ratios(ratios, rows, positions)
    _draw_shares(shares, rows, positions)
    ratios.set_yticks(range(len(cases)), [f"{title}  {case}" for title, case in cases], fontsize=8)
    ratios.set_ylim(len(cases) - 0.4, -0.6)
    for axes in (ratios, shares):
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        for position in range(1, len(cases)):
            if cases[position][0] != cases[position - 1][0]:
                axes.axhline(position - 0.5, color="0.6", linewidth=0.8)
    first = rows[0]
    figure.suptitle(
        f"{first['cpu']}, {first['threads']} threads, {first['simd']}; torch {first['torch']}, "
        f"fusedloss {first['fusedloss']} ({first['commit']}), {first['date'][:10]}",
        fontsize=9,
    )
    figure.legend(*ratios.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    path = folder / "speed.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _draw_ratios(axes: Any, rows: list[Row], positions: dict[tuple[str, str], int]) -> None:
    providers = [name for name in _COLOURS if any(row["provider"] == name for row in rows)]
    for index, provider in enumerate(providers):
        shift = 0.5 * ((index + 0.5) / len(providers) - 0.5)
        for allocator, filled in ((JUDGED, True), ("default", False)):
            points = [
                (float(row["ratio"]), positions[row["title"], row["case"]] + shift)
                for row in rows
                if row["provider"] == provider and row["allocator"] == allocator
            ]
            if points:
                colour = _COLOURS[provider]
                axes.plot(
                    *zip(*points, strict=True),
                    "o",
                    color=colour,
                    markersize=5,
                    markerfacecolor=colour if filled else "none",
                    label=f"{provider}, {allocator}",
                )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 3, 5, 10, 20, 40) if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("time of the rival / time of fusedloss (right of 1: fusedloss is faster)", fontsize=9)


def _draw_shares(axes: Any, rows: list[Row], positions: dict[tuple[str, str], int]) -> None:
    fused = [row for row in rows if row["provider"] == "fused"]
    judged = [row for row in fused if row["allocator"] == JUDGED] or fused
    at = [positions[row["title"], row["case"]] for row in judged]
    shares = [float(row["share"]) for row in judged]
    axes.barh(at, shares, height=0.6, color="#88ccaa")
    for position, share, row in zip(at, shares, judged, strict=True):
        axes.text(share, position, f" {share:.2f}  ({float(row['gb_per_s']):.3g} GB/s)", va="center", fontsize=7)
    axes.set_xlim(0, max(1.35, 1.3 * max(shares)))
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel(f"share of the measured bandwidth, {judged[0]['allocator']}", fontsize=9)


if __name__ == "__main__":
    print(draw(Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results")))
