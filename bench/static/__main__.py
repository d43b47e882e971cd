"""Judges what calls launch on a GPU from the machine code of their kernels: see the package's docstring.

    python -m bench.static                              # every case for sm_90; writes bench/results/static.csv
    python -m bench.static supcon --match 8192          # those of one stem whose name holds this
    python -m bench.static --quick                      # a few; writes nothing
    python -m bench.static --quick --check              # 1 where a budget of bench/static/budgets.json is exceeded
    python -m bench.static --write-budgets              # today's figures and 5% as budgets of the cases that are run
    python -m bench.static --docs                       # only writes the table in docs/performance.md from that file
    python -m bench.static --target sm_100 --target gfx942 --csv build/others.csv

Needs Triton and no GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.static import budgets, cases, report
from bench.static.judge import verdicts
from bench.static.model import PROCESSORS

RESULTS = Path(__file__).parents[1] / "results" / "static.csv"
DOCS = Path(__file__).parents[2] / "docs" / "performance.md"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.static", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stems", nargs="*", choices=[*cases.STEMS, []], metavar="stem", help=", ".join(cases.STEMS))
    parser.add_argument("--match", default="", help="only cases whose name holds this text, or a part of A|B|C")
    parser.add_argument("--target", action="append", choices=list(PROCESSORS), help="default: sm_90")
    parser.add_argument("--quick", action="store_true", help="a few cases, in under a minute")
    parser.add_argument(
        "--csv", type=Path, help="file to write (default: bench/results/static.csv if nothing is left out)"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table of the documentation too")
    parser.add_argument(
        "--docs", action="store_true", help="write the table of docs/performance.md from the CSV file, and end"
    )
    parser.add_argument("--check", action="store_true", help="compare with the budgets")
    parser.add_argument("--write-budgets", action="store_true", help="make today's figures and 5%% the budgets")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="cases at a time")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the verdicts and writes the file; 1 where a kernel spills or a budget is exceeded."""
    options = _options(arguments)
    if options.docs:
        lines = [line for line in report.read_csv(options.csv or RESULTS) if line["case"] in cases.documented()]
        report.replace_table(DOCS, report.markdown(lines))
        print(f"written: {DOCS}")
        return 0
    chosen = cases.every(options.stems, options.match, options.quick)
    if not chosen:
        print(f"--match: no case's name holds {options.match!r}", file=sys.stderr)
        return 2
    found = []
    for verdict in verdicts(chosen, options.target or ("sm_90",), options.processes):
        print(report.text(verdict), flush=True)
        found.append(verdict)
    if options.markdown:
        print(report.markdown(report.rows(found)))
    whole = not (options.stems or options.match or options.quick or options.target)
    path = options.csv or (RESULTS if whole else None)
    if path is not None:
        report.write_csv(path, report.rows(found))
        print(f"written: {path}")
    if options.write_budgets:
        budgets.write(found)
        print(f"written: {budgets.PATH}")
    over = [line for verdict in found for line in budgets.exceeded(verdict, budgets.read())] if options.check else []
    print("".join(f"over budget: {line}\n" for line in over), end="", file=sys.stderr)
    spilled = sum(row.spilled > 0 for verdict in found for _, row in verdict.kernels)
    print(f"{len(found)} calls, {spilled} kernels with spills")
    return 1 if spilled or over else 0


if __name__ == "__main__":
    sys.exit(main())
