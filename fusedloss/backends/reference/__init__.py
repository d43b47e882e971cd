"""The formulas in plain PyTorch: the specification, the oracle in float64, and what is used without a kernel."""

from __future__ import annotations


def unavailable_reason(device_type: str) -> str | None:
    """None: the formulas run on every device."""
    return None
