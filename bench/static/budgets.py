"""What each case may take: a regression of a kernel or of its launches is seen without a GPU.

``budgets.json`` holds for each target and case the figures of ``measured``, each the most that is allowed.
``python -m bench.static --check`` compares, ``--write-budgets`` writes today's figures and 5% of slack.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from bench.static.judge import Verdict

PATH = Path(__file__).with_name("budgets.json")
_SLACK = 1.05
# Counts have no slack: one more is a change that somebody made.
_EXACT = ("launches_forward", "launches_backward", "spilled", "not_compiled")

Figures = dict[str, float]


def measured(verdict: Verdict) -> Figures:
    """Launches, and over all kernels of the call: instructions and float64 ones per element, most registers of a
    thread, bytes spilled, kernels that don't compile, predicted microseconds on an H100."""
    kernels = verdict.kernels
    found: Figures = {
        "launches_forward": verdict.launches[0],
        "launches_backward": verdict.launches[1],
        "registers": max((row.registers for _, row in kernels), default=0),
        "spilled": sum(row.spilled for _, row in kernels),
        "not_compiled": sum(bool(row.error) for _, row in kernels),
    }
    if verdict.counted:
        found["instructions"] = sum(count * row.instructions for count, row in kernels)
        found["fp64"] = sum(count * row.fp64 for count, row in kernels)
    if "H100" in verdict.seconds:
        found["h100_us"] = verdict.seconds["H100"] * 1e6
    return found


def read(path: Path = PATH) -> dict[str, dict[str, Figures]]:
    """Budgets by target and case; none where there is no file yet."""
    found: dict[str, dict[str, Figures]] = json.loads(path.read_text()) if path.exists() else {}
    return found


def exceeded(verdict: Verdict, budgets: dict[str, dict[str, Figures]]) -> list[str]:
    """The figures of a case that are over their budgets, in words; of a case without budgets none."""
    allowed = budgets.get(verdict.target, {}).get(verdict.case, {})
    found = measured(verdict)
    if "instructions" in allowed and not verdict.counted:
        return [f"{verdict.case} [{verdict.target}]: not walked to its end, budget {allowed['instructions']:.4g}"]
    return [
        f"{verdict.case} [{verdict.target}]: {name} {found[name]:.4g}, budget {most:.4g}"
        for name, most in allowed.items()
        if name in found and found[name] > most
    ]


def write(verdicts: Iterable[Verdict], path: Path = PATH) -> None:
    """Today's figures and the slack as the budgets of these cases; the others' stay."""
    budgets = read(path)
    for verdict in verdicts:
        budgets.setdefault(verdict.target, {})[verdict.case] = {
            name: value if name in _EXACT else _rounded_up(value * _SLACK) for name, value in measured(verdict).items()
        }
    path.write_text(json.dumps(budgets, indent=1) + "\n")


def _rounded_up(value: float) -> float:
    """Three digits, never less."""
    rounded = float(f"{value:.3g}")
    return rounded if rounded >= value else float(f"{value * 1.005:.3g}")
