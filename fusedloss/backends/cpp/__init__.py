"""The C++ kernels in ``fusedloss._C``: CPU tensors."""

from __future__ import annotations

from typing import Any

extension: Any
load_error: str | None
try:
    import torch  # noqa: F401  (first: its OpenMP runtime is then the one that the kernels share)

    from fusedloss import _C

    extension, load_error = _C, None
except ImportError as error:
    extension, load_error = None, str(error)


def unavailable_reason(device_type: str) -> str | None:
    """Why these kernels can't serve `device_type`, or None."""
    if device_type != "cpu":
        return "the C++ kernels take CPU tensors only"
    if extension is None:
        return f"the compiled module did not load: {load_error}"
    return None
