"""Time and peak memory of a step of supervised contrast as the batch grows: N squared and N.

    python -m bench.supcon_growth --out build/bench
    python -m bench.supcon_growth --rows 32768          # the others as they were measured before

Prints a line for each N, keeps them in supcon_growth.csv, and draws both on logarithmic axes, beside what one N x N
matrix of float32 takes.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench import measure as machine
from bench import memory, timing
from bench.supcon import prepare

ROWS, WIDTH = (1024, 2048, 4096, 8192, 16384, 32768), 128


def measure(rows: int) -> dict[str, float]:
    """Seconds of a step and its peak memory beyond its inputs, in this process."""
    contest = prepare((rows, WIDTH), rivals=False)
    call = contest.calls["fused"]
    timing.once(call, contest.refill, 0)
    seconds = statistics.median(timing.once(call, contest.refill, i) for i in range(3))
    peak = memory.peak_bytes(call, contest.refill)
    return {"rows": rows, "ms": 1e3 * seconds, "peak_mb": float("nan") if peak is None else peak / 1e6}


def in_fresh_process(rows: int, threads: int) -> dict[str, float]:
    """``measure`` where freed memory goes back to the system at once."""
    code = (
        f"import json, torch; torch.set_num_threads({threads}); from bench.supcon_growth import measure; "
        f"print(json.dumps(measure({rows})))"
    )
    environment = os.environ | memory.ENVIRONMENT
    found = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def merged(lines: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The lines and those of other N that the file holds, written back in the order of N."""
    kept: dict[int, dict[str, Any]] = {}
    if path.exists():
        with path.open(newline="") as file:
            kept = {int(line["rows"]): line for line in csv.DictReader(file)}
    for line in lines:
        kept[int(line["rows"])] = {
            key: f"{value:.6g}" if isinstance(value, float) else value for key, value in line.items()
        }
    found = [kept[rows] for rows in sorted(kept)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    return found


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Both curves, each over a line of its slope."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [{key: float(line[key]) for key in ("rows", "ms", "peak_mb")} for line in lines]
    rows = [line["rows"] for line in lines]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for axis, key, label in ((left, "ms", "ms per step"), (right, "peak_mb", "MB beyond the inputs")):
        axis.plot(rows, [line[key] for line in lines], "o-", label="fusedloss.supcon")
        axis.set(xscale="log", yscale="log", xlabel="N", ylabel=label)
    left.plot(rows, [lines[-1]["ms"] * (n / rows[-1]) ** 2 for n in rows], ":", label="N²")
    right.plot(rows, [lines[0]["peak_mb"] * n / rows[0] for n in rows], ":", label="N")
    right.plot(rows, [4e-6 * n * n for n in rows], "--", label="one N x N matrix")
    for axis in (left, right):
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.supcon_growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    lines = []
    torch.set_num_threads(options.threads)
    environment = machine.environment("returned")
    for rows in options.rows:
        lines.append(in_fresh_process(rows, options.threads) | environment)
        print("N = {rows:<6} {ms:10.1f} ms {peak_mb:8.1f} MB".format(**lines[-1]), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    draw(merged(lines, options.out / "supcon_growth.csv"), options.out / "supcon_growth.png")


if __name__ == "__main__":
    main()
