"""Times fusedloss against eager PyTorch and torch.compile, in turn on the same tensors, once values agree.

    python -m bench softmax_ce class_stats            # everything; writes bench/results
    python -m bench softmax_ce --quick                # a few small cases; writes nothing
    python -m bench class_stats --allocator retained --out build/bench

Every setting of glibc's allocator needs a process of its own, which this one starts. "retained" keeps freed
memory in the process, as a training loop in its stride has it, and is what ratios are judged by; "default" is
the system's. Peak memory is what a step adds to its inputs, in a process that returns freed memory at once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench import measure, plot, report
from bench.cases import OPERATIONS, cases_of

RESULTS = Path(__file__).parent / "results"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("operations", nargs="*", metavar="operation", help=f"{', '.join(OPERATIONS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="a few small cases, in under a minute")
    parser.add_argument("--match", default="", help="only cases whose name holds this text, or a part of A|B|C")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's (%(default)s)")
    parser.add_argument(
        "--allocator", choices=("retained", "default", "both"), help="default: both, or retained with --quick"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the CSV files and the plot (default: bench/results, none with --quick)",
    )
    options = parser.parse_args()
    unknown = [name for name in options.operations if name not in OPERATIONS]
    if unknown:
        parser.error(f"operation: got {', '.join(unknown)}; allowed are {', '.join(OPERATIONS)}")
    if options.threads < 1:
        parser.error(f"--threads: got {options.threads}; at least 1 is needed")
    chosen = options.operations or OPERATIONS
    if not any(cases_of(operation, options.quick, options.match) for operation in chosen):
        names = [case.name for operation in chosen for case in cases_of(operation, options.quick)]
        parser.error(f"--match: no case's name holds {options.match!r}; names are such as {names[0]!r}")
    return options


def main() -> int:
    """Measures, prints the tables and writes the files; 1 if any values were wrong."""
    options = _options()
    operations = options.operations or list(OPERATIONS)
    allocator = options.allocator or ("retained" if options.quick else "both")
    settings = ("retained", "default") if allocator == "both" else (allocator,)
    measured = {
        setting: measure.run(operations, setting, options.threads, options.quick, options.match)
        for setting in (*settings, "returned")
    }
    cases = {operation: cases_of(operation, options.quick, options.match) for operation in operations}
    everything = [case for members in cases.values() for case in members]
    for setting in settings:
        limits = ", ".join(f"{name} {value:.4g}" for name, value in measured[setting]["limits"].items())
        print(f"\n{setting}: {', '.join(f'{k} {v}' for k, v in measured[setting]['environment'].items())}")
        print(f"{setting}: limits in GB/s and GFLOP/s: {limits}")
    print(f"\n{report.tables(everything, measured)}")
    verdicts = report.verdicts(everything, measured)
    if verdicts:
        print(f"\n{sum(verdicts.values())} of {len(verdicts)} targets reached")
    if options.out or not options.quick:
        folder = options.out or RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        for operation in operations:
            lines = report.rows(cases[operation], measured)
            report.write_csv(folder / f"{operation}.csv", lines, keep_others=bool(options.match))
        print(f"written: {folder}, {plot.draw(folder)}")
    wrong = [line for result in measured.values() for line in result["wrong"]]
    for line in wrong:
        print(f"values differ, no time shown: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
