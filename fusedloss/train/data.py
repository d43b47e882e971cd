"""From a feature bank to prepared rows on the device."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedloss.features import FeatureBank
from fusedloss.longtail import class_counts
from fusedloss.train.heads import FeatureTransform, build_transform
from fusedloss.train.recipe import Recipe
from fusedloss.train.split import Split, split_rows

CHUNK_ROWS = 8192
BACKGROUND_PREFIX = "__bg_"


@dataclass(frozen=True)
class TrainingData:
    """Prepared rows on the device: features ``(N, D)``, labels ``(N,)``, counts per class ``(K,)``."""

    features: Tensor
    labels: Tensor
    counts: Tensor


@dataclass(frozen=True)
class ValidationData:
    """Prepared validation rows on the device, and which classes are background ``(K,)``."""

    features: Tensor
    labels: Tensor
    background: np.ndarray


class Prepared(NamedTuple):
    """All that a training needs of a bank; it does not depend on the recipe's seed."""

    split: Split
    training: TrainingData
    validation: ValidationData | None
    transform: FeatureTransform


def prepare(bank: FeatureBank, recipe: Recipe, device: torch.device) -> Prepared:
    """Split the rows, fit the preparation on the training rows, and keep training and validation rows on the
    device.

    Raises:
        ValueError: no training row.
    """
    split = split_rows(
        bank.labels, bank.groups, test_fraction=recipe.test_fraction, val_fraction=recipe.val_fraction,
        seed=recipe.split_seed,
    )  # fmt: skip
    if len(split.train) == 0:
        raise ValueError("bank must have rows to train on after the split; got none")
    transform = build_transform(recipe, bank.in_features).to(device)
    raw = gather(bank.features, split.train, device)
    if recipe.standardize:
        transform.standardize_by(raw)
    counts = class_counts(torch.as_tensor(np.asarray(bank.labels)[split.train]), bank.num_classes)
    _warn_of_absent_classes(counts, list(bank.class_names))
    kept = _transformed(transform, raw).to(getattr(torch, recipe.precision))
    training = TrainingData(kept, _labels(bank, split.train, device), counts.to(device))
    if len(split.val) == 0:
        return Prepared(split, training, None, transform)
    background = np.array([name.startswith(BACKGROUND_PREFIX) for name in bank.class_names])
    features = _transformed(transform, gather(bank.features, split.val, device))
    validation = ValidationData(features, _labels(bank, split.val, device), background)
    return Prepared(split, training, validation, transform)


def gather(features: Any, rows: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Rows of a memory-mapped array as one float32 tensor, read in chunks."""
    result = torch.empty(len(rows), features.shape[1], device=device)
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = np.asarray(features[rows[start : start + CHUNK_ROWS]], dtype=np.float32)
        result[start : start + len(chunk)] = torch.from_numpy(chunk)
    return result


def _transformed(transform: FeatureTransform, raw: Tensor) -> Tensor:
    for start in range(0, len(raw), CHUNK_ROWS):
        raw[start : start + CHUNK_ROWS] = transform(raw[start : start + CHUNK_ROWS])
    return raw


def _labels(bank: FeatureBank, rows: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.asarray(bank.labels)[rows].astype(np.int64)).to(device)


def _warn_of_absent_classes(counts: Tensor, class_names: list[str]) -> None:
    absent = (counts == 0).nonzero()[:, 0].tolist()
    if absent:
        shown = ", ".join(class_names[k] for k in absent[:10]) + (", ..." if len(absent) > 10 else "")
        warnings.warn(
            f"{len(absent)} of {len(class_names)} classes have no sample in the training split and cannot "
            f"be predicted: {shown}",
            UserWarning,
            stacklevel=4,
        )
