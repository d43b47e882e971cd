"""A trained head with all it takes to predict: preparation, temperatures, names, and its origin."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusedloss.features import FeatureSource
from fusedloss.longtail import adjust_logits, log_prior
from fusedloss.train.heads import FeatureTransform, build_head, build_transform
from fusedloss.train.loop import head_logits
from fusedloss.train.recipe import Recipe
from fusedloss.train.storage import (
    StorageError,
    read_json,
    read_tensors,
    select_prefix,
    with_prefix,
    write_json,
    write_tensors,
)

TENSORS, DESCRIPTION = "head.safetensors", "head.json"
CHUNK_ROWS = 8192


@dataclass
class Predictor:
    """Class probabilities for rows of features as the bank held them.

    ``prior`` says whether a class prior was added while training; if so the logits are right as they are, and
    a post-hoc adjustment would apply it twice. ``calibration`` is the temperature fitted on the validation
    rows; ``source`` says which backbone, weights and preprocessing the features came from.
    """

    recipe: Recipe
    transform: FeatureTransform
    head: nn.Module
    temperature: Tensor | None
    class_names: list[str]
    train_counts: list[int]
    lr: float
    epoch: int
    calibration: dict[str, Any] | None = None
    source: FeatureSource = field(default_factory=FeatureSource)

    @property
    def in_features(self) -> int:
        return len(self.transform.mean)

    @property
    def prior(self) -> dict[str, Any]:
        strength = self.recipe.added_prior
        return {"applied": "training" if strength else "none", "strength": strength}

    @torch.no_grad()
    def logits(self, features: Any, calibrated: bool = False, adjust_prior: float = 0.0) -> Tensor:
        """Inference logits ``(N, K)``, float32 on the CPU, class temperatures applied.

        ``calibrated`` also divides them by the temperature fitted on the validation rows; ``adjust_prior`` then
        subtracts that many times the log prior of the training counts (``longtail.adjust_logits``).

        Raises:
            ValueError: features that are not ``(N, in_features)``, or NaN or infinite, naming the rows;
                ``calibrated`` for a head trained without validation rows; ``adjust_prior`` for a head trained with
                the prior, which would be applied twice.
        """
        if calibrated and self.calibration is None:
            raise ValueError("calibrated needs a temperature, but this head was trained without validation rows")
        if not isinstance(features, Tensor):
            features = np.asanyarray(features)
        if features.ndim != 2 or features.shape[1] != self.in_features:
            raise ValueError(f"features must be (N, {self.in_features}) as in training, got {tuple(features.shape)}")
        self.head.eval()
        device = self.transform.mean.device
        parts = []
        for start in range(0, len(features), CHUNK_ROWS):
            chunk = features[start : start + CHUNK_ROWS]
            # a memory map is copied chunk by chunk: it is read-only, and may be larger than the memory
            chunk = (chunk if isinstance(chunk, Tensor) else torch.from_numpy(np.array(chunk, dtype=np.float32))).to(
                device
            )
            finite = torch.isfinite(chunk).all(1)
            if not bool(finite.all()):
                rows = (start + (~finite).nonzero()[:5, 0]).tolist()
                raise ValueError(f"features must be finite, rows {rows} hold NaN or infinity")
            parts.append(head_logits(self.head, self.temperature, self.transform(chunk)).cpu())
        logits = torch.cat(parts) if parts else torch.empty(0, len(self.class_names))
        if calibrated and self.calibration:
            logits = logits / self.calibration["temperature"]
        if adjust_prior == 0:
            return logits
        # as in training, a class without samples counts as having one
        prior = log_prior(torch.tensor(self.train_counts), floor=1.0)
        return adjust_logits(logits, prior, adjust_prior, trained_with=self.prior)

    def embeddings(self, features: Any) -> Tensor:
        """What the head's last layer sees of the features, ``(N, width)``, on the CPU; see ``logits``."""
        last = self.head[-1] if isinstance(self.head, nn.Sequential) else self.head
        seen: list[Tensor] = []
        handle = last.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].cpu()))
        try:
            self.logits(features)
        finally:
            handle.remove()
        return torch.cat(seen) if seen else torch.empty(0, self.in_features)

    def probabilities(self, features: Any, calibrated: bool = False, adjust_prior: float = 0.0) -> Tensor:
        """Softmax of the logits ``(N, K)``; arguments and errors as ``logits``."""
        return torch.softmax(self.logits(features, calibrated, adjust_prior), dim=1)

    def to(self, device: torch.device) -> Predictor:
        """Move head, preparation and temperatures to a device."""
        self.head.to(device)
        self.transform.to(device)
        self.temperature = None if self.temperature is None else self.temperature.to(device)
        return self

    def save(self, folder: Path) -> None:
        """Write ``head.safetensors`` and ``head.json``."""
        tensors = with_prefix(self.head.state_dict(), "head.") | with_prefix(self.transform.state_dict(), "transform.")
        if self.temperature is not None:
            tensors["temperature"] = self.temperature
        write_tensors(folder / TENSORS, tensors)
        write_json(
            folder / DESCRIPTION,
            {
                "format": 1,
                "head": self.recipe.head,
                "in_features": self.in_features,
                "num_classes": len(self.class_names),
                "class_names": self.class_names,
                "train_counts": self.train_counts,
                "standardize": self.recipe.standardize,
                "normalize": self.transform.normalize,
                "loss": self.recipe.loss,
                "temperature_at_inference": self.temperature is not None,
                "prior": self.prior,
                "calibration": self.calibration,
                "lr": self.lr,
                "epoch": self.epoch,
                "recipe": self.recipe.to_dict(),
                "features": dataclasses.asdict(self.source),
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> Predictor:
        """The head of a run folder.

        Raises:
            StorageError: a folder without a finished head, or files that do not fit together.
        """
        folder = Path(folder)
        if not (folder / DESCRIPTION).exists():
            raise StorageError(f"{folder} holds no trained head ({DESCRIPTION}): not a run folder, or not finished")
        values, tensors = read_json(folder / DESCRIPTION), read_tensors(folder / TENSORS)
        recipe = Recipe.from_dict(values["recipe"])
        with torch.random.fork_rng(devices=[]):
            head = build_head(recipe, values["in_features"], values["num_classes"])
        transform = build_transform(recipe, values["in_features"])
        try:
            head.load_state_dict(select_prefix(tensors, "head."))
            transform.load_state_dict(select_prefix(tensors, "transform."))
        except RuntimeError as error:
            raise StorageError(f"{folder / TENSORS} does not fit {DESCRIPTION}: {error}") from error
        taken = {f.name for f in dataclasses.fields(cls)} & values.keys() - {"recipe", "head"}
        return cls(
            recipe=recipe,
            transform=transform,
            head=head.eval(),
            temperature=tensors.get("temperature"),
            source=FeatureSource(**values["features"]),
            **{name: values[name] for name in taken},
        )
