"""How kernels are launched: tile sizes, warps, programs, and the compile options common to all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class Tile(NamedTuple):
    """What one program holds in registers: `rows` x `block` values; both are powers of two."""

    rows: int
    block: int
    warps: int


class FeatureTile(NamedTuple):
    """`rows` x `block` features at a time, over `chunk` rows of one class."""

    rows: int
    block: int
    chunk: int
    warps: int


class Table(NamedTuple):
    """Softmax tiles of one compute type; a thread holds 4 to 16 values of a tile."""

    beside: tuple[int, int]  # rows up to this width lie side by side in tiles of this many values
    single: tuple[tuple[int, int], ...]  # a wider row has a tile of its own: up to this width, so many warps
    # A still wider row is read in steps, twice: few programs at a time leave its first read in the cache.
    loop: Tile
    apart: Tile  # classes not adjacent in memory: rows are, so a tile covers many
    # Column sums of wider tiles would spill: they take programs of their own, with the tile `columns`.
    widest_columns: int
    columns: Tile


# Sized by what the compiler makes of them (python -m bench.resources): the widest rows that stay in registers
# without a spill in any variant, and below that enough warps on a multiprocessor in plain ones.
# Not tuned on a GPU.
_TABLES = {
    torch.float32: Table(
        (2048, 2048), ((4096, 8), (8192, 16)), Tile(1, 8192, 16), Tile(32, 32, 8), 4096, Tile(2, 1024, 8)
    ),
    torch.float64: Table(
        (1024, 1024), ((2048, 8), (4096, 16)), Tile(1, 2048, 8), Tile(32, 32, 8), 2048, Tile(1, 1024, 8)
    ),
}
_BESIDE_WARPS = 8
_MOST_ROWS = 128
_SMALLEST_BLOCK = 16
# Values of a tile, its widest block of columns, rows of a chunk, warps.
_FEATURES = {torch.float32: (4096, 512, 256, 8), torch.float64: (2048, 256, 256, 8)}
_MOST_FEATURE_ROWS = 32
LABELS = (1024, 4)  # rows and warps of the label kernel
SCALE = (4096, 8)  # values and warps of the scaling kernel
# Column sums live in registers over all tiles of a program: enough programs to fill the GPU, no more.
_PROGRAMS_PER_MULTIPROCESSOR = 2
_PROGRAMS_WITHOUT_GPU = 4
_REGISTERS = 65536  # of a multiprocessor

_forced_tile: Tile | None = None
_forced_programs: int | None = None
_forced_features: FeatureTile | None = None


@contextlib.contextmanager
def forced(
    tile: Tile | None = None, programs: int | None = None, features: FeatureTile | None = None
) -> Iterator[None]:
    """Inside the block these tiles are used, and at most `programs` programs share column sums."""
    global _forced_tile, _forced_programs, _forced_features
    before = _forced_tile, _forced_programs, _forced_features
    _forced_tile, _forced_programs, _forced_features = tile, programs, features
    try:
        yield
    finally:
        _forced_tile, _forced_programs, _forced_features = before


def row_tile(num_classes: int, compute_dtype: torch.dtype, adjacent: bool) -> Tile:
    """Tile for rows of `num_classes`; `adjacent` says whether the classes of a row are adjacent in memory."""
    if _forced_tile is not None:
        return _forced_tile
    table = _TABLES[compute_dtype]
    width = max(_SMALLEST_BLOCK, triton.next_power_of_2(num_classes))
    if not adjacent:
        return table.apart._replace(block=min(table.apart.block, width))
    widest, values = table.beside
    if width <= widest:
        return Tile(min(_MOST_ROWS, values // width), width, _BESIDE_WARPS)
    for widest, warps in table.single:
        if width <= widest:
            return Tile(1, width, warps)
    return table.loop


def column_tile(tile: Tile, num_classes: int, compute_dtype: torch.dtype, adjacent: bool) -> Tile | None:
    """Tile for column sums in programs of their own; None where they fit beside the rows of `tile`."""
    table = _TABLES[compute_dtype]
    if tile.block >= num_classes and (_forced_tile or tile.block <= table.widest_columns):
        return None
    return _forced_tile or (table.columns if adjacent else table.apart)


def feature_tile(width: int, compute_dtype: torch.dtype) -> FeatureTile:
    """Tile for features of `width` columns."""
    if _forced_features is not None:
        return _forced_features
    values, widest, chunk, warps = _FEATURES[compute_dtype]
    block = min(widest, max(_SMALLEST_BLOCK, triton.next_power_of_2(width)))
    return FeatureTile(min(_MOST_FEATURE_ROWS, values // block), block, chunk, warps)


def programs_for(tiles: int, device: torch.device) -> int:
    """Number of programs that share `tiles` when each keeps column sums."""
    if _forced_programs is not None:
        most = _forced_programs
    elif device.type == "cuda":
        most = _PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    else:
        most = _PROGRAMS_WITHOUT_GPU
    return max(1, min(tiles, most))


def options(warps: int) -> dict[str, Any]:
    """Compile options of a kernel of so many warps.

    No loop is pipelined: none feeds a matrix product, and programs beside each other cover the latency.
    Multiply-add contraction is asked for, since the default differs between Triton's versions. A program of
    16 warps may use all registers it can have: left to itself the assembler spills to fit in more programs.
    """
    chosen: dict[str, Any] = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    if warps >= 16:
        chosen["maxnreg"] = _REGISTERS // (32 * warps)
    return chosen


def start(
    kernel: Any,
    grid: Sequence[int],
    arguments: Sequence[Any],
    device: torch.device,
    warps: int,
    **constants: Any,
) -> None:
    """Launches `kernel` on `device`; an empty grid launches nothing."""
    if 0 in grid:
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[tuple(grid)](*arguments, **options(warps), **constants)


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Type that kernels compute in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a compute type."""
    return tl.float64 if dtype == torch.float64 else tl.float32
