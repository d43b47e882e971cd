"""Measures in this process, under the allocator it was started with; ``python -m bench`` starts it."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import fusedloss
from bench import memory, roofline, timing
from bench.cases import Case, Mismatch, cases_of
from fusedloss.backends import cpp

# glibc reads these when the process starts.
ALLOCATORS = {
    "retained": {
        "MALLOC_MMAP_THRESHOLD_": "4294967296",
        "MALLOC_TRIM_THRESHOLD_": "17179869184",
        "MALLOC_TOP_PAD_": "268435456",
    },
    "default": {},
    "returned": memory.ENVIRONMENT,
}
SECONDS, QUICK_SECONDS = 2.0, 0.2


def run(operations: list[str], allocator: str, threads: int, quick: bool, match: str = "") -> dict[str, Any]:
    """Measures in a fresh process: speed, or peak memory where freed memory is ``"returned"``."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    options = ["--allocator", allocator, "--threads", str(threads), "--match", match, *(["--quick"] if quick else [])]
    found = subprocess.run(
        [sys.executable, "-m", "bench.measure", *operations, *options],
        env=environment | ALLOCATORS[allocator],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if found.returncode:
        raise SystemExit(found.returncode)
    return json.loads(found.stdout.splitlines()[-1])


def environment(allocator: str) -> dict[str, Any]:
    """Where and with what the figures were made."""
    return {
        "allocator": allocator,
        "threads": torch.get_num_threads(),
        "cpu": _cpu_model(),
        "simd": cpp.extension.level() if cpp.extension else "none",
        "torch": torch.__version__,
        "fusedloss": fusedloss.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def speed(case: Case, seconds: float) -> dict[str, Any]:
    """Times of every contestant, once their values are right; ratios are to the fused time."""
    contest = case.prepare()
    contest.check()
    times = timing.in_turn(contest.calls | {case.limit: contest.limit}, contest.refill, seconds)
    limit = timing.summary(times[case.limit]).median
    found = {}
    for name in times:
        summary = timing.summary(times[name])
        found[name] = {
            **{f"{figure}_ms": 1e3 * value for figure, value in summary._asdict().items()},
            "gb_per_s": case.moved / summary.median / 1e9,
            "share": limit / summary.median,
            "ratio": timing.ratio(times, name, "fused"),
            "rounds": len(times[name]),
        }
    return found


def peaks(case: Case) -> dict[str, Any]:
    """Peak memory of a step of every contestant beyond its inputs, in MB."""
    contest = case.prepare()
    calls = dict(contest.calls)
    if contest.peak_baseline is not None:
        calls["baseline"] = contest.peak_baseline
    found = {name: memory.peak_bytes(call, contest.refill) for name, call in calls.items()}
    return {name: {"peak_mb": peak / 1e6} for name, peak in found.items() if peak is not None}


def _cpu_model() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def commit() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.measure", description=__doc__)
    parser.add_argument("operations", nargs="+")
    parser.add_argument("--allocator", choices=ALLOCATORS, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--match", default="")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seconds = QUICK_SECONDS if options.quick else SECONDS
    returned = options.allocator == "returned"
    output: dict[str, Any] = {"environment": environment(options.allocator), "cases": {}, "wrong": []}
    if not returned:
        output["limits"] = roofline.limits(seconds)
    for operation in options.operations:
        for case in cases_of(operation, options.quick, options.match):
            if not (case.timed or returned):
                continue
            print(f"{options.allocator:<8} {case.name}", file=sys.stderr, flush=True)
            try:
                output["cases"][case.name] = peaks(case) if returned else speed(case, seconds)
            except Mismatch as mismatch:
                output["wrong"].append(f"{case.name}: {mismatch}")
    print(json.dumps(output))


if __name__ == "__main__":
    main()
