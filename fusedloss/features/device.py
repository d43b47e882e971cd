"""The device that a name on the command line stands for."""

from __future__ import annotations

import torch


def choose_device(name: str) -> torch.device:
    """The device of a name, ``"auto"`` being a GPU where torch sees one.

    Raises:
        TypeError, ValueError: anything that does not name a device which is there.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    if not isinstance(name, str | torch.device):
        raise TypeError(f"device must be auto, cpu, cuda or cuda:N; got {type(name).__name__}")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}") from error
    if device.type == "meta":
        raise ValueError("device must be auto, cpu, cuda or cuda:N; got 'meta', which holds no values")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be auto or cpu, since torch sees no GPU; got {str(name)!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be below cuda:{torch.cuda.device_count()}; got {str(name)!r}")
    return device
