"""What share of a GPU's matrix-product rate a supervised contrast of 16-bit rows can reach, by arithmetic.

    python -m bench.contrast_model     # a table of predictions

Instructions are counted in the machine code of the kernels, compiled for sm_90: those of a tile's loop, which every
pair passes, and of the loop over features inside it. They issue beside no product: what overlaps makes it faster.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from bench.chunk_model import DEVICES, Device

_CORES, _ISSUED = 128, 0.45  # lanes of a multiprocessor, and the share of their cycles that issues at 8 to 16 warps
_WIDTHS = (64, 128, 256, 512, 1024)


class Kernel(NamedTuple):
    """One kernel in machine code: instructions of a pair in the loop over tiles, and in that over features (or 0)."""

    of_pair: float
    of_step: float
    steps: int  # of that loop
    passes: int  # blocks of features, each of which forms the similarities again
    wgmma: int
    registers: int
    shared: int
    spills: bool


def loops(code: str) -> list[int]:
    """Instructions of each loop in machine code, those of loops inside it included, in the order of their ends."""
    places: dict[str, int] = {}
    found: list[int] = []
    count = 0
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            places[label[1]] = count
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            count += 1
            branch = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction[1])
            # A branch to itself ends a kernel's code.
            if branch and count - 1 > places.get(branch[1], count):
                found.append(count - places[branch[1]])
    return found


def disassembled(compiled: Any) -> str:
    """With the nvdisasm that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def kernels(width: int) -> dict[str, Kernel]:
    """Both kernels of plain rows of bfloat16, compiled for sm_90."""
    import torch

    from bench.resources import compiling, usage_of
    from bench.variants.supcon import supcon_backward, supcon_stats
    from fusedloss.backends.triton import launch

    found = {}
    with compiling(90) as recorded:
        supcon_stats("bf16", width)
        supcon_backward("bf16", width, temperature=False)
    for kind, name in (("sums", "sums_kernel"), ("gradient", "gradient_kernel")):
        compiled = next(kernel for kernel_name, kernel in recorded if kernel_name == name)
        tile = launch.product_tile("supcon", kind, width, torch.bfloat16, torch.device("cpu"))
        code = disassembled(compiled)
        usage = usage_of(name, "", 90, compiled)
        pairs = tile.rows * tile.columns / (32 * tile.warps)
        steps = -(-width // tile.step)
        # The gradient's first loop is that of small temperatures, its second that of one shift for all.
        counts = loops(code)
        inner, outer = (counts[-2], counts[-1]) if steps > 1 else (0, min(counts))
        found[kind] = Kernel(
            (outer - inner) / pairs, inner / pairs, steps if steps > 1 else 0, 1 if kind == "sums" else
            -(-width // tile.block), code.count("HGMMA"), usage.registers, usage.shared, usage.spills,
        )  # fmt: skip
    return found


def share_of_products(device: Device, width: int, counted: dict[str, Kernel]) -> float:
    """Predicted share of the product rate of three products of all pairs, forward and backward together."""
    issued = device.multiprocessors * _CORES * device.clock * _ISSUED
    instructions_of_pair = sum(each.passes * (each.of_pair + each.steps * each.of_step) for each in counted.values())
    # Similarities forward, similarities for each block of features, and their gradient's product.
    products = 2 * width * (1 + counted["gradient"].passes + 1) / device.product_rate
    return 6 * width / device.product_rate / (instructions_of_pair / issued + products)


def table() -> str:
    """Predictions, a line for each width."""
    lines = ["width: instructions of a pair forward and backward, " + ", ".join(DEVICES)]
    for width in _WIDTHS:
        counted = kernels(width)
        of_pair = [f"{each.passes * (each.of_pair + each.steps * each.of_step):.1f}" for each in counted.values()]
        shares = [f"{share_of_products(device, width, counted):.0%}" for device in DEVICES.values()]
        lines.append(f"{width}: {' and '.join(of_pair)}, {', '.join(shares)}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
