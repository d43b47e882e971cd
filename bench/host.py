"""Host time of a forward and backward on the Triton path against eager PyTorch, without a GPU.

    python -m bench.host                     # every case
    python -m bench.host --match supcon      # those whose name holds this
    python -m bench.host --seconds 1 --csv build/host.csv

A child process loads ``bench/stand_in/libcuda.c`` in the place of NVIDIA's driver and lets the Triton backend serve
tensors on the CPU: Triton compiles its kernels and goes through its whole launch, the stand-in counts it, and nothing
runs. Ours and eager's code take turns in one process on the same few rows; a ratio is the median over the rounds of the
ratio within a round.

What it shows: the time of our Python, of autograd, of Triton's launcher and of PyTorch's operations, as many as there
are; so whether a small step that is not captured in a CUDA graph waits for the host longer than eager's does.

What it doesn't: the driver's own time for a launch, some 2 us each on both sides, and torch.cuda's for finding device
and stream. Eager's operations run for real here, as ours do: on some rows of a few classes that is little more than
what the dispatcher takes, but not nothing. Paths that ask whether a tensor is on a GPU take the CPU's side, except that
values are not looked at and a backward scales on the device: results of kernels are whatever was in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss
from bench import timing
from bench.static.gpu import patched_everywhere, starts_a_kernel, without_dispatcher

SOURCE = Path(__file__).with_name("stand_in") / "libcuda.c"
_ROWS, _CLASSES, _WIDTH = 8, 16, 64
_SCALE, _MARGIN, _TEMPERATURE = 64.0, 0.5, 0.1
_WARM = 20  # calls before a round is timed
_LIBRARY = "libcuda.so.1"
COLUMNS = ("case", "fused_us", "eager_us", "ratio", "triton_launches", "operations", "eager_operations", "rounds")


class Contest(NamedTuple):
    """Ours and eager's call; each makes its gradients too."""

    fused: Callable[[], Any]
    eager: Callable[[], Any]


def _both(fused: Callable[[], Tensor], eager: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Contest:
    return Contest(lambda: torch.autograd.grad(fused(), leaves), lambda: torch.autograd.grad(eager(), leaves))


def cross_entropy(temperatures: bool) -> Contest:
    x, y = torch.randn(_ROWS, _CLASSES).requires_grad_(), torch.arange(_ROWS) % _CLASSES
    if not temperatures:
        return _both(lambda: fusedloss.cross_entropy(x, y), lambda: F.cross_entropy(x, y), [x])
    tau = torch.rand(_CLASSES) + 0.5
    terms = [fusedloss.ClassTemperature(tau)]
    return _both(lambda: fusedloss.cross_entropy(x, y, terms=terms), lambda: F.cross_entropy(x / tau, y), [x])


def linear(arcface: bool) -> Contest:
    x = torch.randn(_ROWS, _WIDTH).bfloat16().requires_grad_()
    w = torch.randn(_CLASSES, _WIDTH).bfloat16().requires_grad_()
    y = torch.arange(_ROWS) % _CLASSES
    if not arcface:
        return _both(
            lambda: fusedloss.linear_cross_entropy(x, w, y), lambda: F.cross_entropy(F.linear(x, w), y), [x, w]
        )
    terms = [fusedloss.AngularMargin(_MARGIN), fusedloss.Scale(_SCALE)]

    def eager() -> Tensor:
        cosine = F.linear(F.normalize(x, dim=1), F.normalize(w, dim=1))
        angle = torch.acos(cosine.clamp(-1, 1)) + _MARGIN * F.one_hot(y, _CLASSES)
        return F.cross_entropy(_SCALE * torch.cos(angle), y)

    return _both(lambda: fusedloss.linear_cross_entropy(x, w, y, normalize=True, terms=terms), eager, [x, w])


def supcon() -> Contest:
    x, y = torch.randn(_ROWS, _WIDTH).requires_grad_(), torch.arange(_ROWS) % 2

    def eager() -> Tensor:
        unit = F.normalize(x, dim=1)
        similarity = unit @ unit.t() / _TEMPERATURE
        logits = similarity - similarity.max(1, keepdim=True).values.detach()
        others = 1 - torch.eye(_ROWS)
        positive = torch.eq(y.unsqueeze(1), y).float() * others
        log_p = logits - (logits.exp() * others).sum(1, keepdim=True).log()
        count = positive.sum(1)
        return -((positive * log_p).sum(1) / count.clamp(min=1)).sum() / (count > 0).sum()

    return _both(lambda: fusedloss.supcon(x, y, temperature=_TEMPERATURE), eager, [x])


def class_statistics() -> Contest:
    statistics = fusedloss.ClassStatistics(_WIDTH, _CLASSES)
    x, y = torch.randn(_ROWS, _WIDTH), torch.arange(_ROWS) % _CLASSES
    mean, scatter, seen = torch.zeros(_CLASSES, _WIDTH), torch.zeros(_CLASSES), torch.zeros(_CLASSES)

    def fused() -> None:
        statistics.update(x, y)

    def eager() -> None:
        # The running means and scatters of the classes: two passes over the batch, merged by Chan's formula.
        count = torch.bincount(y, minlength=_CLASSES).float()
        rows = count.clamp(min=1)
        of_batch = torch.zeros_like(mean).index_add_(0, y, x) / rows.unsqueeze(1)
        distance = (x - of_batch[y]).square().sum(1)
        spread = torch.zeros_like(scatter).index_add_(0, y, distance) / rows
        share = count / (seen + count).clamp(min=1)
        moved = of_batch - mean
        scatter.mul_(1 - share).add_(share * spread + share * (1 - share) * moved.square().sum(1))
        mean.add_(share.unsqueeze(1) * moved)
        seen.add_(count)

    return Contest(fused, eager)


CASES: dict[str, Callable[[], Contest]] = {
    "cross_entropy plain": lambda: cross_entropy(False),
    "cross_entropy class temperatures": lambda: cross_entropy(True),
    "linear_cross_entropy": lambda: linear(False),
    "linear_cross_entropy ArcFace": lambda: linear(True),
    "supcon": supcon,
    "class_statistics": class_statistics,
}


class _Counter(TorchDispatchMode):
    """Counts the operations that would each start a kernel on a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fusedloss":
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        self.count += starts_a_kernel(func)
        return func(*args, **(kwargs or {}))


def _operations(call: Callable[[], Any]) -> int:
    with contextlib.ExitStack() as stack:
        for patch in without_dispatcher():
            stack.enter_context(patch)
        counter = stack.enter_context(_Counter())  # type: ignore[no-untyped-call]
        call()
    return int(counter.count)


@contextlib.contextmanager
def _served_by_triton() -> Iterator[None]:
    """Inside the block the Triton backend takes tensors on the CPU, on the driver that stands in."""
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime import driver

    active = CudaDriver.__new__(CudaDriver)
    active.utils = CudaUtils()
    active.launcher_cls = CudaLauncher
    active.get_device_capability = lambda device: (9, 0)
    active.get_current_device = lambda: 0
    active.get_current_stream = lambda device: 0
    driver.set_active(active)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(fusedloss.backends._reasons, {("triton", "cpu"): None}))
        scaling = patched_everywhere("scale_in_place", _scale_in_place, "fusedloss.ops.")
        for patch in (*patched_everywhere("readable", _readable), *scaling):
            stack.enter_context(patch)
        stack.enter_context(fusedloss.backend("triton"))
        yield


def _scale_in_place(grads: list[Tensor], upstream: Tensor, written: float = 1.0) -> None:
    """A backward on a GPU launches the kernel that finds the upstream gradient to be 1; on the CPU the host looks."""
    scale = fusedloss.backends.kernel("softmax_ce", "scale_in_place", "cpu")
    for grad in grads:
        scale(grad, upstream)


def _readable(value: object) -> bool:
    """What is asked of a tensor on a GPU before its values would be looked at, and the answer there."""
    if not isinstance(value, Tensor) or torch.compiler.is_compiling():
        return False
    return type(value) in (Tensor, torch.nn.Parameter) and value.device.type != "cpu"


def measure(names: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """Times the cases in this process, which has loaded the stand-in; one line of COLUMNS each."""
    launches = ctypes.c_long.in_dll(ctypes.CDLL(_LIBRARY), "launches")
    torch.set_num_threads(1)
    found = []
    with _served_by_triton():
        for name in names:
            contest = CASES[name]()
            calls = {"fused": contest.fused, "eager": contest.eager}
            for call in list(calls.values()) * _WARM:
                call()
            before = launches.value
            contest.fused()
            launched = launches.value - before
            times = timing.in_turn(calls, lambda _: None, seconds)
            found.append({
                "case": name,
                "fused_us": round(timing.summary(times["fused"]).median * 1e6, 1),
                "eager_us": round(timing.summary(times["eager"]).median * 1e6, 1),
                "ratio": round(timing.ratio(times, "fused", "eager"), 2),
                "triton_launches": launched,
                "operations": _operations(contest.fused),
                "eager_operations": _operations(contest.eager),
                "rounds": len(times["fused"]),
            })  # fmt: skip
    return found


def build(folder: Path) -> None:
    """Compiles the stand-in into a folder.

    Raises:
        RuntimeError: there is no C compiler, or it fails.
    """
    candidates = (os.environ.get("CC"), (sysconfig.get_config_var("CC") or "").split(" ")[0], "cc", "gcc", "clang")
    compiler = next((found for each in candidates if each and (found := shutil.which(each))), None)
    if compiler is None:
        raise RuntimeError("CC must name a C compiler; found neither that nor cc, gcc or clang")
    command = [compiler, "-shared", "-fPIC", "-O2", "-w", str(SOURCE), "-o", str(folder / _LIBRARY)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ended.stderr}")
    (folder / "libcuda.so").symlink_to(_LIBRARY)


def in_child(names: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """Measures in a process of its own that takes the stand-in for the driver.

    Raises:
        RuntimeError: the process fails; the message is its error output.
    """
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        environment = dict(os.environ, TRITON_LIBCUDA_PATH=folder, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("LD_LIBRARY_PATH"))))
        environment["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).parents[1]), *filter(None, sys.path)))
        script = "import json, sys; from bench import host; print(json.dumps(host.measure(*json.loads(sys.argv[1]))))"
        # torch finds a driver that it can't use.
        quiet = "ignore:CUDA initialization"
        command = [sys.executable, "-W", quiet, "-c", script, json.dumps([list(names), seconds])]
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ended.returncode:
        raise RuntimeError(ended.stderr)
    measured: list[dict[str, Any]] = json.loads(ended.stdout.splitlines()[-1])
    return measured


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The lines for a terminal."""
    cells = [COLUMNS, *(tuple(str(line[column]) for column in COLUMNS) for line in lines)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, and writes it where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--match", default="", help="only cases whose name holds this text, or a part of A|B|C")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each case (default: %(default)s)")
    parser.add_argument("--csv", type=Path, help="file to write")
    options = parser.parse_args(arguments)
    names = [name for name in CASES if any(part in name for part in options.match.split("|"))]
    if not names:
        parser.error(f"--match: no case's name holds {options.match!r}; names are such as {next(iter(CASES))!r}")
    lines = in_child(names, options.seconds)
    print(table(lines))
    if options.csv is not None:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
        print(f"written: {options.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
