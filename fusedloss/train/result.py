"""What a finished run is: the head, its scores, and the flat row that tables are made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import fusedloss
from fusedloss.features import FeatureBank
from fusedloss.train.predictor import Predictor
from fusedloss.train.recipe import Recipe
from fusedloss.train.split import Split


@dataclass
class Result:
    """A finished run: the head, its scores on the test rows, and how it came about.

    ``report`` is ``metrics.classification_report`` of the test rows; ``row`` is the flat line that tables are
    made of; ``trials`` lists each learning rate with its validation score; ``history`` has one entry per
    epoch.
    """

    recipe: Recipe
    predictor: Predictor
    lr: float
    report: dict[str, Any]
    row: dict[str, Any]
    history: list[dict[str, Any]]
    trials: list[dict[str, Any]]
    folder: Path | None = None


def data_columns(bank: FeatureBank, split: Split, train_counts: list[int], report: dict[str, Any]) -> dict[str, Any]:
    """What a run was trained and tested on."""
    present = [count for count in train_counts if count > 0]
    return {
        "n_train": len(split.train),
        "n_val": len(split.val),
        "n_test": len(split.test),
        "n_groups": len(bank) if bank.groups is None else len(np.unique(bank.groups)),
        "K": bank.num_classes,
        "K_test": sum(row["support"] > 0 for row in report["per_class"]),
        "imbalance": float(max(present) / min(present)),
        "backbone": bank.manifest.source.backbone,
        "dim": bank.in_features,
    }


def settings_columns(recipe: Recipe, lr: float) -> dict[str, Any]:
    """The settings that tables show."""
    return {
        "head": recipe.head,
        "loss": recipe.loss,
        "class_weight": recipe.class_weights,
        "ls": recipe.label_smoothing,
        "la_tau": recipe.added_prior,
        "seed": recipe.seed,
        "split_seed": recipe.split_seed,
        "epochs": recipe.epochs,
        "batch": recipe.batch_size,
        "lr": lr,
        "wd": recipe.weight_decay,
    }


def score_columns(predictor: Predictor, report: dict[str, Any], scaled_ece: float) -> dict[str, Any]:
    """Scores on the test rows, and the calibration error at the temperature of the validation rows."""
    scores = {name: value for name, value in report.items() if name not in ("per_class", "n")}
    return scores | {"T": predictor.fitted_temperature, "ece15_ts": scaled_ece}


def cost_columns(predictor: Predictor, last_epoch: dict[str, Any]) -> dict[str, Any]:
    """What the run took, and where."""
    return {
        "train_s": last_epoch["train_s"],
        "ms_step": last_epoch["ms_step"],
        "device": str(predictor.transform.mean.device),
        "version": fusedloss.__version__,
        "status": "done",
    }
