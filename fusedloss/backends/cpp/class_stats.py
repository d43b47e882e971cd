"""class_stats on the CPU: outputs allocated here, filled by csrc/class_stats.inl."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedloss.backends.cpp import extension
from fusedloss.backends.cpp.views import rows_view


def class_stats(
    features: Tensor, labels: Tensor, shift: Tensor, seen: Tensor, ignore_index: int, per_feature: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if features.stride(1) != 1 and features.shape[1] > 1:
        features = features.contiguous()
    labels = labels.contiguous()
    num_classes = len(shift)
    count = torch.empty_like(seen)
    total = torch.empty_like(shift)
    square = torch.empty_like(shift) if per_feature else shift.new_empty(num_classes)
    extension.class_stats(
        rows_view(features),
        (labels.data_ptr(), ignore_index),
        num_classes,
        per_feature,
        (shift.data_ptr(), seen.data_ptr()),
        (count.data_ptr(), total.data_ptr(), square.data_ptr()),
        torch.get_num_threads(),
    )
    return count, total, square
