"""Registers, shared memory and spills of every Triton kernel, compiled ahead of time: no GPU is needed.

The functions of the backend are called as ``bench.variants`` says; each launch is compiled for a target instead of
run, with the same tiles and the same specialisation. Exits with 1 if any variant spills.

    python -m bench.resources                          # every variant for sm_80, sm_90 and sm_100
    python -m bench.resources supcon --target 90       # those of one stem for one of these
    python -m bench.resources --quick                  # the largest ones for sm_90
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from bench.variants import Variant, every, stems

TARGETS = (80, 90, 100)


class Usage(NamedTuple):
    """What one compiled kernel takes: bytes of shared memory per program, of stack and local per thread."""

    kernel: str
    variant: str
    target: int
    registers: int
    shared: int
    stack: int
    local: int

    @property
    def spills(self) -> bool:
        return self.stack > 0 or self.local > 0


class _Driver:
    """Stands in for a GPU's driver where kernels are only compiled."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[tuple[str, Any]]]:
    """Inside the block launches are compiled for `capability`, and (name, kernel) is appended to the list.

    Triton goes on taking the process for one with that GPU afterwards: compile in a process of its own.
    """
    from triton.runtime import driver

    from fusedloss.backends.triton import launch

    found: list[tuple[str, Any]] = []

    def compile_only(
        kernel: Any, grid: Any, arguments: Any, device: Any, warps: int, stages: int = 1, **constants: Any
    ) -> None:
        compiled = kernel.warmup(*arguments, grid=(1,), **{**launch.options(warps, stages), **constants})
        found.append((kernel.__name__, compiled))

    start, launch.start = launch.start, compile_only
    driver.set_active(_Driver(capability))
    try:
        yield found
    finally:
        launch.start = start


def usage_of(name: str, variant: str, target: int, compiled: Any) -> Usage:
    """Reads a compiled kernel's resources with the cuobjdump that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    shared = max(numbers["SHARED"], compiled.metadata.shared)
    return Usage(name, variant, target, numbers["REG"], shared, numbers["STACK"], numbers["LOCAL"])


def resources(job: tuple[Variant, int]) -> list[Usage]:
    """Compiles one variant for one target; one entry for each kernel it launches."""
    variant, target = job
    with compiling(target) as found:
        variant()
    return [usage_of(kernel, variant.name, target, compiled) for kernel, compiled in found]


def table(usages: list[Usage]) -> str:
    """One line for each kernel, variant and target."""
    head = ("kernel", "variant", "target", "registers", "shared", "stack", "local")
    lines = [head, *((u.kernel, u.variant, f"sm_{u.target}", *map(str, u[3:])) for u in usages)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 if a variant spills."""
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__.split("\n")[0])
    parser.add_argument("stems", nargs="*", choices=[*stems(), []], metavar="stem", help=", ".join(stems()))
    parser.add_argument("--match", default="", help="variants whose name holds this")
    parser.add_argument("--target", type=int, choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--quick", action="store_true", help="one variant of each kernel, for sm_90 only")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="compilations at a time")
    chosen = parser.parse_args(arguments)
    targets = (90,) if chosen.quick else chosen.target or TARGETS
    variants = [variant for variant in every(chosen.quick, chosen.stems) if chosen.match in variant.name]
    jobs = [(variant, target) for target in targets for variant in variants]
    with ProcessPoolExecutor(chosen.processes, multiprocessing.get_context("spawn")) as pool:
        # The same kernel of several variants is listed once.
        usages = list({usage: None for found in pool.map(resources, jobs) for usage in found})
    print(table(usages))
    spilled = [usage for usage in usages if usage.spills]
    print(f"{len(usages)} kernels, {len(spilled)} with spills")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
