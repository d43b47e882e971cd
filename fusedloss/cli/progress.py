"""What the training commands show: a progress bar over epochs, and the scores of a run."""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType
from typing import Any

from fusedloss.train.result import Result

SCORES = (
    ("top1", "top-1"),
    ("top5", "top-5"),
    ("macro_f1_fg", "macro F1"),
    ("weighted_f1_fg", "weighted F1"),
    ("bal_acc", "balanced accuracy"),
    ("rec_many", "recall, many (>100)"),
    ("rec_med", "recall, medium (21-100)"),
    ("rec_few", "recall, few (<=20)"),
    ("ece15", "ECE (15 bins)"),
    ("nll", "nll (nats)"),
)


class EpochBar:
    """A bar that counts epochs and shows the latest loss and validation score."""

    def __init__(self, epochs: int, shown: bool) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=epochs, unit="epoch", disable=None if shown else True, dynamic_ncols=True)

    def __enter__(self) -> EpochBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def advance(self, label: str, row: dict[str, Any]) -> None:
        score = row.get("val_macro_f1_fg", math.nan)
        shown = "" if math.isnan(score) else f"  val macro F1 {score:.3f}"
        self.bar.set_description(f"{label}  loss {row['loss']:.3f}{shown}", refresh=False)
        self.bar.update()


def print_result(result: Result) -> None:
    """The scores on the test rows, the learning rates tried, and where the files are."""
    if len(result.trials) > 1:
        select = result.recipe.select
        tried = ", ".join(f"{trial['lr']:g}: {trial[select]:.4f}" for trial in result.trials)
        print(f"lr {result.lr:g} chosen by validation {select} ({tried}); kept as trained, not retrained")
    row, epoch = result.row, result.predictor.epoch
    print(f"{row['n_train']} rows trained on, {row['n_test']} tested, epoch {epoch} kept")
    print_scores(result.report)
    if result.folder is not None:
        print(f"run folder: {result.folder}")
        for picture in sorted(Path(result.folder).glob("*.png")):
            print(f"picture: {picture}")


def print_scores(report: dict[str, Any]) -> None:
    """One line per score of a classification report."""
    for name, label in SCORES:
        if not math.isnan(report[name]):
            classes = f"  ({report['k_' + name[4:]]} classes)" if name.startswith("rec_") else ""
            print(f"  {label:<24} {report[name]:.4f}{classes}")
