"""The text of fusedloss/backends/triton/tuning.json, one shape class per line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def text(devices: Mapping[str, Mapping[str, Any]]) -> str:
    """The file that holds these."""
    return _block(devices, 0) + "\n"


def _block(value: Any, depth: int) -> str:
    if not isinstance(value, Mapping):
        return json.dumps(value)
    if not value:
        return "{}"
    indent = "  " * (depth + 1)
    lines = [f"{indent}{json.dumps(key)}: {_block(each, depth + 1)}" for key, each in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{'  ' * depth}}}"
