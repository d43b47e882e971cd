"""How many rows of logits a GPU forms at a time: by the bytes that a chunk moves beside its products."""

from __future__ import annotations

# Memory of a chunk, and what it may grow to for the sake of _FEWEST_ROWS: half a gigabyte, or as much as the weight and
# the sums of its gradient take anyway.
_CHUNK_BYTES, _LARGEST_BYTES = 1 << 28, 1 << 29
_FEWEST_ROWS = 2048
# A chunk that stays in a second-level cache of 40 MB or more beside what it is multiplied by.
_CACHED_BYTES = 20_000_000
# Products of a chunk shorter than this (60 us on an H100) leave the GPU waiting for the next launches.
_LEAST_FLOPS = 5e10
SUM_BYTES = 4  # of the weight's gradient, where chunks add up


def device_chunk_rows(rows: int, classes: int, width: int, itemsize: int) -> int:
    """Rows of a chunk.

    A chunk's logits are written and read by the row kernel, and each chunk reads and writes the sums of the weight's
    gradient: many rows at a time, unless logits that stay in the cache save more than their sums cost.
    """
    of_row = max(1, classes * itemsize)
    least = min(_FEWEST_ROWS * of_row, max(_LARGEST_BYTES, classes * width * (itemsize + SUM_BYTES)))
    many = max(1, min(rows, max(_CHUNK_BYTES, least) // of_row))
    cached = max(1, _CACHED_BYTES // of_row)
    if cached >= many or 6 * cached * classes * width < _LEAST_FLOPS:
        return many
    moved = [bytes_per_logit(rows, each, classes, width, itemsize) for each in (cached, many)]
    return cached if moved[0] < moved[1] else many


def bytes_per_logit(rows: int, chunk: int, classes: int, width: int, itemsize: int) -> float:
    """Bytes moved to and from memory for each logit, beside the products' own: the row kernel's and those of sums."""
    of_logits = 0 if chunk * classes * itemsize <= _CACHED_BYTES else 2 * itemsize
    sums_cached = classes * width * SUM_BYTES <= _CACHED_BYTES
    of_sums = 0.0 if chunk >= rows or sums_cached else 2 * SUM_BYTES * width / chunk
    return of_logits + of_sums
