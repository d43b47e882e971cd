"""Peak memory of a call beyond what was resident before it, as the kernel counts it (Linux)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

# Freed blocks go back to the system at once, so that memory of an earlier call is never reused unseen.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
_RESET_PEAK = "5"


def peak_bytes(call: Callable[[], Any], refill: Callable[[int], None], repetitions: int = 2) -> int | None:
    """The largest growth of resident memory during a call, in bytes; None where the system can't tell.

    Counts every page that anyone touched: tensors, scratch memory of C++, stacks. Allocations that are never
    touched cost nothing and are not counted. Run it in a process started with `ENVIRONMENT`.
    """
    peaks = []
    for repetition in range(repetitions + 1):
        refill(repetition)
        if not _reset_peak():
            return None
        before = _status("VmRSS")
        call()
        peaks.append(_status("VmHWM") - before)
    # The first call also loads code and starts threads.
    return max(peaks[1:])


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
