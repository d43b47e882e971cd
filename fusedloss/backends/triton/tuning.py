"""Tile sizes of each shape class by device, from tuning.json: what ``python -m bench.tune`` measured, or defaults.

Read once; nothing is tuned while a program runs. Defaults were chosen by registers and spills
(``python -m bench.resources``), never timed on a GPU.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("tuning.json")
DEFAULT = "default"

# Device: "tiles" by stem, type of the input and shape class, the fields of the stem's tile in ``launch``; "measured" by
# stem and type, when, on what and with which versions.
DEVICES: dict[str, dict[str, Any]] = json.loads(PATH.read_text())


@functools.cache
def device_key(device: torch.device) -> str:
    """The compute capability, as "sm_90"; the defaults' key for what has none."""
    if device.type != "cuda" or torch.version.hip is not None:
        return DEFAULT
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def entry(device: torch.device, stem: str, dtype: torch.dtype, shape_class: str) -> list[int]:
    """What the table of the device says of a shape class, or else the defaults."""
    name = str(dtype).removeprefix("torch.")
    own = DEVICES.get(device_key(device), {}).get("tiles", {})
    found: list[int] | None = own.get(stem, {}).get(name, {}).get(shape_class)
    if found is None:
        found = DEVICES[DEFAULT]["tiles"][stem][name][shape_class]
    return found
