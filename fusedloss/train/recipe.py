"""What a run does: every knob with its default and meaning, as one frozen object and JSON file."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedloss.features.checks import as_path
from fusedloss.train.heads import HEADS

CLASS_WEIGHTS = ("none", "effective", "inverse")
FEDLAS_BASES, FEDLAS_GATES = ("smoothing", "margin"), ("learned", "positive")
SELECTIONS = ("macro_f1_fg", "bal_acc", "top1", "nll")
KEEPS = ("last", "best")
PRECISIONS = ("float32", "bfloat16")


def knob(default: Any, meaning: str, choices: Collection[str] = ()) -> Any:
    """A dataclass field whose meaning the command line shows as its help."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "choices": choices})


@dataclass(frozen=True)
class Recipe:
    """All settings of one training run; unknown names and values out of range are refused by name.

    Every field and its meaning: ``fusedloss train --help``.

    Raises:
        ValueError: a value of another type, or outside its range or choices, naming the field.

    Example:
        >>> Recipe(loss="vace", lr=(1e-3, 3e-3)).replace(seed=1).seed
        1
    """

    head: str = knob("linear", "classifier on the features", HEADS)
    hidden: tuple[int, ...] = knob((768, 384), "widths of the hidden layers (mlp head)")
    dropout: float = knob(0.1, "dropout after each hidden layer (mlp head)")
    cosine_scale: float = knob(30.0, "factor on the cosines (cosine head)")
    loss: str = knob("ce", "training loss: ce, vace, focal, balanced, ldam (cosine head), mbls or fedlas")
    class_weights: str = knob("none", "class weights from the training counts", CLASS_WEIGHTS)
    beta: float = knob(0.9999, "beta of the effective number of samples (class_weights=effective)")
    power: float = knob(1.0, "power of the inverse frequency (class_weights=inverse)")
    reweight_epoch: int = knob(0, "epoch, from 0, at which class_weights set in (deferred re-weighting)")
    reweight_ramp: int = knob(0, "epochs over which class_weights grow from there; 0 for at once")
    label_smoothing: float = knob(0.0, "share of the target spread evenly over all classes")
    prior_strength: float = knob(
        0.0,
        "strength * log class prior added to the logits while training (logit adjustment); "
        "predictions then use the raw logits; balanced takes 1 for 0",
    )
    strength: float = knob(0.5, "how far temperatures follow the class scatter (vace)")
    a: float = knob(1.0, "temperature of a class without scatter (vace); 1 - strength gives mean temperature 1")
    tau_min: float = knob(0.5, "least class temperature (vace)")
    tau_max: float = knob(2.0, "largest class temperature (vace)")
    focal_gamma: float = knob(2.0, "exponent of the focal factor (focal)")
    max_margin: float = knob(0.5, "margin of the rarest class, in cosine (ldam)")
    margin: float = knob(10.0, "logit gap that costs nothing (mbls, and fedlas with base margin)")
    penalty: float = knob(0.1, "weight of the penalty on larger gaps (mbls)")
    fedlas_base: str = knob("smoothing", "what fedlas adapts for each row", FEDLAS_BASES)
    fedlas_strength: float = knob(0.05, "smoothing or penalty of a row with the mean feature norm (fedlas)")
    fedlas_gate: str = knob("learned", "whether more norm always means more smoothing (fedlas)", FEDLAS_GATES)
    uniform: bool = knob(False, "control: give every class the mean of vace's temperatures (vace)")
    supcon: float = knob(0.0, "weight of a supervised contrastive loss on the last hidden layer, projected (mlp head)")
    supcon_temperature: float = knob(0.1, "temperature of the contrastive loss (supcon)")
    supcon_projection: int = knob(128, "width of the projection that the contrastive loss sees (supcon)")
    supcon_prototypes: bool = knob(
        False, "balanced contrast: classes count alike, and the projected classifier weights are their centres (supcon)"
    )
    balanced_batches: bool = knob(False, "draw rows so that all classes are equally likely, in place of each row once")
    epochs: int = knob(30, "passes over the training rows")
    batch_size: int = knob(512, "rows per step")
    lr: tuple[float, ...] = knob(
        (1e-3,), "peak learning rate; several are tried and chosen between on the validation rows"
    )
    weight_decay: float = knob(1e-4, "AdamW's decay of weight matrices; biases and norms have none")
    warmup: float = knob(0.05, "share of all steps with a linearly rising learning rate, before the cosine")
    precision: str = knob(
        "float32", "type that training rows are kept and multiplied in; weights stay in float32", PRECISIONS
    )
    capture: bool = knob(False, "on a GPU, record a step once as a CUDA graph and replay it")
    seed: int = knob(0, "seed of initial weights, batch order and dropout")
    standardize: bool = knob(True, "shift and scale each feature to mean 0 and deviation 1 on the training rows")
    normalize: bool = knob(False, "then scale each row to length 1 (the cosine head always does)")
    test_fraction: float = knob(0.2, "share of the groups held out for the test")
    val_fraction: float = knob(0.1, "share of the groups held out for validation; 0 for none")
    split_seed: int = knob(42, "seed of the split, independent of seed")
    select: str = knob("macro_f1_fg", "validation score that chooses the learning rate and the best epoch", SELECTIONS)
    keep: str = knob("last", "epoch whose head is kept: the last, or the best on the validation rows", KEEPS)

    def __post_init__(self) -> None:
        for name in ("hidden", "lr"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, (list, tuple)) else (value,))
        for field in dataclasses.fields(self):
            _check_type(field, getattr(self, field.name))
        for name, (allowed, meaning) in _RANGES.items():
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            if not values or not all(allowed(v) for v in values):
                raise ValueError(f"{name} must be {meaning}; got {value}")
        if self.tau_min > self.tau_max:
            raise ValueError(f"tau_min must be at most tau_max, {self.tau_max}; got {self.tau_min}")
        if (self.reweight_epoch or self.reweight_ramp) and self.class_weights == "none":
            raise ValueError(
                "class_weights must be effective or inverse for reweight_epoch and reweight_ramp; got 'none'"
            )
        if self.loss == "ldam" and self.head != "cosine":
            raise ValueError(f"head must be cosine for loss ldam, whose margins are cosines; got {self.head!r}")
        if self.supcon and self.head != "mlp":
            raise ValueError(f"head must be mlp for supcon, which trains hidden layers; got {self.head!r}")
        if self.supcon_prototypes and not self.supcon:
            raise ValueError("supcon must be above 0 for supcon_prototypes; got 0")
        if self.test_fraction + self.val_fraction >= 1:
            raise ValueError(
                "test_fraction + val_fraction must be below 1, to leave rows to train on; got "
                f"{self.test_fraction} + {self.val_fraction}"
            )
        if self.val_fraction == 0 and (len(self.lr) > 1 or self.keep == "best"):
            raise ValueError("val_fraction must be above 0 to choose a learning rate or to keep the best epoch; got 0")

    @property
    def added_prior(self) -> float:
        """Strength of the log class prior that training adds to the logits, 0 for none."""
        return self.prior_strength or float(self.loss == "balanced")

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some fields changed; an unknown name is a ValueError."""
        return Recipe.from_dict(dataclasses.asdict(self) | changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """The recipe with these fields, the others at their defaults.

        Raises:
            ValueError: an unknown name, or as the recipe itself.
            TypeError: anything but a mapping.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"values must be a mapping of settings; got {type(values).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else f" (known are {', '.join(known)})"
                raise ValueError(f"recipe must be made of known settings; got {name!r}{hint}")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """The recipe of a JSON file; a run folder's ``config.json`` is one too."""
        return cls.from_dict(read_settings(path))


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that a JSON recipe, or the ``config.json`` of a run, gives.

    Raises:
        ValueError: a file that cannot be read, or is not a JSON object.
    """
    try:
        values = json.loads(as_path("path", path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"recipe {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"recipe {path} is not JSON: {error}") from error
    settings = values.get("recipe", values) if isinstance(values, dict) else values
    if not isinstance(settings, dict):
        raise ValueError(f"recipe {path} must be a JSON object of settings; got {type(settings).__name__}")
    return settings


def _check_type(field: dataclasses.Field[Any], value: Any) -> None:
    kind = type(field.default[0]) if isinstance(field.default, tuple) else type(field.default)
    accepted = (int, float) if kind is float else (kind,)
    for item in value if isinstance(field.default, tuple) else (value,):
        if not isinstance(item, accepted) or (isinstance(item, bool) and kind is not bool):
            raise ValueError(f"{field.name} must be {kind.__name__}; got {item!r}")
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"{field.name} must be one of {', '.join(choices)}; got {value!r}")


def _finite(value: float) -> bool:
    # An int may be too large for a float.
    return abs(value) <= sys.float_info.max


def _positive(value: float) -> bool:
    return _finite(value) and value > 0


def _not_negative(value: float) -> bool:
    return _finite(value) and value >= 0


_RANGES: dict[str, tuple[Any, str]] = {
    "hidden": (lambda v: v >= 1, "widths of at least 1"),
    "dropout": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "beta": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "label_smoothing": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    "warmup": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    "test_fraction": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "val_fraction": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "epochs": (lambda v: v >= 1, "at least 1"),
    "batch_size": (lambda v: v >= 1, "at least 1"),
    "seed": (lambda v: 0 <= v < 2**63, "in [0, 2**63)"),
    "split_seed": (lambda v: 0 <= v < 2**32, "in [0, 2**32)"),
    "cosine_scale": (_positive, "positive and finite"),
    "lr": (_positive, "positive and finite"),
    "focal_gamma": (lambda v: v == 0 or (_finite(v) and v >= 0.5), "0, or finite and at least 0.5"),
    "max_margin": (_positive, "positive and finite"),
    "margin": (_not_negative, "at least 0 and finite"),
    "penalty": (_not_negative, "at least 0 and finite"),
    "fedlas_strength": (lambda v: 0 <= v <= 0.5, "in [0, 0.5]"),
    "reweight_epoch": (_not_negative, "at least 0"),
    "reweight_ramp": (_not_negative, "at least 0"),
    "supcon": (_not_negative, "at least 0 and finite"),
    "supcon_temperature": (_positive, "positive and finite"),
    "supcon_projection": (lambda v: v >= 1, "at least 1"),
    "tau_min": (_positive, "positive and finite"),
    "tau_max": (_positive, "positive and finite"),
    "a": (_not_negative, "at least 0 and finite"),
    "strength": (_not_negative, "at least 0 and finite"),
    "power": (_not_negative, "at least 0 and finite"),
    "weight_decay": (_not_negative, "at least 0 and finite"),
    "prior_strength": (_finite, "finite"),
}
