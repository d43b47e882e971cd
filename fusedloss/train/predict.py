"""Predictions for new inputs, whatever they come as: features, a bank, images or texts."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np

from fusedloss.features import FeatureBank, compute_features, read_inputs
from fusedloss.features.checks import as_integer, as_path, check_instance
from fusedloss.features.device import choose_device
from fusedloss.features.loading import backbone_of
from fusedloss.train.evaluate import check_bank
from fusedloss.train.predictor import Predictor


@dataclass(frozen=True)
class Predictions:
    """Probabilities ``(N, K)`` of named inputs over named classes."""

    names: list[str]
    class_names: list[str]
    probabilities: np.ndarray


def predict_inputs(
    folder: str | Path,
    inputs: str | Path,
    *,
    calibrated: bool = False,
    adjust_prior: float = 0.0,
    weights: str | Path | None = None,
    batch_size: int = 64,
    device: str = "auto",
    progress: bool = True,
) -> Predictions:
    """Probabilities from the head of a run folder for a bank, a ``.npy`` array, or inputs of its backbone.

    Raises:
        ValueError, TypeError: features of another width or backbone, or not finite; inputs that cannot be read;
            images or texts for a head whose features were brought as arrays; a prior applied twice.
        StorageError: no finished run in the folder.
    """
    inputs = as_path("inputs", inputs)
    predictor = Predictor.load(folder).to(choose_device(device))
    if (inputs / "manifest.json").is_file():
        bank = FeatureBank.open(inputs)
        check_bank(predictor, bank, labelled=False)
        names = bank.paths or [str(row) for row in range(len(bank))]
        features: np.ndarray = bank.features
    elif inputs.suffix == ".npy":
        features = _read_array(inputs)
        names = [str(row) for row in range(len(features))]
    else:
        listed = read_inputs(inputs, labelled=False)
        backbone = backbone_of(predictor.source, weights=weights, device=device)
        features = compute_features(listed, backbone, batch_size=batch_size, progress=progress)
        names = listed.paths
    probabilities = predictor.probabilities(features, calibrated, adjust_prior)
    return Predictions(list(names), predictor.class_names, probabilities.numpy())


def write_predictions(predictions: Predictions, *, abstain_below: float = 0.0, top: int = 1) -> str:
    """CSV text: input, class, probability, abstained, and further classes when ``top`` is above 1.

    Raises:
        ValueError: ``abstain_below`` outside ``[0, 1]``, or ``top`` outside ``[1, K]``.
    """
    check_instance("predictions", predictions, Predictions, "Predictions")
    num_classes = len(predictions.class_names)
    if not (isinstance(abstain_below, Real) and 0 <= abstain_below <= 1):
        raise ValueError(f"abstain_below must be in [0, 1]; got {abstain_below}")
    as_integer("top", top, 1, num_classes + 1)
    order = np.argsort(-predictions.probabilities, axis=1, kind="stable")[:, :top]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    more = [f"{column}_{k}" for k in range(2, top + 1) for column in ("class", "probability")]
    writer.writerow(["input", "class", "probability", "abstained", *more])
    for name, classes, probs in zip(predictions.names, order, predictions.probabilities, strict=True):
        ranked = [(predictions.class_names[k], f"{probs[k]:.6f}") for k in classes]
        abstains = bool(probs[classes[0]] < abstain_below)
        others = (cell for pair in ranked[1:] for cell in pair)
        writer.writerow([name, "" if abstains else ranked[0][0], ranked[0][1], str(abstains).lower(), *others])
    return buffer.getvalue()


def _read_array(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"inputs {path} cannot be read as an array: {error}") from error
    if array.ndim != 2 or array.dtype.kind != "f":
        raise ValueError(f"inputs {path} must hold floating-point features (N, D); got {array.dtype} {array.shape}")
    return array
