"""Compiles the candidates of ``bench.tune`` in several processes at once, into the cache that Triton keeps on disk."""

from __future__ import annotations

import hashlib
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from bench.variants import ShapeClass, shape_classes

# By shape class and entry: what the launches of a call were compiled to, None where they weren't or don't fit.
Fingerprints = dict[tuple[str, tuple[int, ...]], str | None]
_AT_A_TIME = 4  # entries of a job: preparing the tensors takes a moment


class Job(NamedTuple):
    """Entries of one shape class."""

    stem: str
    kind: str
    name: str
    entries: tuple[tuple[int, ...], ...]
    device: str
    small: bool


def precompiled(
    stem: str, kind: str, classes: Iterable[ShapeClass], device: torch.device, small: bool, processes: int,
    limit: float | None = None,
) -> Fingerprints:  # fmt: skip
    """What the candidates of these shape classes and the table's entries compile to, of all that are done in time."""
    from fusedloss.backends.triton import tuning

    jobs = []
    for each in classes:
        present = tuple(tuning.entry(device, stem, getattr(torch, kind), each.name))
        entries = list(dict.fromkeys([present, *each.candidates]))
        for start in range(0, len(entries), _AT_A_TIME):
            some = tuple(entries[start : start + _AT_A_TIME])
            jobs.append(Job(stem, kind, each.name, some, str(device), small))
    found: Fingerprints = {}
    pool = ProcessPoolExecutor(min(processes, len(jobs)), multiprocessing.get_context("spawn"))
    futures = [pool.submit(compile_job, job) for job in jobs]
    try:
        done, late = wait(futures, limit)
        for future in done:
            if future.exception() is None:
                found |= future.result()
            else:
                print(f"  a process that compiled ended: {future.exception()}", file=sys.stderr)
        if late:
            print(f"{len(late)} of {len(jobs)} jobs were not compiled in {limit:.0f} s", file=sys.stderr)
            for process in list(pool._processes.values()):
                process.terminate()
    finally:
        pool.shutdown(wait=not late, cancel_futures=True)
    return found


def compile_job(job: Job) -> Fingerprints:
    """Makes each call of a job with launches that only compile."""
    from bench.tune import table_of

    device, dtype = torch.device(job.device), getattr(torch, job.kind)
    shape_class = next(each for each in shape_classes(job.stem, dtype, job.small) if each.name == job.name)
    table = table_of(device, job.stem, job.kind)
    found: Fingerprints = {}
    with compiling_launches(device) as launches:
        call = shape_class.prepare(device)
        for entry in job.entries:
            table[job.name] = list(entry)
            launches.clear()
            try:
                call()
            except Exception as error:
                print(f"  {job.stem} {job.kind} {job.name} {entry}: {type(error).__name__}", file=sys.stderr)
                found[job.name, entry] = None
            else:
                fits = all(shared <= most_shared(device) for shared, _ in launches)
                # The interpreter has no code to compare.
                found[job.name, entry] = ("".join(digest for _, digest in launches) or str(entry)) if fits else None
    return found


@contextmanager
def compiling_launches(device: torch.device) -> Iterator[list[tuple[int, str]]]:
    """Inside the block a launch compiles its kernel, and its shared memory and a hash of its code join the list.

    What the kernels would have written stays as it was allocated. In Triton's interpreter they run.
    """
    from fusedloss.backends.triton import launch

    found: list[tuple[int, str]] = []
    start: Callable[..., None] = launch.start

    def compile_only(
        kernel: Any, grid: Any, arguments: Any, device: Any, warps: int, stages: int = 1, **constants: Any
    ) -> None:
        if not hasattr(kernel, "device_caches"):
            return start(kernel, grid, arguments, device, warps, stages, **constants)
        options = launch.compile_options(warps, stages, constants)
        compiled = kernel.warmup(*arguments, grid=(1,), **options)
        code = next(code for kind, code in compiled.asm.items() if kind in ("cubin", "hsaco"))
        digest = hashlib.sha256(code + repr((kernel.__name__, tuple(grid), warps)).encode()).hexdigest()
        found.append((compiled.metadata.shared, digest))
        return None

    launch.start = compile_only
    try:
        yield found
    finally:
        launch.start = start


def most_shared(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return sys.maxsize
    properties = torch.cuda.get_device_properties(device)
    found: int = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return found
