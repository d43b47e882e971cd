"""A run on disk: its settings, how far it is, and its results."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fusedloss
from fusedloss.atomic_io import StorageError, read_json, write_bytes, write_json, write_json_lines
from fusedloss.features import FeatureBank
from fusedloss.folder_lock import LOCK_FILE, FolderLock
from fusedloss.train.bootstrap import Predictions
from fusedloss.train.data import BACKGROUND_PREFIX
from fusedloss.train.judge import Judgement
from fusedloss.train.pictures import draw_recall_by_frequency, draw_reliability, draw_training_curves
from fusedloss.train.recipe import Recipe
from fusedloss.train.result import Result
from fusedloss.train.split import Split

CONFIG, RESULT, METRICS, PREDICTIONS = "config.json", "result.json", "metrics.jsonl", "predictions.npz"


class RunFolder:
    """The files of one run; ``result.json`` is written last and marks the run as finished."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = FolderLock(path)

    def begin(self, recipe: Recipe, bank: FeatureBank, resume: bool) -> bool:
        """Claim the folder for this run until ``release``; True when the run is already finished.

        Raises:
            StorageError: files of another recipe, another bank, or of any run without ``resume``; another process
                that writes there.
        """
        if not (self.path / CONFIG).exists():
            self._refuse_other_files()
        self.lock.acquire()
        try:
            return self._begin(recipe, bank, resume)
        except BaseException:
            self.lock.release()
            raise

    def release(self) -> None:
        """Let other processes write here."""
        self.lock.release()

    def _refuse_other_files(self) -> None:
        if self._holds_something():
            raise StorageError(f"folder must be a run folder, new or empty; got {self.path}, which holds other files")

    def _begin(self, recipe: Recipe, bank: FeatureBank, resume: bool) -> bool:
        config = self.path / CONFIG
        if not config.exists():
            self._refuse_other_files()
            description = {
                "rows": len(bank),
                "in_features": bank.in_features,
                "num_classes": bank.num_classes,
                "folder": None if bank.folder is None else os.path.abspath(bank.folder),
                "fingerprint": bank.fingerprint(),
            }
            write_json(
                config,
                {
                    "format": 1,
                    "recipe": recipe.to_dict(),
                    "bank": description,
                    "versions": {"fusedloss": fusedloss.__version__, "torch": torch.__version__},
                },
            )
            return False
        if not resume:
            raise StorageError(f"folder must be new, or its run resumed; got {self.path}, which holds a run")
        self._refuse_another(self.config(), recipe, bank)
        return (self.path / RESULT).exists()

    def trial(self, lr: float, alone: bool) -> Path:
        """Folder for the checkpoint of one learning rate: the run folder itself where there is only one."""
        folder = self.path if alone else self.path / "trials" / f"lr-{lr:g}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finish(self, result: Result, split: Split, judged: Judgement, bank: FeatureBank, pictures: bool) -> None:
        """Write head, metrics, predictions and pictures, then the result."""
        result.predictor.save(self.path)
        write_json_lines(self.path / METRICS, result.history)
        groups = split.test if bank.groups is None else np.asarray(bank.groups)[split.test]
        self._write_predictions(split, judged, groups)
        if pictures:
            self._draw(result, judged)
        write_json(self.path / RESULT, {"row": result.row, "report": result.report, "trials": result.trials})

    def result(self) -> dict[str, Any]:
        """``row``, ``report`` and ``trials`` of a finished run, null scores as NaN."""
        if not (self.path / RESULT).exists():
            raise StorageError(f"folder must hold a finished run; got {self.path}, which has no {RESULT}")
        values = _with_nan(read_json(self.path / RESULT))
        if not isinstance(values, dict) or not {"row", "report", "trials"} <= values.keys():
            raise StorageError(f"{self.path / RESULT} must hold row, report and trials of a run; got other content")
        return values

    def predictions(self) -> Predictions:
        """What the run said of each test row.

        Raises:
            StorageError: no such file, or one of an older version, without groups.
        """
        path = self.path / PREDICTIONS
        try:
            with np.load(path) as archive:
                stored = dict(archive)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise StorageError(f"{path} cannot be read: {error}") from error
        if "group" not in stored:
            raise StorageError(f"{path} holds no groups of its rows (written by an older version)")
        per_class = self.result()["report"]["per_class"]
        return Predictions(
            row=stored["row"],
            label=stored["label"],
            group=stored["group"],
            predicted=stored["predicted"],
            among_five=(stored["top_class"] == stored["label"][:, None]).any(1),
            confidence=stored["top_probability"][:, 0],
            calibrated_confidence=stored["calibrated_confidence"],
            label_nll=stored["label_nll"],
            train_counts=np.array([entry["train_count"] for entry in per_class]),
            foreground=np.array([not entry["name"].startswith(BACKGROUND_PREFIX) for entry in per_class]),
        )

    def history(self) -> list[dict[str, Any]]:
        """The metrics of each epoch of the kept training."""
        path = self.path / METRICS
        try:
            return [_with_nan(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise StorageError(error.errno, f"{error.strerror}: {path}") from error
        except ValueError as error:
            raise StorageError(f"{path} is not JSON in every line: {error}") from error

    def config(self) -> dict[str, Any]:
        """The settings of the run, and the bank that it is on."""
        config = self.path / CONFIG
        if not config.exists():
            raise StorageError(f"folder must be a run folder; got {self.path}, which has no {CONFIG}")
        return _checked_config(config, read_json(config))

    def clear(self) -> None:
        """Remove the run; only a folder that holds one, or nothing, is removed."""
        if not self.path.exists():
            return
        if self._holds_something():
            self.config()
        with self.lock:
            for entry in self.path.iterdir():
                if entry.name == LOCK_FILE:
                    continue
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        # Another process may have begun a run there meanwhile.
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def _holds_something(self) -> bool:
        # A kill during the very first write leaves its unfinished file alone in the folder.
        return self.path.is_dir() and any(path.name not in (f"{CONFIG}.tmp", LOCK_FILE) for path in self.path.iterdir())

    def _refuse_another(self, config: dict[str, Any], recipe: Recipe, bank: FeatureBank) -> None:
        now = recipe.to_dict()
        before = Recipe.from_dict(config["recipe"]).to_dict()
        changed = [f"{name} was {before[name]} and is now {now[name]}" for name in now if now[name] != before[name]]
        if changed:
            raise StorageError(
                f"folder must hold a run of the same recipe; got {self.path}, where {'; '.join(changed)}"
            )
        if config["bank"]["fingerprint"] != bank.fingerprint():
            raise StorageError(
                f"folder must hold a run on the same bank; got {self.path}, on another bank (features, labels, groups "
                "or names differ)"
            )

    def _write_predictions(self, split: Split, judged: Judgement, groups: np.ndarray) -> None:
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {
            "row": split.test,
            "label": judged.labels,
            "predicted": judged.predicted,
            "top_class": judged.top_class,
            "top_probability": judged.top_probability,
            "train_rows": split.train,
            "val_rows": split.val,
            # Without groups a row is one.
            "group": groups,
            "label_nll": judged.label_nll,
            "calibrated_confidence": judged.calibrated_confidence,
        }
        np.savez_compressed(buffer, **arrays)
        write_bytes(self.path / PREDICTIONS, buffer.getvalue())

    def _draw(self, result: Result, judged: Judgement) -> None:
        draw_training_curves(self.path / "training_curves.png", result.history)
        if len(judged.labels):
            draw_reliability(self.path / "reliability.png", judged.confidence, judged.correct, result.report["ece15"])
            draw_recall_by_frequency(self.path / "recall_by_frequency.png", result.report)


def _checked_config(path: Path, values: Any) -> dict[str, Any]:
    bank = values.get("bank") if isinstance(values, dict) else None
    if not isinstance(bank, dict) or not {"folder", "fingerprint"} <= bank.keys() or "recipe" not in values:
        raise StorageError(f"{path} must hold the recipe and the bank of a run; got other content")
    return dict(values)


def _with_nan(value: Any) -> Any:
    """JSON's null back to NaN, where a number was not defined."""
    if isinstance(value, dict):
        return {key: entry if key in ("train_count", "backbone") else _with_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_nan(entry) for entry in value]
    return float("nan") if value is None else value
