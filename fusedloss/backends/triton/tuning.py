"""Tile sizes of each shape class by device, from tuning.json: what ``python -m bench.tune`` measured, or defaults.

Read once; nothing is tuned while a program runs. Defaults were chosen by registers and spills
(``python -m bench.resources``), never timed on a GPU, and take at most SHARED bytes of shared memory, so that they fit
every GPU of compute capability 8.0 or higher; see ``tiles.fitted`` for what happens where they don't.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("tuning.json")
DEFAULT = "default"
SHARED = 99 * 1024  # what a program may have on sm_86, sm_89 and sm_120

# Device: "tiles" by stem, type of the input and shape class, the fields of the stem's tile in ``launch``; "measured" by
# stem and type, when, on what and with which versions.
DEVICES: dict[str, dict[str, Any]] = json.loads(PATH.read_text())


@functools.cache
def device_key(device: torch.device) -> str:
    """The compute capability, as "sm_90", or AMD's "gfx942"; the defaults' key for what has neither."""
    if device.type != "cuda":
        return DEFAULT
    if torch.version.hip is not None:
        # What follows a colon are settings of memory.
        architecture: str = torch.cuda.get_device_properties(device).gcnArchName
        return architecture.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def entry(device: torch.device, stem: str, dtype: torch.dtype, shape_class: str) -> list[int]:
    """What the table of the device says of a shape class, or else the defaults."""
    name = _name(dtype)
    own = DEVICES.get(device_key(device))
    if own is not None:
        found: list[int] | None = own["tiles"].get(stem, {}).get(name, {}).get(shape_class)
        if found is not None:
            return found
    default: list[int] = DEVICES[DEFAULT]["tiles"][stem][name][shape_class]
    return default


@functools.cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
