"""How kernels are launched: tile sizes, warps, programs, and the compile options common to all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import tuning


class Tile(NamedTuple):
    """What one program holds in registers: `rows` x `block` values; both are powers of two."""

    rows: int
    block: int
    warps: int
    stages: int = 1


class FeatureTile(NamedTuple):
    """`rows` x `block` features at a time, over `chunk` rows of one class."""

    rows: int
    block: int
    chunk: int
    warps: int
    stages: int = 1


class ProductTile(NamedTuple):
    """`rows` x `columns` products, `step` features at a time; gradients of `block` features. None below 16."""

    rows: int
    columns: int
    step: int
    block: int
    warps: int
    stages: int = 1


# Widest tile of a row: wider ones spill. Column sums and all that can change a row each take half of it.
_WIDEST = {torch.float32: 8192, torch.float64: 4096}
_SMALLEST_BLOCK = 16
_WIDEST_FEATURES = {torch.float32: 512, torch.float64: 256}
_WIDEST_PRODUCTS = 512
LABELS = (1024, 4)  # rows and warps of the label kernel
SCALE = (4096, 8)  # values and warps of the scaling kernel
# Column sums live in registers over all tiles of a program: enough programs to fill the GPU, no more.
_PROGRAMS_PER_MULTIPROCESSOR = 2
_PROGRAMS_WITHOUT_GPU = 4
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
    """Inside the block these tiles are used, and at most `programs` programs share column sums."""
    global _forced_tile, _forced_programs, _forced_features, _forced_products
    before = _forced_tile, _forced_programs, _forced_features, _forced_products
    _forced_tile, _forced_programs, _forced_features, _forced_products = tile, programs, features, products
    try:
        yield
    finally:
        _forced_tile, _forced_programs, _forced_features, _forced_products = before


def row_tile(
    num_classes: int, dtype: torch.dtype, adjacent: bool, columns: bool = False, extras: bool = False
) -> Tile:  # fmt: skip
    """Tile for rows of `num_classes`; `adjacent` says whether the classes of a row are adjacent in memory.

    `columns` and `extras` ask for room: for column sums beside the rows, for a hinge and a soft cap.
    """
    if _forced_tile is not None:
        return _forced_tile
    width = max(_SMALLEST_BLOCK, triton.next_power_of_2(num_classes))
    if not adjacent:
        tile = Tile(*_entry("softmax_ce", dtype, "apart"))
        return tile._replace(block=min(tile.block, width))
    if width > _WIDEST[computed_in(dtype)] // (2 if extras else 1):
        return Tile(*_entry("softmax_ce", dtype, "loop extras" if extras else "loop"))
    beside = columns and width <= _widest_columns(dtype, extras)
    return Tile(*_entry("softmax_ce", dtype, f"{width} columns" if beside else str(width)))


def column_tile(tile: Tile, num_classes: int, dtype: torch.dtype, adjacent: bool, extras: bool = False) -> Tile | None:
    """Tile for column sums in programs of their own; None where they fit beside the rows of `tile`."""
    if tile.block >= num_classes and (_forced_tile or tile.block <= _widest_columns(dtype, extras)):
        return None
    return _forced_tile or Tile(*_entry("softmax_ce", dtype, "columns" if adjacent else "apart"))


def _widest_columns(dtype: torch.dtype, extras: bool) -> int:
    return _WIDEST[computed_in(dtype)] // (4 if extras else 2)


def feature_tile(width: int, dtype: torch.dtype) -> FeatureTile:
    """Tile for features of `width` columns."""
    if _forced_features is not None:
        return _forced_features
    block = max(_SMALLEST_BLOCK, triton.next_power_of_2(width))
    return FeatureTile(*_entry("class_stats", dtype, str(min(block, _WIDEST_FEATURES[computed_in(dtype)]))))


def _entry(stem: str, dtype: torch.dtype, shape_class: str) -> tuple[int, ...]:
    """What the tuning table says of a shape class."""
    return tuning.TABLES[stem][str(dtype).removeprefix("torch.")][shape_class]


def product_tile(stem: str, kernel: str, width: int, dtype: torch.dtype) -> ProductTile:
    """Tile for products of rows of `width` features in a `kernel` of linear_ce or supcon."""
    if _forced_products is not None:
        return _forced_products
    block = max(_SMALLEST_BLOCK, triton.next_power_of_2(width))
    return ProductTile(*_entry(stem, dtype, f"{kernel} {min(block, _WIDEST_PRODUCTS)}"))


def widest_tiled(dtype: torch.dtype) -> int:
    """Most features of a linear head of 16 bits whose logits are formed in tiles again and again, never written."""
    return _entry("linear_ce", dtype, "widest tiled")[0]


def programs_for(tiles: int, device: torch.device) -> int:
    """Number of programs that share `tiles` when each keeps column sums."""
    if _forced_programs is not None:
        most = _forced_programs
    elif device.type == "cuda":
        most = _PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    else:
        most = _PROGRAMS_WITHOUT_GPU
    return max(1, min(tiles, most))


def options(warps: int, stages: int = 1) -> dict[str, Any]:
    """Compile options of a kernel of so many warps, with so many steps of its loops under way.

    Multiply-add contraction is asked for, since the default differs between Triton's versions. A program of
    16 warps may use all registers it can have: left to itself the assembler spills to fit in more programs.
    """
    chosen: dict[str, Any] = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if warps >= 16:
        chosen["maxnreg"] = most_registers(warps)
    return chosen


def most_registers(warps: int) -> int:
    """Registers of a thread when one program of so many warps has a multiprocessor to itself."""
    return min(_REGISTERS // (32 * warps), 255)


def start(
    kernel: Any,
    grid: Sequence[int],
    arguments: Sequence[Any],
    device: torch.device,
    warps: int,
    stages: int = 1,
    **constants: Any,
) -> None:
    """Launches `kernel` on `device`; an empty grid launches nothing."""
    if 0 in grid:
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[tuple(grid)](*arguments, **{**options(warps, stages), **constants})


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Type that kernels compute in."""
    return computed_in(tensor.dtype)


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Type that values of `dtype` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a compute type."""
    return tl.float64 if dtype == torch.float64 else tl.float32
