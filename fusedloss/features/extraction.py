"""Computing features of a list of inputs with a backbone, into memory or into a bank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from fusedloss.features import checks
from fusedloss.features.backbone import Backbone
from fusedloss.features.bank import FeatureBank
from fusedloss.features.inputs import Inputs

# Rows that an interruption can cost, at most; rounded up to whole batches.
ROWS_PER_SYNC = 512
INPUTS = "Inputs, as read_inputs gives them"


class PreparedInputs(Dataset[Any]):
    """Loads and preprocesses one input: the part that worker processes do."""

    def __init__(self, inputs: Inputs, backbone: Backbone) -> None:
        self.inputs = inputs
        self.prepare = backbone.prepare

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, row: int) -> Any:
        return self.prepare(self.inputs.load(row))


def feature_batches(
    inputs: Inputs, backbone: Backbone, first_row: int, batch_size: int, workers: int, progress: bool
) -> Iterator[np.ndarray]:
    """Features of the rows from `first_row` on, batch by batch, float32 `(b, D)`."""
    check_extraction(inputs, backbone, batch_size, workers)
    loader = DataLoader(
        PreparedInputs(inputs, backbone),
        batch_size=batch_size,
        sampler=range(first_row, len(inputs)),
        collate_fn=backbone.collate,
        num_workers=workers,
    )
    with progress_bar(len(inputs), first_row, progress) as bar:
        for batch in loader:
            features = backbone.compute(batch).numpy()
            yield features
            bar.update(len(features))


def check_extraction(inputs: Inputs, backbone: Backbone, batch_size: int, workers: int) -> None:
    """Raise TypeError or ValueError for arguments that features cannot be computed from."""
    checks.check_instance("inputs", inputs, Inputs, INPUTS)
    checks.check_instance("backbone", backbone, Backbone, "a Backbone, as load_backbone gives it")
    checks.as_integer("batch_size", batch_size, 1)
    checks.as_integer("workers", workers, 0)
    if inputs.kind != backbone.kind:
        raise ValueError(f"inputs must be {backbone.kind}s for {backbone.source.backbone}; got {inputs.kind}s")


def compute_features(
    inputs: Inputs, backbone: Backbone, *, batch_size: int = 64, workers: int = 0, progress: bool = True
) -> np.ndarray:
    """Features `(N, D)` of all inputs, float32, in memory; for predictions on new inputs. Errors as `extract`."""
    batches = list(feature_batches(inputs, backbone, 0, batch_size, workers, progress))
    return np.concatenate(batches) if batches else np.empty((0, backbone.in_features), np.float32)


def extract(
    inputs: Inputs,
    backbone: Backbone,
    path: str | os.PathLike[str],
    *,
    dtype: str = "float16",
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = True,
) -> FeatureBank:
    """Compute the features of labelled inputs into a bank, going on where an interrupted call stopped.

    With the same batch size an interrupted extraction ends with the same bits as an uninterrupted one,
    because it stops and goes on between batches.

    Args:
        inputs: labelled, as `read_inputs` gives them.
        backbone: as `load_backbone` gives it; it reads what the inputs are, images or texts.
        path: the bank's folder, new or that of an interrupted extraction.
        dtype: how features are stored, ``"float16"`` or ``"float32"``.
        batch_size: inputs per forward pass.
        workers: processes that read and decode inputs; 0 for the main one.
        progress: show a progress bar on a terminal.

    Raises:
        BankError: a folder that was begun with other inputs or another backbone, or that is no bank.
        ValueError, TypeError: inputs without labels or of another kind than the backbone reads.
    """
    checks.check_instance("inputs", inputs, Inputs, INPUTS)
    if inputs.labels is None or inputs.class_names is None:
        raise ValueError("inputs must be labelled to become a bank; got no labels (read them with labelled=True)")
    check_extraction(inputs, backbone, batch_size, workers)
    with FeatureBank.create(
        path,
        len(inputs),
        backbone.in_features,
        labels=inputs.labels,
        class_names=inputs.class_names,
        dtype=dtype,
        source=backbone.source,
        groups=inputs.groups,
        paths=inputs.paths,
        inputs_sha256=inputs.sha256,
    ) as writer:
        waiting: list[np.ndarray] = []
        for features in feature_batches(inputs, backbone, writer.rows_done, batch_size, workers, progress):
            waiting.append(features)
            if sum(map(len, waiting)) >= ROWS_PER_SYNC:
                writer.append(np.concatenate(waiting))
                waiting = []
        if waiting:
            writer.append(np.concatenate(waiting))
        return writer.finish()


class SilentBar:
    """What a progress bar is when tqdm is not installed."""

    def __enter__(self) -> SilentBar:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, rows: int) -> None:
        """Shows nothing."""


def progress_bar(total: int, first_row: int, shown: bool) -> Any:
    """A bar over rows; disable=None is silent where stderr is not a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        return SilentBar()
    return tqdm(total=total, initial=first_row, unit="row", desc="features", disable=None if shown else True)
