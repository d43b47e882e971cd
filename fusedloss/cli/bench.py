"""`fusedloss bench`: the benchmarks of a checkout, on this machine."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Annotated

import typer


def bench(
    operations: Annotated[list[str] | None, typer.Argument(help="Operations to time; all by default.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few small cases, in under a minute; writes nothing.")
    ] = False,
) -> None:
    """Time each loss against eager PyTorch and torch.compile, in turn on the same tensors, once values agree.

    The benchmarks are part of the repository, not of the installed package: run this in a checkout.

    Examples:

        fusedloss bench softmax_ce --quick

        fusedloss bench
    """
    if importlib.util.find_spec("bench") is None or importlib.util.find_spec("bench.report") is None:
        raise FileNotFoundError(
            "bench must be run in a checkout's folder, as `python -m fusedloss bench`: the benchmarks are part of the "
            "repository; got none here"
        )
    command = [sys.executable, "-m", "bench", *(operations or []), *(["--quick"] if quick else [])]
    finished = subprocess.run(command)
    if finished.returncode:
        raise typer.Exit(finished.returncode)
