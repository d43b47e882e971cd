"""The loop: one head, one learning rate, batches gathered on the device, a checkpoint after every epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedloss.atomic_io import StorageError, json_line, write_json_lines
from fusedloss.calibration import fit_temperature
from fusedloss.metrics import class_scores, summary_scores
from fusedloss.temperature import SAMPLE_ROWS, TemperatureFit
from fusedloss.train.buffered_step import BufferedStep
from fusedloss.train.checkpoint import Checkpoint, flatten_optimizer, select_prefix, unflatten_optimizer, with_prefix
from fusedloss.train.data import TrainingData, ValidationData
from fusedloss.train.heads import Head, build_head
from fusedloss.train.objectives import build_objective
from fusedloss.train.order import RowOrder
from fusedloss.train.recipe import Recipe
from fusedloss.train.step import adamw, gradient_step, schedule

EVALUATION_ROWS = 8192


@dataclass
class Trained:
    """A finished training: the kept head, its epoch, and what each epoch measured."""

    lr: float
    head: Head
    temperature: Tensor | None
    epoch: int
    history: list[dict[str, Any]]
    diverged: bool = False

    def score(self, select: str) -> float:
        """Validation score of the kept epoch, larger is better; -inf for a training that diverged."""
        value = self.history[self.epoch - 1].get(f"val_{select}", math.nan) if self.epoch else math.nan
        value = -value if select == "nll" else value
        return -math.inf if self.diverged or math.isnan(value) else value


class Training:
    """The state of one training; ``run`` goes on from the checkpoint in ``folder`` if there is one.

    Equal recipe, data, device and number of threads give equal bits, whether or not the run was interrupted.
    """

    def __init__(
        self,
        recipe: Recipe,
        lr: float,
        data: TrainingData,
        validation: ValidationData | None,
        folder: Path | None = None,
    ) -> None:
        self.recipe, self.lr, self.data, self.validation, self.folder = recipe, lr, data, validation, folder
        self.checkpoint = Checkpoint(folder) if folder is not None else None
        self.device = data.features.device
        torch.manual_seed(recipe.seed)
        self.head = build_head(recipe, data.features.shape[1], len(data.counts)).to(self.device)
        self.objective = build_objective(recipe, data)
        self.auxiliary = self.objective.auxiliary or nn.Module()
        self.optimizer = adamw([self.head, self.objective.loss, self.auxiliary], recipe.weight_decay)
        self.order = RowOrder(data.labels, recipe.seed, recipe.balanced_batches)
        most = min(recipe.batch_size, len(data.labels))
        gradients = gradient_step(self.head, self.objective, most)
        self.step = BufferedStep(data.features, data.labels, gradients, self.optimizer, most, recipe.capture)
        self.epoch = self.steps = 0
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.best = Best()
        self.diverged = False

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.data.labels) / self.recipe.batch_size)

    def run(self, on_epoch: Callable[[dict[str, Any]], None] | None = None) -> Trained:
        """Train to the last epoch, writing a checkpoint and a line of ``metrics.jsonl`` after each."""
        if self.checkpoint is not None and self.checkpoint.exists():
            self._restore()
        for row in self.history:
            _report(on_epoch, row)
        while self.epoch < self.recipe.epochs and not self.diverged:
            started = time.perf_counter()
            loss = self._train_epoch()
            self.seconds += time.perf_counter() - started
            self.epoch += 1
            self.diverged = not math.isfinite(loss)
            row = self._measure(loss)
            self.history.append(row)
            self._note_best(row)
            self._save(row)
            _report(on_epoch, row)
        return self._finished()

    def _train_epoch(self) -> float:
        """One pass in a fresh order; the mean loss over rows, with one host synchronisation at its end."""
        self.head.train()
        self.objective.loss.train()
        self.objective.begin_epoch(self.epoch)
        self.step.total.zero_()
        for rows in self.order.epoch().split(self.recipe.batch_size):
            self.step(rows, self._rate(self.steps))
            self.steps += 1
        return float(self.step.total) / len(self.data.labels)

    def _rate(self, step: int) -> float:
        return self.lr * schedule(step, self.steps_per_epoch * self.recipe.epochs, self.recipe.warmup)

    def _measure(self, loss: float) -> dict[str, Any]:
        row = {
            "epoch": self.epoch,
            "step": self.steps,
            "lr": self._rate(self.steps - 1),
            "loss": loss,
        }
        if self.validation is not None and not self.diverged:
            row |= validation_scores(self.head, self.objective.temperature, self.validation, len(self.data.counts))
        return row | {"train_s": self.seconds, "ms_step": 1000 * self.seconds / self.steps}

    def _note_best(self, row: dict[str, Any]) -> None:
        value = row.get(f"val_{self.recipe.select}", math.nan)
        value = -value if self.recipe.select == "nll" else value
        if value > self.best.value:
            kept = self.recipe.keep == "best"
            tensors = {name: t.detach().clone() for name, t in self.head.state_dict().items()} if kept else {}
            self.best = Best(value, self.epoch, tensors)

    def _save(self, row: dict[str, Any]) -> None:
        if self.checkpoint is None or self.folder is None:
            return
        tensors = (
            with_prefix(self.head.state_dict(), "head.")
            | with_prefix(self.objective.loss.state_dict(), "loss.")
            | with_prefix(self.auxiliary.state_dict(), "auxiliary.")
            | flatten_optimizer(self.optimizer.state_dict())
            | with_prefix(self.best.tensors, "best.")
            | {"random.order": self.order.generator.get_state(), "random.cpu": torch.get_rng_state()}
        )
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        values = {
            "steps": self.steps,
            "seconds": self.seconds,
            "diverged": self.diverged,
            "history": self.history,
            "best": {"value": self.best.value, "epoch": self.best.epoch},
            "lr": self.lr,
            "device": self.device.type,
            "recipe": self.recipe.to_dict(),
        }
        self.checkpoint.save(self.epoch, tensors, values)
        path = self.folder / "metrics.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json_line(row))
        except OSError as error:
            raise StorageError(
                error.errno,
                f"{error.strerror}: {path} could not be written; the checkpoint of epoch {self.epoch} is complete",
            ) from error

    def _restore(self) -> None:
        assert self.checkpoint is not None and self.folder is not None
        tensors, values = self.checkpoint.load()
        before = values.get("device", self.device.type)
        if before != self.device.type:
            raise StorageError(
                f"device must be {before}, whose random state {self.folder} holds; got {self.device.type}"
            )
        self.head.load_state_dict(select_prefix(tensors, "head."))
        self.objective.loss.load_state_dict(select_prefix(tensors, "loss."))
        self.auxiliary.load_state_dict(select_prefix(tensors, "auxiliary."))
        state = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": unflatten_optimizer(tensors), "param_groups": state["param_groups"]})
        self.order.generator.set_state(tensors["random.order"])
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        self.epoch, self.steps, self.seconds = values["epoch"], values["steps"], values["seconds"]
        self.history, self.diverged = values["history"], values["diverged"]
        best = {name: tensor.to(self.device) for name, tensor in select_prefix(tensors, "best.").items()}
        self.best = Best(values["best"]["value"], values["best"]["epoch"], best)
        # A kill between the checkpoint and the line after it leaves the file one line short.
        write_json_lines(self.folder / "metrics.jsonl", self.history)

    def _finished(self) -> Trained:
        epoch = self.epoch
        if self.recipe.keep == "best" and self.best.tensors:
            self.head.load_state_dict(self.best.tensors)
            epoch = self.best.epoch
        return Trained(self.lr, self.head.eval(), self.objective.temperature, epoch, self.history, self.diverged)


@dataclass
class Best:
    """Best validation score so far (larger is better), its epoch, and the head when it is to be kept."""

    value: float = -math.inf
    epoch: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def head_logits(head: nn.Module, temperature: Tensor | None, features: Tensor) -> Tensor:
    """Inference logits ``(N, K)`` of prepared features: the head's, divided by the class temperatures."""
    logits: Tensor = head(features)
    return logits if temperature is None else logits / temperature


def logit_blocks(head: nn.Module, temperature: Tensor | None, data: ValidationData) -> Iterator[tuple[Tensor, Tensor]]:
    """Inference logits of all rows and their labels, in blocks."""
    for features, labels in zip(data.features.split(EVALUATION_ROWS), data.labels.split(EVALUATION_ROWS), strict=True):
        yield head_logits(head, temperature, features), labels


def temperature_of_head(head: nn.Module, temperature: Tensor | None, data: ValidationData) -> TemperatureFit:
    """The temperature of the validation rows: of a sample of them first, then in a pass or two over all."""
    start = None
    if len(data.labels) > 2 * SAMPLE_ROWS:
        rows = torch.arange(0, len(data.labels), -(-len(data.labels) // SAMPLE_ROWS), device=data.labels.device)
        sample = head_logits(head, temperature, data.features[rows])
        start = fit_temperature(sample, data.labels[rows]).temperature
    return fit_temperature(lambda: logit_blocks(head, temperature, data), start=start)


def validation_scores(
    head: nn.Module, temperature: Tensor | None, data: ValidationData, num_classes: int
) -> dict[str, float]:
    """The scores that choose between epochs and learning rates."""
    head.eval()
    predictions, nll = [], 0.0
    for logits, labels in logit_blocks(head, temperature, data):
        predictions.append(logits.argmax(1))
        nll += float(F.cross_entropy(logits, labels, reduction="sum"))
    target = data.labels.cpu().numpy()
    prediction = torch.cat(predictions).cpu().numpy()
    scores = summary_scores(class_scores(prediction, target, num_classes), data.background)
    return {
        "val_top1": float((prediction == target).mean()),
        "val_bal_acc": scores["bal_acc"],
        "val_macro_f1_fg": scores["macro_f1_fg"],
        "val_nll": nll / len(target),
    }


def _report(on_epoch: Callable[[dict[str, Any]], None] | None, row: dict[str, Any]) -> None:
    if on_epoch is not None:
        on_epoch(row)
