"""Checks of the feature rows and labels that statistics take in."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusedloss.core.checks import check_integer_tensor, check_tensor
from fusedloss.core.dtypes import FLOATING, LABELS


def check_feature_rows(features: Any, width: int | str = "D", state: Tensor | None = None) -> None:
    """Raises unless features are rows ``(B, width)`` on the device of `state`."""
    check_tensor("features", features, ("B", width), like=state, of="the statistics")
    if features.dtype not in FLOATING:
        raise TypeError(f"features must be float32, float64, bfloat16 or float16; got {features.dtype}")


def check_row_labels(labels: Any, features: Tensor) -> None:
    """Raises unless there is a label for each row of features (or value of ``(B,)``), on their device."""
    check_integer_tensor("labels", labels, (features.shape[0],))
    if labels.dtype not in LABELS:
        raise TypeError(f"labels must be int64, int32 or uint8; got {labels.dtype}")
    if labels.device != features.device:
        raise ValueError(f"labels must be on the device of features, {features.device}; got {labels.device}")
