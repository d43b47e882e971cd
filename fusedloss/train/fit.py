"""From a bank and a recipe to a trained, judged and stored head."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusedloss.features import FeatureBank
from fusedloss.features.checks import as_path, check_instance
from fusedloss.features.device import choose_device
from fusedloss.train.data import Prepared, ValidationData, prepare
from fusedloss.train.judge import Judgement, judge
from fusedloss.train.loop import Trained, Training, temperature_of_head
from fusedloss.train.objectives import checked_loss
from fusedloss.train.predictor import Predictor
from fusedloss.train.recipe import Recipe
from fusedloss.train.result import Result, cost_columns, data_columns, score_columns, settings_columns
from fusedloss.train.run_folder import RunFolder

OnEpoch = Callable[[float, dict[str, Any]], None]


class DivergedError(ValueError):
    """The training loss became NaN or infinite at every learning rate."""


def fit(
    bank: FeatureBank,
    recipe: Recipe,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    pictures: bool = True,
    on_epoch: OnEpoch | None = None,
) -> Result:
    """Train the head of a recipe on frozen features and judge it on held-out groups.

    With several learning rates each is trained on the training rows; the one with the best ``recipe.select``
    on the validation rows is kept as it is (no retraining on training and validation rows together), and the
    test rows are looked at once, for it alone. The global random state is left as it was.

    Args:
        bank: features, labels and, for a split that keeps them apart, groups.
        recipe: all settings.
        folder: run folder to write: config, metrics, checkpoints, head, predictions, pictures. None writes
            nothing.
        resume: go on with an interrupted run in ``folder``, to the same bits; a finished one is only read.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
        pictures: draw the pictures of the run folder (needs matplotlib).
        on_epoch: called with the learning rate and the metrics of each epoch.

    Raises:
        ValueError: a recipe or a bank that cannot be trained on.
        TypeError: arguments of another kind.
        StorageError: a folder that exists without ``resume``, belongs to another run, is written by another process,
            or cannot be written.
        DivergedError: a loss that is not finite at every learning rate.

    Example:
        >>> bank = FeatureBank.from_arrays(np.random.RandomState(0).randn(90, 4), np.arange(90) % 3)
        >>> len(fit(bank, Recipe(epochs=2, batch_size=32), device="cpu").history)
        2
    """
    run = Run(bank, recipe, folder=folder, resume=resume, device=device, pictures=pictures, on_epoch=on_epoch)
    try:
        scores = run.train()
        return run.finish(max(scores, key=scores.__getitem__))
    finally:
        run.close()


class Run:
    """A run in two steps, so that several can agree on a learning rate between them: ``train``, then
    ``finish``.

    ``prepared`` may be that of another run whose recipe differs in the seed alone. Arguments and errors as
    ``fit``.
    """

    def __init__(
        self,
        bank: FeatureBank,
        recipe: Recipe,
        *,
        folder: str | Path | None = None,
        resume: bool = False,
        device: str = "auto",
        pictures: bool = True,
        on_epoch: OnEpoch | None = None,
        prepared: Prepared | None = None,
    ) -> None:
        check_instance("bank", bank, FeatureBank, "a FeatureBank")
        check_instance("recipe", recipe, Recipe, "a Recipe")
        if on_epoch is not None and not callable(on_epoch):
            raise TypeError(f"on_epoch must be a function or None; got {type(on_epoch).__name__}")
        checked_loss(recipe.loss)
        self.bank, self.recipe, self.pictures, self.on_epoch = bank, recipe, pictures, on_epoch
        self.device = choose_device(device)
        self.folder = None if folder is None else RunFolder(as_path("folder", folder))
        self.prepared = prepared
        self.trained: list[Trained] = []
        finished = self.folder is not None and self.folder.begin(recipe, bank, resume)
        self.result = load_result(self.folder.path) if self.folder is not None and finished else None

    def close(self) -> None:
        """Let other processes write into the run folder."""
        if self.folder is not None:
            self.folder.release()

    def train(self) -> dict[float, float]:
        """Validation score of every learning rate, larger is better; a finished run only reads them."""
        if self.result is not None:
            return {trial["lr"]: _not_nan(trial[self.recipe.select]) for trial in self.result.trials}
        self.prepared = self.prepared or prepare(self.bank, self.recipe, self.device)
        self.trained = _train_each(self.recipe, self.prepared, self.folder, self.on_epoch)
        return {one.lr: one.score(self.recipe.select) for one in self.trained}

    def finish(self, lr: float) -> Result:
        """Judge the head of this learning rate on the test rows, and store it."""
        if self.result is not None:
            if self.result.lr == lr:
                return self.result
            # Another choice, with more runs to agree with: the trainings are read from checkpoints.
            self.result = None
            self.train()
        assert self.prepared is not None
        chosen = next(one for one in self.trained if one.lr == lr)
        if chosen.diverged:
            rates = ", ".join(f"{rate:g}" for rate in self.recipe.lr)
            raise DivergedError(f"lr must be lower for this bank; got a loss that is not finite at lr {rates}")
        predictor = self._predictor(self.prepared, chosen)
        split = self.prepared.split
        judged = judge(predictor, self.bank.features, split.test, np.asarray(self.bank.labels)[split.test])
        self.result = self._judge(chosen, predictor, judged)
        if self.folder is not None:
            self.folder.finish(self.result, split, judged, self.bank, self.pictures)
        return self.result

    def _predictor(self, prepared: Prepared, chosen: Trained) -> Predictor:
        return Predictor(
            recipe=self.recipe,
            transform=prepared.transform,
            head=chosen.head,
            temperature=chosen.temperature,
            class_names=list(self.bank.class_names),
            train_counts=prepared.training.counts.tolist(),
            lr=chosen.lr,
            epoch=chosen.epoch,
            calibration=_calibration(chosen, prepared.validation),
            source=self.bank.manifest.source,
        )

    def _judge(self, chosen: Trained, predictor: Predictor, judged: Judgement) -> Result:
        """The scores of the test rows, and the row of tables."""
        assert self.prepared is not None
        recipe = self.recipe
        report = judged.report
        row = (
            data_columns(self.bank, self.prepared.split, predictor.train_counts, report)
            | settings_columns(recipe, chosen.lr)
            | {"params": sum(p.numel() for p in predictor.head.parameters())}
            | score_columns(predictor, report, judged.scaled_ece)
            | cost_columns(predictor, chosen.history[-1])
        )
        trials = [
            {"lr": t.lr, "epoch": t.epoch, recipe.select: t.score(recipe.select), "diverged": t.diverged}
            for t in self.trained
        ]
        path = self.folder.path if self.folder else None
        return Result(recipe, predictor, chosen.lr, report, row, chosen.history, trials, path)


def _not_nan(score: float) -> float:
    return -math.inf if math.isnan(score) else score


def load_result(folder: str | Path) -> Result:
    """The finished run of a folder.

    Raises:
        StorageError: a folder without a finished run.
    """
    run = RunFolder(as_path("folder", folder))
    values, predictor = run.result(), Predictor.load(folder)
    return Result(
        predictor.recipe,
        predictor,
        predictor.lr,
        values["report"],
        values["row"],
        run.history(),
        values["trials"],
        run.path,
    )


def _train_each(
    recipe: Recipe, prepared: Prepared, folder: RunFolder | None, on_epoch: OnEpoch | None
) -> list[Trained]:
    device = prepared.training.features.device
    trained = []
    for lr in recipe.lr:
        trial = None if folder is None else folder.trial(lr, alone=len(recipe.lr) == 1)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            one = Training(recipe, lr, prepared.training, prepared.validation, trial)
            trained.append(one.run(None if on_epoch is None else functools.partial(on_epoch, lr)))
    return trained


def _calibration(chosen: Trained, validation: ValidationData | None) -> dict[str, Any] | None:
    if validation is None:
        return None
    return dataclasses.asdict(temperature_of_head(chosen.head, chosen.temperature, validation))
