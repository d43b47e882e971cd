"""The verdicts as lines on a terminal, as CSV and as Markdown."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.static.judge import KernelRow, Verdict
from bench.static.model import GPUS

COLUMNS = (
    "target", "case", "kernel", "phase", "count", "launches_forward", "launches_backward", "triton_forward",
    "triton_backward", "eager_forward", "eager_backward", "syncs", "grid", "warps", "registers", "shared", "spilled",
    "programs_per_sm", "warps_per_sm", "kb_in_flight", "load_bits", "store_bits", "instructions_per_element",
    "fp64_per_element", "mb", "bound", *(f"{gpu.name.lower()}_us" for gpu in GPUS),
    *(f"{gpu.name.lower()}_share" for gpu in GPUS), "unknown", "error",
)  # fmt: skip
CALL = "(call)"
OPERATIONS = "(PyTorch)"


def rows(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    """A line for each call, then one for each of its kernels and one for PyTorch's operations."""
    return [row for verdict in verdicts for row in _rows(verdict)]


def _rows(verdict: Verdict) -> list[dict[str, Any]]:
    common = {"target": verdict.target, "case": verdict.case}
    eager = verdict.eager or ("", "")
    whole = {
        "kernel": CALL, "launches_forward": verdict.launches[0], "launches_backward": verdict.launches[1],
        "triton_forward": verdict.triton[0], "triton_backward": verdict.triton[1],
        "eager_forward": eager[0], "eager_backward": eager[1], "syncs": verdict.syncs,
    }  # fmt: skip
    for gpu in GPUS:
        if gpu.name in verdict.seconds:
            whole[f"{gpu.name.lower()}_us"] = round(verdict.seconds[gpu.name] * 1e6, 1)
            whole[f"{gpu.name.lower()}_share"] = round(verdict.share[gpu.name], 3)
    found = [common | whole] + [common | _kernel(count, row) for count, row in verdict.kernels]
    if verdict.operations:
        line: dict[str, Any] = {"kernel": OPERATIONS, "count": sum(verdict.operations.values())}
        for name, seconds in verdict.operation_seconds.items():
            line[f"{name.lower()}_us"] = round(seconds * 1e6, 1) if verdict.seconds else ""
        found.append(common | line)
    return found


def _kernel(count: int, row: KernelRow) -> dict[str, Any]:
    line: dict[str, Any] = {
        "kernel": row.kernel, "phase": row.phase, "count": count, "grid": row.grid, "warps": row.warps,
        "registers": row.registers, "shared": row.shared, "spilled": row.spilled, "programs_per_sm": row.programs,
        "warps_per_sm": row.programs * row.warps, "kb_in_flight": round(row.in_flight / 1024, 1),
        "load_bits": row.loads, "store_bits": row.stores,
        "instructions_per_element": "" if row.truncated else float(f"{row.instructions:.4g}"),
        "fp64_per_element": float(f"{row.fp64:.3g}"), "mb": round(row.megabytes, 1), "bound": row.bound,
        "unknown": row.unknown or "", "error": row.error or "walked in part" * row.truncated,
    }  # fmt: skip
    for name, seconds in row.seconds.items():
        line[f"{name.lower()}_us"] = round(seconds * 1e6, 1)
    return line


def write_csv(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def text(verdict: Verdict) -> str:
    """A call and its kernels, for a terminal."""
    launches = f"launches {verdict.launches[0]} + {verdict.launches[1]}"
    if verdict.eager is not None:
        launches += f" (eager {verdict.eager[0]} + {verdict.eager[1]})"
    predicted = "; ".join(
        f"{name} {seconds * 1e6:.0f} us, {100 * verdict.share[name]:.0f}%" for name, seconds in verdict.seconds.items()
    )
    lines = [f"{verdict.case} [{verdict.target}]: {launches}; {predicted}"]
    for count, row in verdict.kernels:
        lines.append(f"  {row.phase:8} {_kernel_text(count, row)}")
    if verdict.operations:
        names = ", ".join(f"{name} {count}" if count > 1 else name for name, count in verdict.operations.items())
        times = " ".join(f"{seconds * 1e6:.0f}" for seconds in verdict.operation_seconds.values())
        lines.append(f"  PyTorch  {sum(verdict.operations.values())} operations, {times} us: {names}")
    return "\n".join(lines)


def _kernel_text(count: int, row: KernelRow) -> str:
    times = f"{count} x {row.kernel}" if count > 1 else row.kernel
    if row.error:
        return f"{times}: does not compile: {row.error}"
    parts = [
        f"{times} grid {row.grid}, {row.warps} warps", f"{row.registers} registers", f"{row.shared} B shared",
        f"{row.programs * row.warps} warps/SM", f"{row.in_flight / 1024:.0f} KB in flight",
        f"{row.instructions:.3g} instructions/element", f"loads {row.loads} stores {row.stores}",
        f"{row.megabytes:.0f} MB",
    ]  # fmt: skip
    if row.spilled:
        parts.append(f"SPILLS {row.spilled} B")
    if row.fp64 >= 0.01:
        parts.append(f"fp64 {row.fp64:.2f}/element")
    if row.seconds:
        parts.append(" ".join(f"{seconds * 1e6:.0f}" for seconds in row.seconds.values()) + f" us ({row.bound})")
    if row.unknown or row.truncated:
        parts.append(f"{row.unknown} branches unknown" + ", walked in part" * row.truncated)
    return ", ".join(parts)


_HEAD = (
    "| call | launches, forward + backward | eager's | heaviest kernel: instructions/element | registers |"
    " warps an SM | KB in flight an SM | bound by | predicted share, H100 | H200 |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)
START, END = "<!-- table of bench.static -->", "<!-- end of the table -->"


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """A table for the documentation: a line for each call that has predictions, from the lines of the CSV file."""
    table = [_HEAD]
    by_call: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if line["target"] == "sm_90":
            by_call.setdefault(line["case"], []).append(line)
    for call, (whole, *parts) in by_call.items():
        kernels = [part for part in parts if part["kernel"] != OPERATIONS]
        if not whole.get("h100_us") or not kernels:
            continue
        heaviest = max(kernels, key=_whole_time)
        operations = sum(float(part["h100_us"] or 0) for part in parts if part["kernel"] == OPERATIONS)
        bound = heaviest["bound"] if _whole_time(heaviest) >= operations else "PyTorch's operations"
        eager = f"{whole['eager_forward']} + {whole['eager_backward']}" if whole["eager_forward"] != "" else ""
        issued = int(heaviest["count"]) * float(heaviest["instructions_per_element"])
        table.append(
            f"| {call} | {whole['launches_forward']} + {whole['launches_backward']} | {eager} | {heaviest['kernel']}:"
            f" {issued:.3g} | {heaviest['registers']} | {heaviest['warps_per_sm']} | {heaviest['kb_in_flight']} |"
            f" {bound} | {_percent(whole['h100_share'])} | {_percent(whole['h200_share'])} |"
        )
    return "\n".join(table)


def _whole_time(line: dict[str, Any]) -> float:
    return int(line["count"]) * float(line["h100_us"] or 0)


def _percent(share: Any) -> str:
    return f"{100 * float(share):.0f}%"


def read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def replace_table(path: Path, table: str) -> None:
    """Puts the table between its two marks in a file.

    Raises:
        ValueError: the file hasn't these marks.
    """
    text = path.read_text()
    before, found, rest = text.partition(START)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"{path} must hold {START} and {END}; got neither or one")
    path.write_text(f"{before}{START}\n{table}\n{END}{after}")
