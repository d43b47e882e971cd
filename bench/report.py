"""Tables, verdicts and CSV rows out of what was measured."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.cases import Case, reached

# Ratios are judged where freed memory stays with the process.
JUDGED = "retained"
COLUMNS = (
    "operation", "title", "case", "provider", "dtype", "shape", "upstream", "allocator",
    "median_ms", "p20_ms", "p80_ms", "least_ms", "rounds", "moved_mb", "gb_per_s", "share", "ratio",
    "peak_mb", "threads", "cpu", "simd", "torch", "fusedloss", "commit", "date",
)  # fmt: skip
Found = Mapping[str, Mapping[str, Any]]
_HEADINGS = {"share": "share", "fastest": "fastest", "overhead_us": "over eager"}
_UNITS = {"share": "", "overhead_us": " us"}
_NOT_RIVALS = ("fused", "copy", "read", "products", "baseline")
_LIMITS = {"products": "the speed of the three matrix products alone"}


def figures(speed: Found, peaks: Found) -> dict[str, float]:
    """Every figure of a case that a target can be set for; keys as in ``Case.targets``."""
    found: dict[str, float] = {}
    if speed:
        rivals = {name: values["ratio"] for name, values in speed.items() if name not in _NOT_RIVALS}
        found |= {"share": speed["fused"]["share"], **rivals}
        if rivals:
            found["fastest"] = min(rivals.values())
        if "eager" in speed:
            found["overhead_us"] = 1e3 * (speed["fused"]["median_ms"] - speed["eager"]["median_ms"])
    if "baseline" in peaks:
        found["peak"] = peaks["fused"]["peak_mb"] / peaks["baseline"]["peak_mb"]
    return found


def verdicts(cases: Iterable[Case], measured: Mapping[str, Any]) -> dict[tuple[str, str], bool]:
    """(case, figure) to whether its target is reached, for every target that was measured."""
    peaks = measured.get("returned", {}).get("cases", {})
    speeds = measured.get(JUDGED, {}).get("cases", {})
    found = {}
    for case in cases:
        values = figures(speeds.get(case.name, {}), peaks.get(case.name, {}))
        for figure, target in case.targets.items():
            if figure in values:
                found[case.name, figure] = reached(figure, values[figure], target)
    return found


def tables(cases: Iterable[Case], measured: Mapping[str, Any]) -> str:
    """One table for each title: the judged allocator with verdicts, the other beside it, peak memory."""
    titles: dict[str, list[Case]] = {}
    for case in cases:
        titles.setdefault(case.title, []).append(case)
    return "\n\n".join(_table(title, members, measured) for title, members in titles.items())


def _table(title: str, cases: list[Case], measured: Mapping[str, Any]) -> str:
    allocators = [name for name in (JUDGED, "default") if name in measured]
    peaks = measured.get("returned", {}).get("cases", {})
    head, body = ["case", "MB moved"], [[case.label, f"{case.moved / 1e6:.4g}"] for case in cases]
    for allocator in allocators:
        speeds = measured[allocator]["cases"]
        judged = allocator == JUDGED
        wanted = _wanted_figures(cases, speeds, judged)
        head += [f"{allocator}: ms", "GB/s", *(_HEADINGS.get(name, name) for name in wanted)]
        for case, line in zip(cases, body, strict=True):
            speed = speeds.get(case.name)
            if not speed:
                line += ["-"] * (2 + len(wanted))
                continue
            values = figures(speed, {})
            line += [f"{speed['fused']['median_ms']:.4g}", f"{speed['fused']['gb_per_s']:.3g}"]
            line += [_cell(case, name, values.get(name), judged) for name in wanted]
    for name in dict.fromkeys(name for case in cases for name in peaks.get(case.name, {})):
        head.append("peak MB: fused" if name == "fused" else name)
        for case, line in zip(cases, body, strict=True):
            line.append(_peak_cell(case, name, peaks.get(case.name, {})))
    limit = _LIMITS.get(cases[0].limit, f"the bandwidth of a {cases[0].limit} of the same buffer")
    legend = (
        f"{title}: fused ms and GB/s; share of {limit}; "
        "eager, compiled, ...: their time / fused; (target reached or not)"
    )
    return f"{legend}\n{_aligned([head, *body])}"


def _wanted_figures(cases: list[Case], speeds: Mapping[str, Found], judged: bool) -> list[str]:
    rivals = dict.fromkeys(name for case in cases for name in speeds.get(case.name, {}) if name not in _NOT_RIVALS)
    targeted = [name for name in ("fastest", "overhead_us") if any(name in case.targets for case in cases)]
    return ["share", *rivals, *(targeted if judged else [])]


def _cell(case: Case, figure: str, value: float | None, judged: bool) -> str:
    if value is None or (figure in ("fastest", "overhead_us") and figure not in case.targets):
        return "-"
    unit = _UNITS.get(figure, "x")
    text = f"{value:.3g}{unit}"
    if judged and figure in case.targets:
        target = case.targets[figure]
        text += f" ({target:g} {'reached' if reached(figure, value, target) else 'NOT reached'})"
    return text


def _peak_cell(case: Case, name: str, peaks: Found) -> str:
    if name not in peaks:
        return "-"
    text = f"{peaks[name]['peak_mb']:.4g}"
    if name == "fused" and "peak" in case.targets and "baseline" in peaks:
        within = reached("peak", figures({}, peaks)["peak"], case.targets["peak"])
        text += " (reached)" if within else " (NOT reached)"
    return text


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def rows(cases: Iterable[Case], measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each contestant of each case under each allocator."""
    peaks = measured.get("returned", {}).get("cases", {})
    found = []
    for allocator, result in measured.items():
        if allocator == "returned":
            continue
        for case in cases:
            speed = result["cases"].get(case.name, {})
            peak = peaks.get(case.name, {})
            for provider in dict.fromkeys([*speed, *(peak if speed or not case.timed else ())]):
                figures_of_it = {**speed.get(provider, {}), **peak.get(provider, {})}
                found.append(
                    {
                        "operation": case.operation,
                        "title": case.title,
                        "case": case.label,
                        "provider": provider,
                        "dtype": case.dtype_name,
                        "shape": "x".join(map(str, case.shape)),
                        "upstream": 1 / case.divisor,
                        "moved_mb": case.moved / 1e6,
                        **result["environment"],
                        **{key: f"{value:.6g}" for key, value in figures_of_it.items()},
                    }
                )
    return found


def write_csv(path: Path, lines: list[dict[str, Any]], keep_others: bool = False) -> None:
    """Writes the lines; with `keep_others` after those of the file's other cases, or else in place of the file."""
    if keep_others and path.exists():
        measured = {_case_of(line) for line in lines}
        with path.open(newline="") as file:
            lines = [line for line in csv.DictReader(file) if _case_of(line) not in measured] + lines
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def _case_of(line: dict[str, Any]) -> tuple[str, str, str]:
    return line["title"], line["case"], line["allocator"]
