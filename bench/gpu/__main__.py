"""Times the Triton kernels against eager PyTorch, torch.compile and installed peers on one GPU.

    python -m bench.gpu softmax_ce                 # writes bench/results/gpu_softmax_ce.csv and .md
    python -m bench.gpu linear_ce --part 768       # gpu_linear_ce_768.csv and .md
    TRITON_INTERPRET=1 python -m bench.gpu --small --device cpu --out build/gpu    # every step, no meaning in the times

Contestants run in turn on the same tensors; no time is shown of one whose values were wrong. The limits (a copy, a
read, a bfloat16 matrix product) are measured in the same process.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

import fusedloss
from bench.cases import Mismatch
from bench.gpu import Case, attempt, cases_of, parts_of, stems
from bench.measure import commit

ROUNDS, SECONDS = 20, 10.0  # of one case: no more of either, but three rounds
RESULTS = Path(__file__).parent.parent / "results"
COLUMNS = ("stem", "case", "contestant", "ms", "rate", "unit", "share", "ratio", "limit", "limit_rate", "rounds",
           "peak_mb", "device", "torch", "triton", "commit", "date")  # fmt: skip


def seconds_in_turn(calls: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median time of each call, taken in turn after two warm-up rounds."""
    times: dict[str, list[Any]] = {name: [] for name in calls}
    for round_number in range(rounds + 2):
        for name, call in calls.items():
            began = _now(device)
            call()
            if round_number >= 2:
                times[name].append((began, _now(device)))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return {name: statistics.median(a.elapsed_time(b) / 1e3 for a, b in spans) for name, spans in times.items()}
    return {name: statistics.median(b - a for a, b in spans) for name, spans in times.items()}


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def limits(device: torch.device, small: bool) -> dict[str, float]:
    """Bytes per second of a copy (read and written) and of a read, operations per second of a bfloat16 product."""
    count, side = (1 << 12, 32) if small else (1 << 29, 8192)
    source, copy = torch.randn(count, device=device), torch.empty(count, device=device)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    took = seconds_in_turn(
        {"copy": lambda: copy.copy_(source), "read": lambda: source.sum(), "gemm": lambda: a @ b}, device, 10
    )
    work = {"copy": 8.0 * count, "read": 4.0 * count, "gemm": 2.0 * side**3}
    return {name: work[name] / took[name] for name in work}


def measured(case: Case, device: torch.device, limit: float, most_rounds: int) -> list[dict[str, Any]]:
    """One line for each contestant of a case."""
    contest = case.prepare(device)
    outcome = dict.fromkeys(contest.check(), "wrong")
    outcome |= {name: attempt(name, call) for name, call in contest.calls.items() if name not in outcome}
    calls = {name: call for name, call in contest.calls.items() if not outcome[name]}
    rounds = 1
    if most_rounds > 1:
        a_round = sum(seconds_in_turn(calls, device, 1).values())
        rounds = max(3, min(most_rounds, int(SECONDS / a_round)))
    took = seconds_in_turn(calls, device, rounds)
    lines: list[dict[str, Any]] = [
        {
            "stem": case.stem,
            "case": case.label,
            "contestant": name,
            "ratio": outcome[name],
        }
        for name in contest.calls
        if name not in calls
    ]
    for name, seconds in took.items():
        rate = case.work / seconds
        lines.append({
            "stem": case.stem, "case": case.label, "contestant": name, "ms": f"{1e3 * seconds:.5g}",
            "rate": f"{rate / (1e12 if case.limit == 'gemm' else 1e9):.5g}",
            "unit": "TFLOP/s" if case.limit == "gemm" else "GB/s", "share": f"{rate / limit:.4g}",
            "ratio": f"{seconds / took['fused']:.4g}", "limit": case.limit,
            "limit_rate": f"{limit:.5g}", "rounds": rounds, "peak_mb": _peak_mb(contest.calls[name], device),
        })  # fmt: skip
    return lines


def _peak_mb(call: Callable[[], Any], device: torch.device) -> str:
    """Memory that a call takes beyond what is there."""
    if device.type != "cuda":
        return ""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return f"{(torch.cuda.max_memory_allocated(device) - before) / 1e6:.5g}"


def markdown(title: str, lines: list[dict[str, Any]]) -> str:
    """A table: a row for each case; fused in ms and as a share of its limit, rivals as multiples of its time."""
    names = [name for name in dict.fromkeys(line["contestant"] for line in lines) if name != "fused"]
    first = lines[0]
    text = [f"### {title}", "", f"{first['device']}, torch {first['torch']}, triton {first['triton']}, {first['date']}",
            "", f"| case | fused ms | rate | share of limit | {' | '.join(f'{name} / fused' for name in names)} |",
            f"|---|---|---|---|{'---|' * len(names)}"]  # fmt: skip
    for label in dict.fromkeys(line["case"] for line in lines):
        mine = {line["contestant"]: line for line in lines if line["case"] == label}
        fused = mine["fused"]
        share = f"{float(fused['share']):.0%} of {fused['limit']}"
        ratios = " | ".join(mine[name]["ratio"] if name in mine else "-" for name in names)
        text.append(f"| {label} | {fused['ms']} | {fused['rate']} {fused['unit']} | {share} | {ratios} |")
    return "\n".join([*text, ""])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stems", nargs="*", help=f"{', '.join(stems())} (default: all)")
    parser.add_argument("--part", default="", help="of the one stem that is named; 768 of linear_ce is its width")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no case is begun")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if unknown := set(options.stems) - set(stems()):
        parser.error(f"stem: got {', '.join(sorted(unknown))}; allowed are {', '.join(stems())}")
    parts = parts_of(options.stems[0]) if len(options.stems) == 1 else ()
    if options.part and options.part not in parts:
        parser.error(f"part: got {options.part}; allowed are {', '.join(parts) or 'none'}")
    return options


def main() -> int:
    """Measures and writes; 1 if any values were wrong."""
    began = time.monotonic()
    options = _options()
    device = torch.device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    found_limits = limits(device, options.small)
    where = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__, "triton": triton.__version__, "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
    }  # fmt: skip
    wrong, left_out = [], []
    for stem in options.stems or stems():
        lines: list[dict[str, Any]] = []
        name = "_".join(filter(None, (stem, options.part)))
        for case in cases_of(stem, options.small, options.part):
            if time.monotonic() - began > options.limit:
                left_out.append(f"{stem}: {case.label}")
                continue
            print(f"{time.monotonic() - began:.0f} s: {stem}: {case.label}", file=sys.stderr, flush=True)
            try:
                with fusedloss.backend("triton"):
                    rounds = 1 if options.small else ROUNDS
                    lines += [line | where for line in measured(case, device, found_limits[case.limit], rounds)]
            except (Mismatch, torch.OutOfMemoryError) as error:
                wrong.append(f"{stem}: {case.label}: {error}")
            gc.collect()
            if lines:
                # After each case: a run that is ended early leaves what it has.
                _write(options.out, name, lines)
        if lines:
            print(markdown(name, lines))
    for line in left_out:
        print(f"left out after {options.limit:g} s: {line}", file=sys.stderr)
    for line in wrong:
        print(f"no time shown: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _write(folder: Path, name: str, lines: list[dict[str, Any]]) -> None:
    with (folder / f"gpu_{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    (folder / f"gpu_{name}.md").write_text(markdown(name, lines))


if __name__ == "__main__":
    sys.exit(main())
