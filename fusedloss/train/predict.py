"""Predictions for new inputs, whatever they come as: features, a bank, images or texts."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusedloss.features import FeatureBank, compute_features, read_inputs
from fusedloss.features.arrays import read_arrays
from fusedloss.features.bank_files import release_pages
from fusedloss.features.checks import as_integer, as_names, as_path, check_instance
from fusedloss.features.device import choose_device
from fusedloss.features.loading import backbone_of
from fusedloss.train.evaluate import check_bank
from fusedloss.train.predictor import Predictor

ARRAY_SUFFIXES = (".npy", ".npz", ".csv", ".csv.gz", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class Predictions:
    """Probabilities ``(N, K)`` of named inputs over named classes."""

    names: list[str]
    class_names: list[str]
    probabilities: np.ndarray


@dataclass(frozen=True)
class PredictionBlocks:
    """Probabilities that are computed as they are read, block after block ``(n, K)``, over all named inputs."""

    names: Sequence[str]
    class_names: list[str]
    blocks: Iterable[np.ndarray]


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
    """Probabilities from the head of a run folder for a bank, arrays as `import` takes them, or inputs of its
    backbone; all in memory, where ``predict_blocks`` gives them one by one.

    Raises:
        ValueError, TypeError: features of another width or backbone, or not finite; inputs that cannot be read;
            images or texts for a head whose features were brought as arrays; a prior applied twice; a temperature
            that there is none of.
        StorageError: no finished run in the folder.
    """
    found = predict_blocks(
        folder, inputs, calibrated=calibrated, adjust_prior=adjust_prior, weights=weights, batch_size=batch_size,
        device=device, progress=progress,
    )  # fmt: skip
    blocks = list(found.blocks)
    probabilities = np.concatenate(blocks) if blocks else np.empty((0, len(found.class_names)), np.float32)
    return Predictions(list(found.names), found.class_names, probabilities)


def predict_blocks(
    folder: str | Path,
    inputs: str | Path,
    *,
    calibrated: bool = False,
    adjust_prior: float = 0.0,
    weights: str | Path | None = None,
    batch_size: int = 64,
    device: str = "auto",
    progress: bool = True,
) -> PredictionBlocks:
    """``predict_inputs`` of as many inputs as there are, in memory that does not grow with them; errors as there,
    some when the blocks are read."""
    inputs = as_path("inputs", inputs)
    predictor = Predictor.load(folder).to(choose_device(device))
    names: Sequence[str] | None
    if (inputs / "manifest.json").is_file():
        bank = FeatureBank.open(inputs)
        check_bank(predictor, bank, labelled=False)
        features, names = bank.features, bank.paths
    elif _holds_features(inputs):
        features, names = _read_features(inputs)
    else:
        listed = read_inputs(inputs, labelled=False)
        backbone = backbone_of(predictor.source, weights=weights, device=device)
        features = compute_features(listed, backbone, batch_size=batch_size, progress=progress)
        names = listed.paths
    if names is None:
        names = [str(row) for row in range(len(features))]
    return PredictionBlocks(names, predictor.class_names, _probabilities(predictor, features, calibrated, adjust_prior))


def _probabilities(
    predictor: Predictor, features: np.ndarray, calibrated: bool, adjust_prior: float
) -> Iterator[np.ndarray]:
    for logits in predictor.logit_blocks(features, calibrated, adjust_prior):
        yield torch.softmax(logits, dim=1).numpy()
        release_pages(features)


def write_predictions(predictions: Predictions, *, abstain_below: float = 0.0, top: int = 1) -> str:
    """CSV text: input, class, probability, abstained, and further classes when ``top`` is above 1.

    Raises:
        ValueError: ``abstain_below`` outside ``[0, 1]``, or ``top`` outside ``[1, K]``.
    """
    check_instance("predictions", predictions, Predictions, "Predictions")
    blocks = PredictionBlocks(predictions.names, predictions.class_names, [predictions.probabilities])
    return "".join(text for text, _ in prediction_lines(blocks, abstain_below=abstain_below, top=top))


def prediction_lines(
    predictions: PredictionBlocks, *, abstain_below: float = 0.0, top: int = 1
) -> Iterator[tuple[str, int]]:
    """The text of ``write_predictions`` in pieces, the header first, and how many inputs of each abstain."""
    num_classes = len(predictions.class_names)
    if not (isinstance(abstain_below, Real) and 0 <= abstain_below <= 1):
        raise ValueError(f"abstain_below must be in [0, 1]; got {abstain_below}")
    as_integer("top", top, 1, num_classes + 1)
    more = [f"{column}_{k}" for k in range(2, top + 1) for column in ("class", "probability")]
    yield ",".join(["input", "class", "probability", "abstained", *more]) + "\n", 0
    start = 0
    for probabilities in predictions.blocks:
        names = predictions.names[start : start + len(probabilities)]
        start += len(probabilities)
        yield _block_lines(names, predictions.class_names, probabilities, float(abstain_below), top)


def _block_lines(
    names: Sequence[str], class_names: list[str], probabilities: np.ndarray, abstain_below: float, top: int
) -> tuple[str, int]:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    abstained = 0
    for name, classes, probs in zip(names, _first_classes(probabilities, top), probabilities, strict=True):
        ranked = [(class_names[k], f"{probs[k]:.6f}") for k in classes]
        abstains = bool(probs[classes[0]] < abstain_below)
        abstained += abstains
        others = (cell for pair in ranked[1:] for cell in pair)
        writer.writerow([name, "" if abstains else ranked[0][0], ranked[0][1], str(abstains).lower(), *others])
    return buffer.getvalue(), abstained


def _first_classes(probabilities: np.ndarray, top: int) -> np.ndarray:
    """The `top` most probable classes of each row, of equal ones the first."""
    if top == 1:
        first: np.ndarray = probabilities.argmax(1)
        return first[:, None]
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :top]


def _holds_features(path: Path) -> bool:
    """Whether a file holds arrays of features, as `import` reads them, and not images or texts."""
    name = path.name.lower()
    if not path.is_file() or not name.endswith(ARRAY_SUFFIXES):
        return False
    if name.endswith(".npz"):
        try:
            with np.load(path, allow_pickle=False) as archive:
                return "images" not in archive.files
        except (OSError, ValueError, zipfile.BadZipFile):
            return False
    if name.endswith(".csv"):
        with open(path, encoding="utf-8-sig", newline="", errors="replace") as file:
            return not {"path", "text"} & set(next(csv.reader(file), []))
    return True


def _read_features(path: Path) -> tuple[np.ndarray, list[str] | None]:
    """Features ``(N, D)`` of a file, memory-mapped where it can be, and the names of its rows where it has some."""
    arrays: dict[str, Any]
    if path.suffix.lower() == ".npy":
        try:
            arrays = {"features": np.lib.format.open_memmap(path, mode="r")}
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"inputs {path} cannot be read as an array: {error}") from error
    else:
        arrays = read_arrays(path, "features")
    if "features" not in arrays:
        raise ValueError(f"inputs {path} must hold features, or one array; got {', '.join(sorted(arrays))}")
    array = arrays["features"]
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise ValueError(f"inputs {path} must hold features (N, D), real numbers; got {array.dtype} {array.shape}")
    return array, as_names("paths", arrays["paths"], len(array)) if "paths" in arrays else None
