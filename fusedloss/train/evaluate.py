"""A stored head judged on a bank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusedloss.features import FeatureBank
from fusedloss.features.checks import as_path, check_choice, check_instance
from fusedloss.features.device import choose_device
from fusedloss.metrics import classification_report
from fusedloss.retrieval import retrieval_report
from fusedloss.train.data import gather
from fusedloss.train.predictor import Predictor
from fusedloss.train.recipe import Recipe
from fusedloss.train.run_folder import RunFolder
from fusedloss.train.split import split_rows

ROWS = ("auto", "test", "val", "train", "all")


@dataclass(frozen=True)
class Evaluation:
    """A ``metrics.classification_report`` and what it is of."""

    bank: str
    rows: str
    num_rows: int
    report: dict[str, Any]


def evaluate_run(
    folder: str | Path,
    bank: FeatureBank | None = None,
    *,
    rows: str = "auto",
    calibrated: bool = False,
    adjust_prior: float = 0.0,
    retrieval: bool = False,
    device: str = "auto",
) -> Evaluation:
    """Judge the head of a run folder on rows of its own bank, or on all rows of another.

    ``calibrated`` and ``adjust_prior`` as in ``Predictor.logits``; ``retrieval`` adds what ``retrieval_report`` says
    of the features that the last layer sees, under ``report["retrieval"]``.

    Raises:
        ValueError, TypeError: a bank of another backbone, width or classes, or parts of a split that the bank
            does not have; a prior applied twice.
        StorageError: no finished run in the folder.
    """
    check_choice("rows", rows, ROWS)
    folder = as_path("folder", folder)
    predictor = Predictor.load(folder).to(choose_device(device))
    config = RunFolder(folder).config()
    recorded = config["bank"]
    if bank is None:
        if recorded["folder"] is None:
            raise ValueError(f"bank must be a FeatureBank, since {folder} was trained on arrays in memory; got None")
        bank = FeatureBank.open(recorded["folder"])
    check_bank(predictor, bank)
    own = bank.fingerprint() == recorded["fingerprint"]
    if rows == "auto":
        rows = "test" if own else "all"
    if rows != "all" and not own:
        raise ValueError(f"rows must be all or auto for a bank that the run was not trained on; got {rows!r}")
    chosen = np.arange(len(bank)) if rows == "all" else _part(Recipe.from_dict(config["recipe"]), bank, rows)
    features, labels = gather(bank.features, chosen), np.asarray(bank.labels)[chosen]
    logits = predictor.logits(features, calibrated, adjust_prior)
    report = classification_report(logits, labels, predictor.class_names, train_counts=predictor.train_counts)
    if retrieval:
        report["retrieval"] = retrieval_report(predictor.embeddings(features), torch.as_tensor(labels))
    return Evaluation(str(bank.folder or "arrays in memory"), rows, len(chosen), report)


def check_bank(predictor: Predictor, bank: FeatureBank, labelled: bool = True) -> None:
    """Refuse features of another width or backbone, and, where labels count, of other classes.

    Raises:
        ValueError, TypeError: naming what differs.
    """
    check_instance("bank", bank, FeatureBank, "a FeatureBank")
    if bank.in_features != predictor.in_features:
        raise ValueError(
            f"bank must have features of width {predictor.in_features}, as the head was trained on; "
            f"got width {bank.in_features}"
        )
    bank.require_source(predictor.source)
    if labelled and list(bank.class_names) != predictor.class_names:
        other = sorted(set(bank.class_names) ^ set(predictor.class_names))
        what = f"for example {', '.join(other[:3])}" if other else "in another order"
        raise ValueError(
            f"bank must have the {len(predictor.class_names)} classes of the head; got {bank.num_classes}, {what}"
        )


def _part(recipe: Recipe, bank: FeatureBank, rows: str) -> np.ndarray:
    split = split_rows(
        bank.labels,
        bank.groups,
        test_fraction=recipe.test_fraction,
        val_fraction=recipe.val_fraction,
        seed=recipe.split_seed,
    )
    part: np.ndarray = getattr(split, rows)
    if len(part) == 0:
        raise ValueError(f"rows must be a part of the split that has rows; got {rows!r}, which is empty")
    return part
