"""The tiles of kernels: what the tuning table says of a device, or smaller ones where a launch said that it can't."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton.language as tl
from triton.runtime.errors import OutOfResources

from fusedloss.core.user_warnings import warn_user

from . import tuning


class Tile(NamedTuple):
    """`rows` of `block` classes at a time, powers of two; `loop`: read block by block, not all held in registers."""

    rows: int
    block: int
    warps: int
    stages: int = 1
    loop: bool = False


class FeatureTile(NamedTuple):
    """`rows` x `block` features at a time, over `chunk` rows in the order of their classes."""

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


AnyTile = TypeVar("AnyTile", Tile, FeatureTile, ProductTile)
Entry = tuple[torch.device, str, torch.dtype, str]  # device, stem, type of the input and shape class

_SMALLEST = 16  # of a side; rows that are no side of a product may be fewer
_smaller: dict[Entry, Any] = {}
_last = threading.local()  # .tiles: what this thread asked for last, an entry and its tile


def tile_of(kind: type[AnyTile], device: torch.device, stem: str, dtype: torch.dtype, shape_class: str) -> AnyTile:
    """The tile of one entry of the tuning table, or the smaller one that took its place."""
    entry = (device, stem, dtype, shape_class)
    tile: AnyTile = _smaller[entry] if entry in _smaller else kind(*tuning.entry(*entry))  # type: ignore[arg-type]
    try:
        _last.tiles.appendleft((entry, tile))
    except AttributeError:
        _last.tiles = deque([(entry, tile)], maxlen=8)
    return tile


def name_tile(error: OutOfResources, arguments: Sequence[Any], constants: Mapping[str, Any], warps: int) -> None:
    """Notes with a launch's error which entry its tile came from: the last one whose sizes are among its constants."""
    leaves = [leaf for argument in arguments for leaf in (argument if isinstance(argument, tuple) else (argument,))]
    values = [leaf.value if isinstance(leaf, tl.constexpr) else leaf for leaf in (*leaves, *constants.values())]
    sizes = {value for value in values if type(value) is int}
    for entry, tile in getattr(_last, "tiles", ()):
        # Rows of classes that can't be read in wide loads are fewer than the entry says.
        rows_match = isinstance(tile, Tile) or tile.rows in sizes
        if tile.warps == warps and rows_match and (tile.block in sizes or getattr(tile, "columns", 0) in sizes):
            error.entry, error.tile = entry, tile
            return


def smaller(tile: AnyTile) -> AnyTile | None:
    """The next smaller tile: fewer stages, then half the step or half the values; None where there is none."""
    if tile.stages > 1:
        return tile._replace(stages=tile.stages - 1)
    if isinstance(tile, ProductTile):
        if tile.step > 2 * _SMALLEST:
            return tile._replace(step=tile.step // 2)
        if tile.block > max(tile.rows, tile.columns, _SMALLEST):
            return tile._replace(block=tile.block // 2)
        side = max(tile.rows, tile.columns)
        # Square tiles stay square: some kernels want that.
        rows, columns = (size // 2 if size == side else size for size in (tile.rows, tile.columns))
        return tile._replace(rows=rows, columns=columns) if side > _SMALLEST else None
    if tile.rows > 1:
        return tile._replace(rows=tile.rows // 2)
    return tile._replace(block=tile.block // 2) if tile.block > _SMALLEST else None


def fitted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which is called again with a smaller tile when a launch in it needs more than the device has.

    The smaller one is kept for the device. A kernel that didn't fit did nothing, and those before it in the function
    give the same again.
    """

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        while True:
            try:
                return function(*arguments, **keywords)
            except OutOfResources as error:
                if not _shrunk(error):
                    raise

    return call


def _shrunk(error: OutOfResources) -> bool:
    """Puts a smaller tile in the place of the one that the error names; False where there is none."""
    entry, tile = getattr(error, "entry", None), getattr(error, "tile", None)
    less = None if tile is None else smaller(tile)
    if entry is None or less is None:
        return False
    if entry not in _smaller:
        device, stem, dtype, shape_class = entry
        warn_user(
            f"fusedloss: a Triton kernel of {stem} ({dtype}, '{shape_class}') takes {error.required} of {error.name} "
            f"in {tile}, where '{device}' has {error.limit}; smaller tiles are used. "
            f"`python -m bench.tune {stem}` finds the fastest that fit.",
            RuntimeWarning,
        )
    _smaller[entry] = less
    return True


def forget() -> None:
    """Forgets which tiles didn't fit."""
    _smaller.clear()
