"""Registers, shared memory and spills of every Triton kernel, compiled ahead of time: no GPU is needed.

The functions of the backend are called as users call them; each launch is compiled for a target instead of
run, with the same tiles and the same specialisation. Exits with 1 if any variant spills.

    python -m bench.resources            # every variant for sm_80, sm_90 and sm_100
    python -m bench.resources --quick    # the largest ones for sm_90
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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

TARGETS = (80, 90, 100)
_ROWS = 64
_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}


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

    def compile_only(kernel: Any, grid: Any, arguments: Any, device: Any, warps: int, **constants: Any) -> None:
        compiled = kernel.warmup(*arguments, grid=(1,), **launch.options(warps), **constants)
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


def _logits(dtype: torch.dtype, num_classes: int, layout: str) -> torch.Tensor:
    if layout == "rows":
        return torch.empty(_ROWS, num_classes, dtype=dtype)
    if layout == "transposed":
        return torch.empty(num_classes, _ROWS, dtype=dtype).t()
    return torch.empty(2, num_classes, _ROWS, dtype=dtype)


class _Inputs:
    """Tensors of a variant; only their shapes, types and strides matter."""

    def __init__(self, dtype: str, num_classes: int, target: str = "labels", terms: bool = True, layout: str = "rows"):
        self.logits = _logits(_DTYPES[dtype], num_classes, layout)
        self.compute = torch.float64 if dtype == "f64" else torch.float32
        rows = self.logits.shape[:1] + self.logits.shape[2:]
        labels = torch.zeros(rows, dtype=torch.int64)
        self.target = labels if target == "labels" else torch.empty_like(self.logits)
        self.row = torch.empty(rows, dtype=self.compute)
        self.classes: Any = tuple(torch.empty(num_classes, dtype=self.compute) if terms else None for _ in range(3))


def _softmax_ce(
    dtype: str, num_classes: int, *, target: str = "labels", terms: bool = True, options: bool = True,
    columns: bool = True, layout: str = "rows",
) -> None:  # fmt: skip
    from fusedloss.backends.triton.softmax_ce import softmax_ce

    made = _Inputs(dtype, num_classes, target, terms, layout)
    per_row = made.row if options else None
    gamma = 2.0 if options and target == "labels" else 0.0
    softmax_ce(made.logits, made.target, *made.classes, per_row, per_row, 0.0, gamma, 0.0, -100, not options,
               [True, columns, options])  # fmt: skip


def _softmax_stats(dtype: str, num_classes: int, *, target: str = "labels") -> None:
    from fusedloss.backends.triton.softmax_ce import softmax_stats

    made = _Inputs(dtype, num_classes, target)
    softmax_stats(made.logits, made.target, *made.classes, -100, True, True)


def _softmax_sweep(dtype: str, num_classes: int, *, target: str = "labels", columns: bool = True) -> None:
    from fusedloss.backends.triton.softmax_ce import softmax_sweep

    made = _Inputs(dtype, num_classes, target)
    softmax_sweep(made.logits, made.target, *made.classes, *(made.row,) * 3, -100, *(made.row,) * 5, [True, columns])


def _class_stats(dtype: str, width: int, *, per_feature: bool) -> None:
    from fusedloss.backends.triton.class_stats import class_stats

    compute = torch.float64 if dtype == "f64" else torch.float32
    labels, classes = torch.zeros(_ROWS, dtype=torch.int64), 10
    features = torch.empty(_ROWS, width, dtype=_DTYPES[dtype])
    class_stats(features, labels, torch.empty(classes, width, dtype=compute), labels[:classes], -100, per_feature)


def _scale_in_place(dtype: str) -> None:
    from fusedloss.backends.triton.softmax_ce import scale_in_place

    compute = torch.float64 if dtype == "f64" else torch.float32
    scale_in_place(torch.empty(_ROWS, 10, dtype=_DTYPES[dtype]), torch.empty((), dtype=compute))


Variant = tuple[str, Callable[..., None], tuple[Any, ...], dict[str, Any]]
# One number of classes for each kind of tile, and odd ones, whose loads can't be wide.
_CLASSES = (10, 100, 1000, 4000, 8000, 100000)
_ODD_CLASSES = (101, 2047, 4095, 8191)


def variants(quick: bool) -> list[Variant]:
    """Every variant, named; `quick` keeps one of each kernel, with all its options."""
    found: list[Variant] = []

    def add(function: Callable[..., None], *arguments: Any, **keywords: Any) -> None:
        words = [function.__name__.strip("_"), *map(str, arguments)]
        words += [
            key if value is True else f"no {key}" if value is False else str(value) for key, value in keywords.items()
        ]
        found.append((" ".join(words), function, arguments, keywords))

    if quick:
        for target in ("labels", "probabilities"):
            add(_softmax_ce, "bf16", 1000, target=target)
            add(_softmax_stats, "f32", 1000, target=target)
            add(_softmax_sweep, "f32", 100000, target=target)
        add(_softmax_ce, "f32", 8000, columns=False)
        add(_softmax_ce, "f32", 100000, columns=False)
        add(_softmax_ce, "f64", 2047)
        add(_class_stats, "bf16", 1024, per_feature=True)
        add(_class_stats, "f32", 1024, per_feature=False)
        add(_scale_in_place, "bf16")
        return found
    for dtype in _DTYPES:
        for classes in _CLASSES:
            add(_softmax_ce, dtype, classes)
            if dtype in ("f32", "bf16"):
                add(_softmax_ce, dtype, classes, terms=False, options=False, columns=False)
        for classes in (8000, 100000):
            add(_softmax_ce, dtype, classes, columns=False)
        for per_feature in (False, True):
            add(_class_stats, dtype, 1000, per_feature=per_feature)
        add(_scale_in_place, dtype)
    for dtype in ("f32", "bf16", "f64"):
        for target in ("labels", "probabilities"):
            for classes in (1000, 100000):
                add(_softmax_stats, dtype, classes, target=target)
                add(_softmax_sweep, dtype, classes, target=target)
        for classes in (1000, 4000, 8000, 100000):
            add(_softmax_ce, dtype, classes, target="probabilities")
        add(_softmax_ce, dtype, 8000, target="probabilities", columns=False)
    for dtype, most in (("f32", 8191), ("bf16", 8191), ("f64", 4095)):
        for classes in _ODD_CLASSES:
            if classes <= most:
                add(_softmax_ce, dtype, classes, columns=classes < most)
    for layout in ("transposed", "positions"):
        for classes in (20, 1000):
            add(_softmax_ce, "f32", classes, layout=layout)
    add(_class_stats, "f32", 64, per_feature=True)
    return found


def resources(job: tuple[Variant, int]) -> list[Usage]:
    """Compiles one variant for one target; one entry for each kernel it launches."""
    (name, function, arguments, keywords), target = job
    with compiling(target) as found:
        function(*arguments, **keywords)
    return [usage_of(kernel, name, target, compiled) for kernel, compiled in found]


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
    parser.add_argument("--quick", action="store_true", help="one variant of each kernel, for sm_90 only")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="compilations at a time")
    chosen = parser.parse_args(arguments)
    jobs = [(variant, target) for target in ((90,) if chosen.quick else TARGETS) for variant in variants(chosen.quick)]
    with ProcessPoolExecutor(chosen.processes, multiprocessing.get_context("spawn")) as pool:
        # The same kernel of several variants is listed once.
        usages = list({usage: None for found in pool.map(resources, jobs) for usage in found})
    print(table(usages))
    spilled = [usage for usage in usages if usage.spills]
    print(f"{len(usages)} kernels, {len(spilled)} with spills")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
