"""A bank's frozen features, split by group and standardized, for scripts that train something small on them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedloss.features import FeatureBank
from fusedloss.train.data import gather
from fusedloss.train.heads import FeatureTransform
from fusedloss.train.split import split_rows


class Frozen(NamedTuple):
    """Rows to train on, and rows of other groups."""

    features: Tensor
    labels: Tensor
    test_features: Tensor
    test_labels: Tensor


def frozen(bank: FeatureBank) -> Frozen:
    """The bank's rows, a fifth of the groups for the test."""
    split = split_rows(bank.labels, bank.groups, test_fraction=0.2, val_fraction=0.0, seed=42)
    labels = torch.as_tensor(bank.labels[:].astype("int64"))
    transform = FeatureTransform(bank.in_features, normalize=False)
    features = gather(bank.features, split.train)
    transform.standardize_by(features)
    test_features = transform(gather(bank.features, split.test))
    return Frozen(transform(features), labels[split.train], test_features, labels[split.test])


def apart(curve: Tensor, other: Tensor) -> float:
    """The largest relative difference of the losses of a step."""
    return float(((curve - other) / other).abs().max())
