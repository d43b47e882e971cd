"""Loading a kernel while a CUDA graph is captured."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import torch

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED, and HIP's


@contextlib.contextmanager
def loading(kernel: Any, device: torch.device) -> Iterator[None]:
    """Inside the block a kernel may be loaded though the current stream is being captured.

    A capture forbids its thread what might wait for the device, and loading might.

    Raises:
        RuntimeError: the kernel could not be loaded or launched during the capture; the message says what to do.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        yield
        return
    try:
        with _relaxed():
            yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{kernel.__name__} must have been launched once before a CUDA graph is captured: call the loss and its "
            "backward once with tensors of these shapes and types outside of torch.cuda.graph; got its first launch "
            "inside a capture"
        ) from error


@contextlib.contextmanager
def _relaxed() -> Iterator[None]:
    exchange = _exchange()
    mode = ctypes.c_int(_RELAXED)
    if exchange is None or exchange(ctypes.byref(mode)) != 0:
        yield
        return
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


def _exchange() -> Any:
    """The driver's function that sets a thread's capture mode and gives back the one before, where it can be had."""
    library, name = "libcuda.so.1", "cuThreadExchangeStreamCaptureMode"
    if torch.version.hip is not None:
        library, name = "libamdhip64.so", "hipThreadExchangeStreamCaptureMode"
    try:
        return getattr(ctypes.CDLL(library), name)
    except (OSError, AttributeError):
        return None
