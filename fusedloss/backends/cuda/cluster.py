"""Softmax cross-entropy of long rows by clusters of blocks, which read the logits once (``cluster_ce.cu``).

Off by default: FUSEDLOSS_CLUSTER=1 turns it on, from compute capability 9.0 on. What it does not serve is None here,
and Triton's to do: other options than class weights, other gradients than the logits', rows that aren't contiguous or
hold other than ``FEWEST`` to ``MOST`` classes.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fusedloss.core.operands import LogitInputs, RowInputs, SoftmaxMask
from fusedloss.core.row_loss import RowOptions

from . import driver

SOURCE = Path(__file__).with_name("cluster_ce.cu")
ENABLED = os.environ.get("FUSEDLOSS_CLUSTER", "") not in ("", "0")
WARPS = 16
CLUSTERS = (2, 4, 8)  # larger ones are not portable
HEADER = 512  # bytes; the source's constant
SHARED_MEMORY = 232448  # bytes of a block
_BYTES_OF_THREAD = 128  # of float32 values in registers
_MOST_STAGES = 4
_LANE_BYTES = 16
_SLICE = 64  # a slice is a multiple of it
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FEWEST = 32001
MOST = CLUSTERS[-1] * WARPS * 32 * _BYTES_OF_THREAD // 4
_CAPABILITY = (9, 0)


class Plan(NamedTuple):
    """What the kernel is compiled for (the macros of the source, in lower case), and how it is launched."""

    element: int
    warps: int
    vectors: int
    stages: int
    cluster: int
    scale: int
    bias: int
    aligned: int
    slice: int
    shared_bytes: int

    @property
    def macros(self) -> tuple[str, ...]:
        return tuple(f"-D{name.upper()}={value}" for name, value in zip(self._fields[:8], self, strict=False))


class Arguments(ctypes.Structure):
    """The kernel's one argument, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "labels", "scale", "bias", "class_weight", "denominator")),
        *((name, ctypes.c_void_p) for name in ("grad", "row_loss")),
        *((name, ctypes.c_longlong) for name in ("rows", "row_step", "grad_step", "ignore_index")),
        *((name, ctypes.c_int) for name in ("classes", "slice")),
        ("factor", ctypes.c_float),
    )


@functools.cache
def plan(num_classes: int, dtype: torch.dtype, scale: bool, bias: bool, aligned: bool = True) -> Plan | None:
    """The smallest cluster whose blocks hold a slice in registers and two stages of it in shared memory, or None."""
    size = dtype.itemsize
    lanes = _LANE_BYTES // size
    for cluster in CLUSTERS:
        width = -(-num_classes // (cluster * _SLICE)) * _SLICE
        # Rows that begin anywhere reach into one vector more.
        vectors = -(-(width if aligned else width + lanes) // (32 * WARPS * lanes))
        terms = HEADER + 4 * width * (scale + bias)
        stage = (width if aligned else width + _SLICE) * size
        stages = min(_MOST_STAGES, (SHARED_MEMORY - terms) // stage)
        if vectors * lanes * 4 <= _BYTES_OF_THREAD and stages >= 2:
            sizes = (vectors, stages, cluster, int(scale), int(bias), int(aligned), width)
            return Plan(_ELEMENTS[dtype], WARPS, *sizes, terms + stages * stage)
    return None


def try_softmax_ce(
    inputs: LogitInputs, rows: RowInputs, options: RowOptions, denominator: Tensor | None, mask: SoftmaxMask,
    grad: Tensor | None,
) -> tuple[Tensor, list[Tensor]] | None:  # fmt: skip
    """The loss of each row, and `grad` with the gradient over the `denominator`; None where Triton is to do both.

    Labels have been checked. Of a gradient in place of the logits nothing can be said: blocks read what others write.
    """
    if not ENABLED or grad is None or not serves(inputs, rows, options, mask, grad):
        return None
    logits = inputs.logits
    if not logits.is_cuda or torch.cuda.get_device_capability(logits.device) < _CAPABILITY or torch.version.hip:
        return None
    aligned = all(_is_aligned(each) for each in (logits, grad))
    chosen = plan(logits.shape[1], logits.dtype, inputs.scale is not None, inputs.bias is not None, aligned)
    if chosen is None or driver.unavailable_reason() is not None:
        return None
    return launch(chosen, inputs, denominator, grad), [grad]


def serves(inputs: LogitInputs, rows: RowInputs, options: RowOptions, mask: SoftmaxMask, grad: Tensor) -> bool:
    """Whether the kernel knows these options, and the rows' layout in logits and gradient."""
    logits = inputs.logits
    return (
        logits.dim() == 2
        and FEWEST <= logits.shape[1] <= MOST
        and logits.dtype in _ELEMENTS
        and not inputs.target.is_floating_point()
        and inputs.target_override is None
        and inputs.soft_cap == 0
        and all(part is None for part in rows)
        and options == RowOptions()
        and mask == SoftmaxMask(logits=True)
        and logits.shape[0] > 0
        and logits.data_ptr() != grad.data_ptr()
        and all(each.stride(1) == 1 and each.stride(0) >= each.shape[1] for each in (logits, grad))
        and (logits.data_ptr() - grad.data_ptr()) % _LANE_BYTES == 0
        and (logits.stride(0) - grad.stride(0)) * logits.element_size() % _LANE_BYTES == 0
    )


def _is_aligned(rows: Tensor) -> bool:
    """Whether all rows begin and end at multiples of 16 bytes."""
    size = rows.element_size()
    return (rows.shape[1] * size | rows.stride(0) * size | rows.data_ptr()) % _LANE_BYTES == 0


def launch(chosen: Plan, inputs: LogitInputs, denominator: Tensor | None, grad: Tensor) -> Tensor:
    """Runs the kernel on the current stream."""
    logits = inputs.logits
    num_rows = logits.shape[0]
    row_loss = logits.new_empty(num_rows, dtype=torch.float32)
    kept = [None if part is None else part.contiguous() for part in (*inputs[1:5], denominator)]
    arguments = arguments_of(chosen, logits, kept, grad, row_loss, inputs.ignore_index)
    with torch.cuda.device(logits.device):
        multiprocessors = torch.cuda.get_device_properties(logits.device).multi_processor_count
        clusters = max(1, min(num_rows, multiprocessors // chosen.cluster))
        kernel = driver.kernel(SOURCE, "cluster_ce", chosen.macros, chosen.shared_bytes, logits.device.index)
        driver.launch(
            kernel, clusters * chosen.cluster, 32 * chosen.warps, chosen.shared_bytes, chosen.cluster, arguments,
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return row_loss


def arguments_of(
    chosen: Plan, logits: Tensor, kept: list[Tensor | None], grad: Tensor, row_loss: Tensor, ignore_index: int
) -> Arguments:
    """`kept`: labels, scale, bias, class weights, denominator, contiguous."""
    pointers = (None if part is None else part.data_ptr() for part in (logits, *kept, grad, row_loss))
    sizes = (logits.shape[0], logits.stride(0), grad.stride(0), ignore_index, logits.shape[1], chosen.slice)
    return Arguments(*pointers, *sizes, 1.0)
