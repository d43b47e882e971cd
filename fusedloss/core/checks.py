"""Checks of arguments, in one grammar: ``NAME must be ...; got ...``."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_number(
    name: str,
    value: Any,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> float:
    """`value` as a float (an int stays one); a bool, a tensor and text are no numbers, numpy's scalars are."""
    if type(value) is not float and type(value) is not int:
        if isinstance(value, (bool, Tensor)) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number; got {type(value).__name__}")
        # A traced float is left alone: float() would fix its value.
        value = value if isinstance(value, (float, int)) else float(value)
    if not (at_least <= value <= at_most and above < value < below):
        raise ValueError(f"{name} must be {_range(at_least, above, at_most, below)}; got {value}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be {_range(at_least, above, at_most, below)}; got {value}")
    return value  # type: ignore[no-any-return]


def check_integer(name: str, value: Any, *, at_least: int | None = None) -> int:
    """`value` as an int; numpy's integers are taken, a bool and a float are not."""
    if type(value) is not int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an integer; got {type(value).__name__}")
        value = value if isinstance(value, int) else int(value)
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be at least {at_least}; got {value}")
    return value  # type: ignore[no-any-return]


def check_ignore_index(value: Any) -> int:
    """The label of rows that are left out, as a 64-bit integer."""
    label = check_integer("ignore_index", value)
    if not -(2**63) <= label < 2**63:
        raise ValueError(f"ignore_index must fit in 64 bits; got {label}")
    return label


def check_bool(name: str, value: Any) -> bool:
    """`value`, which must be True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {type(value).__name__}")
    return value


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raises ``ValueError`` unless `value` is one of the strings `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        words = [repr(word) for word in allowed]
        listed = f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
        raise ValueError(f"{name} must be {listed}; got {value!r}")


def check_focal_gamma(value: Any, name: str = "focal_gamma") -> float:
    """The exponent of a focal loss."""
    gamma = check_number(name, value)
    if gamma != 0 and gamma < 0.5:
        raise ValueError(
            f"{name} must be 0, or finite and at least 0.5 (below, the gradient is infinite at p = 1); got {gamma}"
        )
    return gamma


def check_tensor(
    name: str,
    value: Any,
    shape: Sequence[int | str] | None = None,
    *,
    like: Tensor | None = None,
    of: str = "input",
) -> Tensor:
    """`value`, which must be a dense floating-point tensor.

    Args:
        name: of the argument.
        value: the argument.
        shape: its dimensions; a string stands for any size and is only shown.
        like: a tensor on whose device it must be; `of` is that argument's name.
        of: see `like`.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a floating-point tensor; got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor; got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {value.layout}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on the device of {of}, {like.device}; got {value.device}")
    if shape is not None:
        _check_shape(name, value, shape)
    return value


def check_integer_tensor(name: str, value: Any, shape: Sequence[int | str] | None = None) -> Tensor:
    """`value`, which must be a dense tensor of integers; see ``check_tensor``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of integers; got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of integers; got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {value.layout}")
    if shape is not None:
        _check_shape(name, value, shape)
    return value


def check_per_row(name: str, value: Any, shape: Sequence[int], like: Tensor, of: str = "input") -> Tensor:
    """One real number per row: `value` in the rows' `shape` ``(B, d1, ...)``, or ``(B,)`` made to broadcast over it."""
    if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating-point tensor with one value per row; got {got}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device of {of}, {like.device}; got {value.device}")
    if value.shape == tuple(shape):
        return value
    if len(shape) > 1 and value.shape == tuple(shape[:1]):
        return value.reshape(-1, *[1] * (len(shape) - 1))
    also = f" or {tuple(shape[:1])}" if len(shape) > 1 else ""
    raise ValueError(f"{name} must have shape {tuple(shape)}{also}; got {tuple(value.shape)}")


def check_class_weight(name: str, weight: Any) -> Tensor | None:
    """Class weights ``(K,)`` that a module keeps, or None; values are read, except on the meta device."""
    if weight is None:
        return None
    check_tensor(name, weight, ("K",))
    if weight.device.type != "meta" and not bool((weight.detach() >= 0).all()):
        raise ValueError(f"{name} must be at least 0 for every class; got a negative value or NaN")
    return weight  # type: ignore[no-any-return]


def check_label_shape(name: str, labels: Tensor, shape: Sequence[int], input_shape: Sequence[int]) -> None:
    """Raises ``ValueError`` unless `labels` have the rows' `shape`; one-hot labels of the input's shape get a hint."""
    if tuple(labels.shape) == tuple(shape):
        return
    hint = ""
    if tuple(labels.shape) == tuple(input_shape):
        hint = f" (one-hot? pass {name}.argmax(1), or probabilities as {name}.float())"
    raise ValueError(
        f"{name} must have shape {tuple(shape)} for input of shape {tuple(input_shape)}; "
        f"got {tuple(labels.shape)}{hint}"
    )


def check_labels(labels: Tensor, num_classes: int, ignore_index: int | None, name: str = "labels") -> None:
    """IndexError naming the first row whose label is neither in [0, K) nor `ignore_index`; waits for the device."""
    bad = (labels < 0) | (labels >= num_classes)
    if ignore_index is not None:
        bad &= labels != ignore_index
    if bad.any():
        row = int(bad.flatten().nonzero()[0])
        also = "" if ignore_index is None else f" or be ignore_index={ignore_index}"
        raise IndexError(
            f"{name} must lie in [0, {num_classes}){also}; got label {int(labels.flatten()[row])} at row {row}"
        )


def as_tensor(name: str, value: Any) -> Tensor:
    """A tensor of what functions of whole data sets take: a tensor, an array, or (nested) sequences of numbers."""
    if isinstance(value, Tensor):
        tensor = value.detach()
        if tensor.device.type == "meta":
            raise ValueError(f"{name} must hold values; got a tensor on the meta device")
    else:
        try:
            # A copy: torch takes neither negative strides nor, without a warning, memory that it may not write.
            tensor = torch.tensor(value.copy() if hasattr(value, "strides") else value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            got = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"{name} must be a tensor or an array of numbers; got {got}") from None
    if tensor.layout != torch.strided or tensor.is_complex():
        raise TypeError(f"{name} must be a dense tensor of real numbers; got {tensor.dtype}, layout {tensor.layout}")
    return tensor


def as_labels(name: str, value: Any, shape: Sequence[int] | None, num_classes: int) -> Tensor:
    """int64 labels in [0, K) of what ``as_tensor`` takes, of `shape` unless None; waits for the device."""
    labels = as_tensor(name, value)
    if labels.numel() and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise TypeError(f"{name} must be integers; got {labels.dtype}")
    if shape is not None:
        _check_shape(name, labels, shape)
    labels = labels.to(torch.int64)
    check_labels(labels, num_classes, None, name)
    return labels


def _check_shape(name: str, value: Tensor, shape: Sequence[int | str]) -> None:
    fits = value.dim() == len(shape) and all(
        isinstance(size, str) or size == actual for size, actual in zip(shape, value.shape, strict=True)
    )
    if not fits:
        expected = f"({shape[0]},)" if len(shape) == 1 else f"({', '.join(map(str, shape))})"
        raise ValueError(f"{name} must have shape {expected}; got {tuple(value.shape)}")


def _range(at_least: float, above: float, at_most: float, below: float) -> str:
    low, high = max(at_least, above), min(at_most, below)
    if low == -math.inf and high == math.inf:
        return "finite"
    if high == math.inf:
        return f"finite and {'at least' if at_least > above else 'above'} {low:g}"
    if low == -math.inf:
        return f"finite and {'at most' if at_most < below else 'below'} {high:g}"
    return f"in {'[' if at_least > above else '('}{low:g}, {high:g}{']' if at_most < below else ')'}"
