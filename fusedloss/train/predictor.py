"""A trained head with all it takes to predict: preparation, temperatures, names, and its origin."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedloss.atomic_io import StorageError, read_json, read_tensors, write_json, write_tensors
from fusedloss.features import FeatureSource
from fusedloss.features.checks import as_numpy, as_path, check_instance
from fusedloss.longtail import adjust_logits, log_prior
from fusedloss.train.checkpoint import select_prefix, with_prefix
from fusedloss.train.heads import FeatureTransform, Head, build_head, build_transform
from fusedloss.train.loop import head_logits
from fusedloss.train.recipe import Recipe

TENSORS, DESCRIPTION = "head.safetensors", "head.json"
CHUNK_ROWS = 8192
LOGITS_OF_A_BLOCK = 1 << 23


@dataclass
class Predictor:
    """Class probabilities for rows of features as the bank held them.

    ``prior`` says whether a class prior was added while training; if so the logits are right as they are, and
    a post-hoc adjustment would apply it twice. ``calibration`` is the temperature fitted on the validation
    rows; ``source`` says which backbone, weights and preprocessing the features came from.

    Raises:
        TypeError, ValueError: parts of another kind, or numbers of classes that disagree.

    Example:
        >>> from fusedloss.features import FeatureBank
        >>> from fusedloss.train import fit
        >>> bank = FeatureBank.from_arrays(np.random.RandomState(0).randn(90, 4), np.arange(90) % 3)
        >>> predictor = fit(bank, Recipe(epochs=1), device="cpu").predictor
        >>> predictor.probabilities(bank.features[:2]).shape
        torch.Size([2, 3])
    """

    recipe: Recipe
    transform: FeatureTransform
    head: Head
    temperature: Tensor | None
    class_names: list[str]
    train_counts: list[int]
    lr: float
    epoch: int
    calibration: dict[str, Any] | None = None
    source: FeatureSource = field(default_factory=FeatureSource)

    def __post_init__(self) -> None:
        check_instance("recipe", self.recipe, Recipe, "a Recipe")
        check_instance("transform", self.transform, FeatureTransform, "a FeatureTransform")
        check_instance("head", self.head, Head, "a Head")
        check_instance("source", self.source, FeatureSource, "a FeatureSource")
        if len(self.class_names) != len(self.train_counts):
            raise ValueError(
                f"train_counts must have one entry per class, {len(self.class_names)}; got {len(self.train_counts)}"
            )

    @property
    def in_features(self) -> int:
        """Width of the features."""
        return len(self.transform.mean)

    @property
    def prior(self) -> dict[str, Any]:
        """The class prior that training added, as ``longtail.adjust_logits`` takes it."""
        strength = self.recipe.added_prior
        return {"applied": "training" if strength else "none", "strength": strength}

    @property
    def fitted_temperature(self) -> float:
        """The temperature fitted on the validation rows, NaN where there is none or the fit did not converge."""
        if self.calibration is None or not self.calibration["converged"]:
            return math.nan
        return float(self.calibration["temperature"])

    def logits(self, features: Any, calibrated: bool = False, adjust_prior: float = 0.0) -> Tensor:
        """Inference logits ``(N, K)``, float32 on the CPU, class temperatures applied.

        ``calibrated`` also divides them by the temperature fitted on the validation rows; ``adjust_prior`` then
        subtracts that many times the log prior of the training counts (``longtail.adjust_logits``).

        Raises:
            ValueError: features that are not ``(N, in_features)``, or NaN or infinite, naming the rows;
                ``calibrated`` for a head trained without validation rows, or whose temperature has no optimum on
                them; ``adjust_prior`` for a head trained with the prior, which would be applied twice.
        """
        blocks = list(self.logit_blocks(features, calibrated, adjust_prior))
        return torch.cat(blocks) if blocks else torch.empty(0, len(self.class_names))

    def logit_blocks(
        self, features: Any, calibrated: bool = False, adjust_prior: float = 0.0, *, rows: np.ndarray | None = None
    ) -> Iterator[Tensor]:
        """``logits`` in blocks of rows, of all features or of those at the row numbers `rows`; errors as there."""
        self._check_options(calibrated, adjust_prior)
        self.head.eval()
        # As in training, a class without samples is treated as having one.
        prior = log_prior(torch.tensor(self.train_counts), floor=1.0) if adjust_prior else None
        for chunk in self._prepared(features, rows):
            with torch.no_grad():
                logits = head_logits(self.head, self.temperature, chunk).cpu()
                if calibrated:
                    logits = logits / self.fitted_temperature
                if prior is not None:
                    logits = adjust_logits(logits, prior, adjust_prior, trained_with=self.prior)
            yield logits

    def _check_options(self, calibrated: bool, adjust_prior: float) -> None:
        if calibrated and self.calibration is None:
            raise ValueError("calibrated must be False for a head trained without validation rows; got True")
        if calibrated and self.calibration and math.isnan(self.fitted_temperature):
            bound = self.calibration["temperature"]
            raise ValueError(
                "calibrated must be False for a head whose temperature did not converge: the likelihood of its "
                f"validation rows has no optimum, the search ended at {bound:g} (all rows right or wrong, or too few); "
                "got True"
            )
        if not isinstance(adjust_prior, Real) or not math.isfinite(adjust_prior):
            raise ValueError(f"adjust_prior must be a finite number, the strength of the prior; got {adjust_prior!r}")

    @torch.no_grad()
    def embeddings(self, features: Any, rows: np.ndarray | None = None) -> Tensor:
        """What the head's last layer reads of the features (or of those at `rows`), ``(N, width)``, on the CPU;
        errors as `logits`."""
        self.head.eval()
        parts = [self.head.hidden(chunk).cpu() for chunk in self._prepared(features, rows)]
        return torch.cat(parts) if parts else torch.empty(0, self.head.class_weight.shape[1])

    def _prepared(self, features: Any, rows: np.ndarray | None = None) -> Iterator[Tensor]:
        """Checked rows as the head reads them, on its device, in chunks: they may be larger than the memory."""
        if not isinstance(features, Tensor):
            features = as_numpy(features, "features")
        if features.ndim != 2 or features.shape[1] != self.in_features:
            raise ValueError(f"features must be (N, {self.in_features}) as in training; got {tuple(features.shape)}")
        real = not features.is_complex() if isinstance(features, Tensor) else features.dtype.kind in "fiu"
        if not real:
            raise TypeError(f"features must be real numbers; got {features.dtype}")
        device = self.transform.mean.device
        count = len(features) if rows is None else len(rows)
        size = min(CHUNK_ROWS, max(1, LOGITS_OF_A_BLOCK // len(self.class_names)))
        for start in range(0, count, size):
            chunk = features[start : start + size] if rows is None else features[rows[start : start + size]]
            if not isinstance(chunk, Tensor):
                # A copy, since a memory map is read-only.
                chunk = torch.from_numpy(np.array(chunk, dtype=np.float32))
            chunk = chunk.detach().to(device)
            finite = torch.isfinite(chunk).all(1)
            if not bool(finite.all()):
                wrong = start + (~finite).nonzero()[:5, 0].cpu().numpy()
                named = (wrong if rows is None else rows[wrong]).tolist()
                raise ValueError(f"features must be finite; got NaN or infinity in rows {named}")
            yield self.transform(chunk)

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
        folder = as_path("folder", folder)
        if not (folder / DESCRIPTION).exists():
            raise StorageError(f"folder must hold a trained head; got {folder}, which has no {DESCRIPTION}")
        values, tensors = read_json(folder / DESCRIPTION), read_tensors(folder / TENSORS)
        try:
            recipe = Recipe.from_dict(values["recipe"])
            with torch.random.fork_rng(devices=[]):
                head = build_head(recipe, values["in_features"], values["num_classes"])
            transform = build_transform(recipe, values["in_features"])
            source = FeatureSource(**values["features"])
            own = {name: values[name] for name in ("class_names", "train_counts", "lr", "epoch")}
            own["calibration"] = values.get("calibration")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise StorageError(f"{folder / DESCRIPTION} does not describe a trained head: {error!r}") from error
        try:
            head.load_state_dict(select_prefix(tensors, "head."))
            transform.load_state_dict(select_prefix(tensors, "transform."))
        except RuntimeError as error:
            raise StorageError(f"{folder / TENSORS} does not fit {DESCRIPTION}: {error}") from error
        temperature = tensors.get("temperature")
        return cls(recipe=recipe, transform=transform, head=head.eval(), temperature=temperature, source=source, **own)
