"""Judges a case for a target: its launches, its kernels and the predicted time of the whole call."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.static import cases, gpu, model
from bench.static.cases import Case


@dataclass
class Verdict:
    """What was found of a case; `kernels` hold each launch that differs from the others, with how often it occurs."""

    case: str
    stem: str
    target: str
    launches: tuple[int, int] = (0, 0)  # forward, backward
    triton: tuple[int, int] = (0, 0)
    eager: tuple[int, int] | None = None
    syncs: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by GPU
    share: dict[str, float] = field(default_factory=dict)  # of the copy's bandwidth or the GEMM's rate
    operation_seconds: dict[str, float] = field(default_factory=dict)  # of PyTorch's operations
    operations: dict[str, int] = field(default_factory=dict)
    counted: bool = False  # whether every kernel was walked to its end
    kernels: list[tuple[int, KernelRow]] = field(default_factory=list)


@dataclass
class KernelRow:
    """One kernel of a call, in plain numbers; counts per element of the case, for one launch."""

    kernel: str
    phase: str
    grid: str
    warps: int
    registers: int
    shared: int
    spilled: int
    programs: int
    in_flight: float
    loads: str
    stores: str
    instructions: float
    fp64: float
    megabytes: float
    seconds: dict[str, float]
    bound: str
    unknown: int
    truncated: bool
    error: str


_MOST_SHARE = 1.02


def judge(case: Case, target: str) -> Verdict:
    """Runs the case on a GPU that isn't there and judges what it launched."""
    record = _recorded(case, target)
    forward, backward = record.counts()
    found = Verdict(case.name, case.stem, target, (forward, backward), syncs=record.syncs)
    triton = [isinstance(event, gpu.Launch) for event in record.events]
    found.triton = sum(triton[:forward]), sum(triton[forward:])
    eager = _recorded(case, target, eager=True) if target == "sm_90" else None
    found.eager = eager.counts() if eager is not None and eager.events else None
    rated = target == "sm_90"
    times = {each.name: 0.0 for each in model.GPUS}
    rows: dict[Any, tuple[int, KernelRow]] = {}
    for place, event in enumerate(record.events):
        if isinstance(event, gpu.Operation):
            found.operations[event.name] = found.operations.get(event.name, 0) + 1
            for each in model.GPUS:
                seconds = model.operation_seconds(event, each)
                times[each.name] += seconds
                found.operation_seconds[each.name] = found.operation_seconds.get(each.name, 0.0) + seconds
            continue
        phase = "forward" if place < forward else "backward"
        key = (phase, *_identity(event))
        if key not in rows:
            rows[key] = (0, _row(model.judge(event, target), case, phase, rated))
        count, row = rows[key]
        rows[key] = (count + 1, row)
        for name in times:
            times[name] += row.seconds.get(name, 0.0)
    found.kernels = list(rows.values())
    share = {each.name: _share(case, each, times[each.name]) for each in model.GPUS} if rated else {}
    # Faster than the memory or the products allow: a loop whose end isn't known was left too early.
    walked = not any(row.error or row.truncated for _, row in found.kernels)
    found.counted = walked and all(each <= _MOST_SHARE for each in share.values())
    if rated and found.counted:
        found.seconds, found.share = times, share
    return found


def _recorded(case: Case, target: str, eager: bool = False) -> gpu.Record:
    with gpu.recording(target, model.PROCESSORS[target]) as record:
        prepared = case.prepare()
        call = prepared.eager if eager else prepared.call
        record.events.clear()
        if call is None:
            return record
        loss = call()
        if prepared.leaves:
            record.backward_from = len(record.events)
            torch.autograd.grad(loss, prepared.leaves)
    return record


def _identity(launch: gpu.Launch) -> tuple[Any, ...]:
    """Launches of one identity do the same on tensors of the same shape."""
    arguments = tuple(
        (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value for _, value in launch.arguments
    )
    # A kernel that doesn't compile has no code to tell it by.
    return launch.kernel, launch.grid, id(launch.compiled), arguments


def _row(kernel: model.Kernel, case: Case, phase: str, rated: bool) -> KernelRow:
    launch = kernel.launch
    return KernelRow(
        kernel=launch.kernel,
        phase=phase,
        grid=" x ".join(map(str, launch.grid)).removesuffix(" x 1").removesuffix(" x 1"),
        warps=launch.warps,
        registers=kernel.registers,
        shared=kernel.shared,
        spilled=kernel.spilled,
        programs=kernel.programs,
        in_flight=kernel.in_flight,
        loads=kernel.loads,
        stores=kernel.stores,
        instructions=kernel.instructions / case.elements,
        fp64=kernel.hot_fp64 / case.elements,
        megabytes=(kernel.bytes + kernel.missed.get("H100", 0.0)) / 1e6,
        seconds={each.name: kernel.seconds(each) for each in model.GPUS} if rated and not launch.error else {},
        bound=kernel.bound(model.H100) if rated and not launch.error else "",
        unknown=kernel.unknown,
        truncated=kernel.truncated,
        error=launch.error,
    )


def _share(case: Case, on: model.Gpu, seconds: float) -> float:
    least = case.flops / on.products[case.dtype] if case.flops else case.bytes / on.copy
    return least / seconds


def _job(job: tuple[str, str]) -> Verdict:
    name, target = job
    (case,) = (each for each in cases.every() if each.name == name)
    return judge(case, target)


def verdicts(chosen: Sequence[Case], targets: Sequence[str], processes: int) -> Iterator[Verdict]:
    """Judges each case for each target, in order; in this process if there is to be one."""
    if processes == 1:
        for target in targets:
            yield from (judge(case, target) for case in chosen)
        return
    jobs = [(case.name, target) for target in targets for case in chosen]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_job, jobs)
