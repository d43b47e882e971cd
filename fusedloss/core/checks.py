"""Checks of arguments that every layer shares."""

from __future__ import annotations

from torch import Tensor


def check_labels(labels: Tensor, num_classes: int, ignore_index: int, name: str = "labels") -> None:
    """IndexError naming the first row whose label is neither in [0, K) nor `ignore_index`; waits for the device."""
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= num_classes))
    if bad.any():
        row = int(bad.flatten().nonzero()[0])
        raise IndexError(
            f"{name}: got label {int(labels.flatten()[row])} at row {row}; "
            f"allowed are 0 to {num_classes - 1} and ignore_index={ignore_index}"
        )
