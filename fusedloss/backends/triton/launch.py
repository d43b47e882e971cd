"""How kernels are launched: tile sizes, warps, programs, and the compile options common to all."""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton.language as tl
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from fusedloss.core.dtypes import compute_dtype

from . import capture, plans
from .tiles import FeatureTile as FeatureTile
from .tiles import ProductTile as ProductTile
from .tiles import Tile as Tile
from .tiles import name_tile, tile_of

# Widest rows that registers hold, and beside column sums: wider ones spill. All that can change a row takes half.
_WIDEST = {torch.float32: 32768, torch.float64: 4096}
_WIDEST_COLUMNS = {torch.float32: 4096, torch.float64: 2048}
WIDEST_WITH_MORE = 16384
_SMALLEST_BLOCK = 16
_WIDEST_FEATURES = {torch.float32: 2048, torch.float64: 1024}
# Of features; fewer rows than would give each so many take shorter chunks.
_CHUNKS = 1024
_WIDEST_PRODUCTS = 512
_MOST_HELD_WIDE = 40
LABELS = (1024, 4)  # rows and warps of the label kernel
SCALE = (4096, 8)  # values and warps of the scaling kernel
# Column sums live in registers over all tiles of a program: enough programs to fill the GPU, no more.
_PROGRAMS_PER_MULTIPROCESSOR = 2
_PROGRAMS_WITHOUT_GPU = 4
_WARPS_PER_MULTIPROCESSOR = 64
_REGISTERS = 65536  # of a multiprocessor

_forced_tile: Tile | None = None
_forced_programs: int | None = None
_forced_features: FeatureTile | None = None
_forced_products: ProductTile | None = None


@contextlib.contextmanager
def forced(
    tile: Tile | None = None,
    programs: int | None = None,
    features: FeatureTile | None = None,
    products: ProductTile | None = None,
) -> Iterator[None]:
    """Inside the block these tiles are used, and at most `programs` programs share the rows."""
    global _forced_tile, _forced_programs, _forced_features, _forced_products
    before = _forced_tile, _forced_programs, _forced_features, _forced_products
    _forced_tile, _forced_programs, _forced_features, _forced_products = tile, programs, features, products
    try:
        yield
    finally:
        _forced_tile, _forced_programs, _forced_features, _forced_products = before


def _tile(device: torch.device, dtype: torch.dtype, shape_class: str, loop: bool = False) -> Tile:
    return tile_of(Tile, device, "softmax_ce", dtype, shape_class)._replace(loop=loop)


def row_tile(
    num_classes: int, dtype: torch.dtype, contiguous: bool, align: int, columns: bool, extras: bool,
    device: torch.device,
) -> Tile:  # fmt: skip
    """Tile for rows of `num_classes`; `contiguous` says whether the classes of a row are contiguous in memory.

    `align` divides the steps between rows: it bounds how much one thread loads at a time, and with that how many rows a
    warp covers. `columns` and `extras` ask for room: for column sums beside the rows, for a hinge and a soft cap.
    """
    if _forced_tile is not None:
        return _forced_tile
    width = max(_SMALLEST_BLOCK, next_power_of_2(num_classes))
    if not contiguous:
        tile = _tile(device, dtype, "strided")
        return tile._replace(block=min(tile.block, width), loop=width > tile.block)
    if columns and width <= _widest_columns(dtype, extras):
        return _tile(device, dtype, f"{width} columns")
    if width > _WIDEST[compute_dtype(dtype)] // (2 if extras else 1):
        return _tile(device, dtype, "loop extras" if extras else "loop", loop=True)
    tile = _tile(device, dtype, str(width))
    widest_load = 16 // dtype.itemsize
    return tile._replace(rows=max(1, tile.rows * min(align, widest_load) // widest_load))


def column_tile(
    tile: Tile, num_classes: int, dtype: torch.dtype, contiguous: bool, extras: bool, device: torch.device
) -> Tile | None:
    """Tile for column sums in programs of their own; None where they fit beside the rows of `tile`."""
    if tile.block >= num_classes and (_forced_tile or tile.block <= _widest_columns(dtype, extras)):
        return None
    tile = _forced_tile or _tile(device, dtype, "columns" if contiguous else "strided")
    return tile._replace(loop=True)


def _widest_columns(dtype: torch.dtype, extras: bool) -> int:
    return _WIDEST_COLUMNS[compute_dtype(dtype)] // (2 if extras else 1)


def feature_tile(width: int, rows: int, dtype: torch.dtype, device: torch.device) -> FeatureTile:
    """Tile for so many rows of `width` features."""
    if _forced_features is not None:
        return _forced_features
    block = max(_SMALLEST_BLOCK, next_power_of_2(width))
    shape_class = str(min(block, _WIDEST_FEATURES[compute_dtype(dtype)]))
    tile = tile_of(FeatureTile, device, "class_stats", dtype, shape_class)
    enough = max(tile.rows, next_power_of_2(max(1, cdiv(rows, _CHUNKS))))
    return tile._replace(chunk=min(tile.chunk, enough))


def product_tile(stem: str, kernel: str, width: int, dtype: torch.dtype, device: torch.device) -> ProductTile:
    """Tile for products of rows of `width` features in a `kernel` of supcon."""
    if _forced_products is not None:
        return _forced_products
    block = max(_SMALLEST_BLOCK, next_power_of_2(width))
    return tile_of(ProductTile, device, stem, dtype, f"{kernel} {min(block, _WIDEST_PRODUCTS)}")


def cdiv(count: int, size: int) -> int:
    """``triton.cdiv`` of integers, which takes a tenth of its time."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """``triton.next_power_of_2`` of a positive integer, which takes a tenth of its time."""
    return 1 << (count - 1).bit_length()


def programs_for(tiles: int, device: torch.device) -> int:
    """Number of programs that share `tiles` when each keeps column sums."""
    if _forced_programs is not None:
        most = _forced_programs
    elif device.type == "cuda":
        most = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device)
    else:
        most = _PROGRAMS_WITHOUT_GPU
    return max(1, min(tiles, most))


def programs_at_once(tiles: int, warps: int, device: torch.device) -> int:
    """Number of programs that take `tiles` in turn: as many as the GPU can hold."""
    if _forced_programs is not None:
        most = _forced_programs
    elif device.type == "cuda":
        held = max(1, _WARPS_PER_MULTIPROCESSOR // warps)
        most = held * multiprocessors(device)
    else:
        most = _PROGRAMS_WITHOUT_GPU
    return max(1, min(tiles, most))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has, a ROCm device's compute units."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def options(warps: int, stages: int = 1) -> dict[str, Any]:
    """Compile options of a kernel of so many warps, with so many steps of its loops under way.

    Multiply-add contraction is asked for, since the default differs between Triton's versions. A program of
    16 warps may use all registers it can have: left to itself the assembler spills to fit in more programs.
    """
    chosen: dict[str, Any] = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if warps >= 16:
        chosen["maxnreg"] = most_registers(warps)
    return chosen


def on_rocm() -> bool:
    """Whether devices of type ``"cuda"`` are AMD's: Triton has neither ``maxnreg`` nor ``"tf32x3"`` there."""
    return torch.version.hip is not None


def precision(dtype: torch.dtype) -> str:
    """The precision of products that keeps float32's digits, on tensor cores where there is one for them."""
    return "tf32x3" if dtype == torch.float32 and not on_rocm() else "ieee"


def compile_options(warps: int, stages: int, constants: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a launch: compile options that this Triton takes, and the kernel's constants."""
    chosen = {**options(warps, stages), **constants}
    if on_rocm():
        chosen.pop("maxnreg", None)
        # A wavefront has 64 threads, a program at most 1024.
        chosen["num_warps"] = min(warps, 16)
    return chosen


def most_registers(warps: int) -> int:
    """Registers of a thread when one program of so many warps has a multiprocessor to itself."""
    return min(_REGISTERS // (32 * warps), 255)


def most_held_wide(warps: int) -> int:
    """How many values of a row a thread may hold in the compute type, and not as they are stored."""
    return min(_MOST_HELD_WIDE, most_registers(warps) // 4)


def float64_bits(value: float) -> int:
    """A number as the bits of a float64, which keep its digits: Triton passes floats of a tuple in float32."""
    # The bits of 0.0 would make an int32.
    return int.from_bytes(struct.pack("<d", value or -0.0), "little", signed=True)


def contiguous(tensors: Sequence[torch.Tensor | None]) -> Iterator[torch.Tensor | None]:
    """Kernels step through values of rows and of classes one by one."""
    return (tensor if tensor is None else tensor.contiguous() for tensor in tensors)


def start(
    kernel: Any,
    grid: Sequence[int],
    arguments: Sequence[Any],
    device: torch.device,
    warps: int,
    stages: int = 1,
    **constants: Any,
) -> None:
    """Launches `kernel` on `device`; an empty grid launches nothing.

    Raises:
        triton.runtime.errors.OutOfResources: the device hasn't what the kernel needs; see ``tiles.fitted``.
        RuntimeError: the kernel can't be loaded while a CUDA graph is captured.
    """
    if 0 in grid:
        return
    key = None
    if plans.usual(kernel):
        active = driver.active
        present: int = active.get_current_device()
        index = present if device.index is None else device.index
        key = plans.key_of(kernel, arguments, constants, index, warps, stages)
        if key is not None and index == present and plans.launched(key, active, grid, arguments, constants, index):
            return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        try:
            with capture.loading(kernel, device):
                compiled = kernel[tuple(grid)](*arguments, **compile_options(warps, stages, constants))
        except OutOfResources as error:
            name_tile(error, arguments, constants, warps)
            raise
    if key is not None:
        plans.keep(key, kernel, compiled, arguments, constants)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a compute type."""
    return tl.float64 if dtype == torch.float64 else tl.float32
