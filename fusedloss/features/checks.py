"""The checks of the arguments of `fusedloss.features` and `fusedloss.train`: each names the argument and what came."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusedloss.features.bank_files import release_pages
from fusedloss.features.manifest import BankError

ROWS_PER_BLOCK = 8192
NAMED_ROWS = 5
# Labels above are identifiers that somebody took for class numbers; a list of so many names would fill the memory.
MOST_CLASSES = 1 << 24


def described(value: Any) -> str:
    """A value as error messages show it: short ones as they are, others by their type."""
    if isinstance(value, str | bool | int | float | type(None)) and len(repr(value)) <= 60:
        return repr(value)
    return type(value).__name__


def check_instance(name: str, value: Any, kind: type, phrase: str) -> None:
    """Raise TypeError unless `value` is of a class, which `phrase` describes ("a FeatureBank")."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {phrase}; got {described(value)}")


def as_path(name: str, value: Any) -> Path:
    """A path from a string or a path."""
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise TypeError(f"{name} must be a path, as str or pathlib.Path; got {described(value)}")
    if "\0" in os.fspath(value):
        raise ValueError(f"{name} must be a path without null characters; got {os.fspath(value)!r}")
    return Path(value)


def as_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """An int in ``[low, high)``, from one of Python or numpy."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer; got {described(value)}")
    number = int(value)
    if number < low or (high is not None and number >= high):
        allowed = f"at least {low}" if high is None else f"in [{low}, {high})"
        raise ValueError(f"{name} must be {allowed}; got {number}")
    return number


def as_fraction(name: str, value: Any) -> float:
    """A float in ``[0, 1)``."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number in [0, 1); got {described(value)}")
    number = float(value)
    if not 0 <= number < 1:
        raise ValueError(f"{name} must be in [0, 1); got {number}")
    return number


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of a few strings."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {described(value)}")


def as_list(name: str, values: Any) -> list[Any]:
    """A list from any iterable but a string."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence; got {described(values)}")
    return list(values)


def as_names(name: str, values: Any, count: int | None = None) -> list[str]:
    """A list of strings from a sequence of them (or of numbers, in words), of a length where `count` is given."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Sequence | np.ndarray):
        raise TypeError(f"{name} must be a sequence of strings; got {described(values)}")
    wrong = [value for value in values if not isinstance(value, str | Integral | os.PathLike)]
    if wrong:
        raise TypeError(f"{name} must be a sequence of strings; got {described(wrong[0])} among them")
    if count is not None and len(values) != count:
        raise BankError(f"{name} must have one entry per row, {count}; got {len(values)}")
    return [str(value) for value in values]


def as_numpy(array: Any, name: str = "array") -> np.ndarray:
    """A numpy array from a numpy array, a tensor (bfloat16 becomes float32) or nested sequences.

    Raises:
        TypeError: a tensor that is sparse or without values, or anything that is not an array.
        BankError: sequences of different lengths.
    """
    if isinstance(array, torch.Tensor):
        array = array.detach()
        try:
            return np.asarray((array.float() if array.dtype == torch.bfloat16 else array).resolve_neg().cpu().numpy())
        except (TypeError, RuntimeError, NotImplementedError) as error:
            kind = f"a {array.device.type} tensor of {array.dtype}, {array.layout}"
            raise TypeError(f"{name} must be a dense tensor with values; got {kind}") from error
    if array is None or isinstance(array, str | bytes | Mapping | set | frozenset):
        raise TypeError(f"{name} must be an array, a tensor or nested sequences of numbers; got {described(array)}")
    try:
        converted = np.asarray(array)
    except ValueError as error:
        raise BankError(f"{name} must be rectangular; got sequences of different lengths") from error
    if converted.dtype == object:
        raise TypeError(f"{name} must be an array, a tensor or nested sequences of numbers; got {described(array)}")
    return converted


def integer_vector(name: str, values: Any, num_rows: int) -> np.ndarray:
    """`values` as int64 `(num_rows,)`; BankError says what came instead."""
    array = as_numpy(values, name)
    if array.ndim != 1 or len(array) != num_rows:
        hint = " (one-hot rows: take their argmax)" if array.ndim == 2 and len(array) == num_rows else ""
        raise BankError(f"{name} must have shape ({num_rows},), one per row of features; got {array.shape}{hint}")
    if not np.issubdtype(array.dtype, np.integer):
        raise BankError(f"{name} must be integers; got {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.int64)


def class_numbers(labels: np.ndarray) -> list[str]:
    """Names of classes that have only numbers; of one class where every label is negative, to be refused as such."""
    largest = int(labels.max())
    if largest >= MOST_CLASSES:
        raise BankError(f"labels must be below {MOST_CLASSES} where no class_names are given; got {largest}")
    return [str(label) for label in range(max(largest, 0) + 1)]


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raise BankError unless every label lies in `[0, num_classes)`, naming the first rows that do not."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        shown = ", ".join(f"row {row}: {labels[row]}" for row in wrong[:NAMED_ROWS])
        raise BankError(f"labels must lie in [0, {num_classes}); got {len(wrong)} that do not ({shown})")


def check_finite(features: np.ndarray, paths: Sequence[str] | None = None, first_row: int = 0, note: str = "") -> None:
    """Refuse NaN and infinite features, naming the first rows (their paths too) and how many there are."""
    wrong: list[int] = []
    for start in range(0, len(features), ROWS_PER_BLOCK):
        finite = np.isfinite(features[start : start + ROWS_PER_BLOCK]).all(axis=1)
        wrong += (np.flatnonzero(~finite) + start + first_row).tolist()
        release_pages(features)
    if wrong:
        shown = ", ".join(f"row {row}" + (f" ({paths[row]})" if paths else "") for row in wrong[:NAMED_ROWS])
        more = ", ..." if len(wrong) > NAMED_ROWS else ""
        raise BankError(
            f"features must be finite; got NaN or infinite values in {len(wrong)} rows: {shown}{more}{note}"
        )
