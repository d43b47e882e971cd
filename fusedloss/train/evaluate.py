"""A stored head judged on a bank."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusedloss.features import FeatureBank
from fusedloss.features.checks import as_path, check_choice, check_instance
from fusedloss.features.device import choose_device
from fusedloss.retrieval import retrieval_report
from fusedloss.train.judge import judge
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
    # The temperature that divided the logits, and the strength of the prior taken from them
    temperature: float | None = None
    adjust_prior: float = 0.0
    # Why retrieval was asked for and is not in the report
    retrieval_error: str | None = None
    # The run's own bank is not as it was: rows that the head was trained on may be among the judged
    changed: bool = False

    def changes(self) -> str:
        """How the logits were changed before they were judged, in words."""
        calibrated = "not calibrated" if self.temperature is None else f"calibrated (T = {self.temperature:.4g})"
        prior = f", prior adjusted by {self.adjust_prior:g}" if self.adjust_prior else ", prior not adjusted"
        return calibrated + prior


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
    of the features that the last layer sees, under ``report["retrieval"]``, or ``retrieval_error`` says why not.

    Raises:
        ValueError, TypeError: a bank of another backbone, width or classes, or parts of a split that the bank
            does not have; the run's own bank, changed since; a prior applied twice.
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
    changed = not own and _same_folder(bank, recorded["folder"])
    if changed and rows != "all":
        raise ValueError(
            f"bank must be as it was when {folder} was trained on it, for its test rows to be known; got "
            f"{bank.folder}, changed since (rows='all' judges every row it has now, training rows among them)"
        )
    if rows == "auto":
        rows = "test" if own else "all"
    if rows != "all" and not own:
        raise ValueError(f"rows must be all or auto for a bank that the run was not trained on; got {rows!r}")
    chosen = np.arange(len(bank)) if rows == "all" else _part(Recipe.from_dict(config["recipe"]), bank, rows)
    labels = np.asarray(bank.labels)[chosen]
    judged = judge(predictor, bank.features, chosen, labels, calibrated=calibrated, adjust_prior=adjust_prior)
    report, failure = judged.report, None
    if retrieval:
        try:
            report["retrieval"] = retrieval_report(predictor.embeddings(bank.features, chosen), torch.as_tensor(labels))
        except (ValueError, ImportError) as error:
            failure = str(error)
    where = str(bank.folder or "arrays in memory")
    temperature = predictor.fitted_temperature if calibrated else None
    return Evaluation(where, rows, len(chosen), report, temperature, adjust_prior, failure, changed)


def _same_folder(bank: FeatureBank, folder: str | None) -> bool:
    return bank.folder is not None and folder is not None and os.path.abspath(bank.folder) == folder


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
