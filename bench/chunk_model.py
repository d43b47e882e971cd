"""What share of a GPU's matrix-product rate a linear head in chunks can reach, by arithmetic: nothing is measured.

    python -m bench.chunk_model        # a table of predictions

Three products of ``2 * rows * classes * width`` operations, at the rate of products of this size; beside them the row
kernel, bound by memory or by the instructions that it issues, and the sums of the weight's gradient, which each chunk
reads and writes. A product takes its arithmetic or its logits' way to memory, whichever is longer.
"""

from __future__ import annotations

from typing import NamedTuple

from fusedloss.backends.chunked.device_chunks import SUM_BYTES, device_chunk_rows

_ROW_INSTRUCTIONS = 30  # per logit of 16 bits: the budget of the row kernel
_CORES, _ISSUED = 128, 0.65  # lanes of a multiprocessor, and the share of their cycles that issues
_COPY_SHARE = 0.85  # of the copy bandwidth that a row kernel may reach
_READ_ONCE = 32768  # classes that a row kernel keeps in registers


class Device(NamedTuple):
    """Measured limits of a GPU: multiprocessors, Hz, bytes and operations of bfloat16 products per second."""

    multiprocessors: int
    clock: float
    bandwidth: float
    product_rate: float
    cache_bytes: int = 50_000_000


DEVICES = {
    "H100": Device(132, 1.9e9, 3.0e12, 798e12),
    "H200": Device(132, 1.9e9, 4.3e12, 790e12),
}


def share_of_products(device: Device, rows: int, classes: int, width: int, itemsize: int = 2) -> float:
    """Predicted share of the product rate, forward and backward together."""
    chunk = device_chunk_rows(rows, classes, width, itemsize)
    cached = chunk * classes * itemsize <= device.cache_bytes / 2
    arithmetic = 2 * width / device.product_rate
    products = 3 * max(arithmetic, 0.0 if cached else itemsize / device.bandwidth)
    moved = 0 if cached else itemsize * (2 if classes <= _READ_ONCE else 3)
    instructions = _ROW_INSTRUCTIONS / (device.multiprocessors * _CORES * device.clock * _ISSUED)
    of_rows = max(moved / (_COPY_SHARE * device.bandwidth), instructions)
    one_chunk = chunk >= rows
    sums_cached = classes * width * SUM_BYTES <= device.cache_bytes / 2
    of_sums = 0.0 if one_chunk or sums_cached else 2 * SUM_BYTES * width / chunk / device.bandwidth
    return 3 * arithmetic / (products + of_rows + of_sums)


def table() -> str:
    """Predictions for bfloat16, a line for each shape."""
    lines = ["rows classes width: rows of a chunk, " + ", ".join(DEVICES)]
    for classes, rows in ((1000, 16384), (10000, 16384), (32000, 16384), (131072, 8192), (1000000, 4096)):
        for width in (128, 384, 768, 1024, 4096):
            shares = ", ".join(f"{share_of_products(device, rows, classes, width):.0%}" for device in DEVICES.values())
            lines.append(f"{rows} {classes} {width}: {device_chunk_rows(rows, classes, width, 2)}, {shares}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
