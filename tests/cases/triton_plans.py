"""Launches kernels of the Triton backend through the JIT and through plans, over a stand-in driver, and compares them.

Prints a JSON object: the kernels, how many launches went through plans, and in which the driver got something else.
"""

import ctypes
import json
from typing import Any

import torch
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from triton.runtime import driver

from fusedloss.backends.triton import class_stats, launch, plans, softmax_ce
from fusedloss.core.operands import LogitInputs, RowInputs, SoftmaxMask
from fusedloss.core.row_loss import RowOptions

library = ctypes.CDLL("libcuda.so.1")
launches, count = ctypes.c_long.in_dll(library, "launches"), ctypes.c_int.in_dll(library, "count")
noted = (ctypes.c_uint64 * 132).in_dll(library, "noted")


class Driver(CudaDriver):
    """Triton's own, without what it asks of torch."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
        self.get_device_capability = lambda device: (9, 0)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


def flat(types: Any) -> list[str]:
    """The types of a kernel's parameters, without its constants."""
    if isinstance(types, tuple):
        return [each for one in types for each in flat(one)]
    return [] if types == "constexpr" else [types]


def noted_by(call: Any, parameters: list[str]) -> list[int]:
    """What the driver got: parameters in as many bits as they have."""
    before, count.value = launches.value, len(parameters)
    call()
    # Another kernel may have fewer.
    count.value = 0
    assert launches.value == before + 1
    bits = [
        value & 0xFFFFFFFF if kind in ("i32", "u32", "fp32") else value & 1 if kind in ("i1", "u1") else value
        for value, kind in zip(noted[4:], parameters, strict=False)
    ]
    return [*noted[:4], *bits]


def calls() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for rows, classes in ((6, 1000), (1, 999), (16, 16)):
            logits, target = torch.randn(rows, classes, dtype=dtype), torch.randint(classes, (rows,))
            for scale in (None, torch.rand(classes) + 0.5):
                inputs = LogitInputs(logits, target, scale)
                options = RowOptions(focal_gamma=2.0) if classes == 999 else RowOptions()
                softmax_ce.softmax_ce(inputs, RowInputs(), options, True, SoftmaxMask(True, scale is not None))
    softmax_ce.scale_in_place(torch.randn(6, 10), torch.ones(()))
    labels = torch.randint(5, (9,))
    class_stats.class_stats(
        torch.randn(9, 20), labels, torch.zeros(5, 20), torch.ones(5, dtype=torch.int64), -100, True
    )


def main() -> None:
    driver.set_active(Driver())
    recorded: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    start = launch.start

    def recording(*arguments: Any, **keywords: Any) -> None:
        # An empty grid launches nothing.
        if 0 not in arguments[1]:
            recorded.append((arguments, keywords))
        start(*arguments, **keywords)

    launch.start = recording
    calls()
    launch.start = start
    different, through_plans = [], 0
    launched = plans.launched

    def counted(*arguments: Any) -> bool:
        nonlocal through_plans
        answer = launched(*arguments)
        through_plans += answer
        return answer

    plans.launched = counted
    for arguments, constants in recorded:
        kernel, grid, operands, _, warps, *stages = arguments
        options = launch.compile_options(warps, *(stages or [1]), constants)
        compiled = kernel[tuple(grid)](*operands, **options)
        parameters = flat(tuple(compiled.src.signature.values()))
        by_jit = noted_by(lambda k=kernel, g=grid, a=operands, o=options: k[tuple(g)](*a, **o), parameters)
        for _ in range(3):
            by_start = noted_by(lambda a=arguments, c=constants: start(*a, **c), parameters)
            if by_start != by_jit:
                different.append(f"{kernel.__name__}: {by_start} for {by_jit}")
    names = sorted({arguments[0].__name__ for arguments, _ in recorded})
    print(
        json.dumps(
            {"kernels": names, "launches": len(recorded), "through_plans": through_plans, "different": different}
        )
    )


if __name__ == "__main__":
    main()
