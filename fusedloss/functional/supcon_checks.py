"""Checks of what a contrastive loss is called with: options, and tensors of rows and labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fusedloss.core.checks import (
    check_bool,
    check_choice,
    check_ignore_index,
    check_labels,
    check_number,
    check_tensor,
)
from fusedloss.core.dtypes import FLOATING, compute_dtype
from fusedloss.terms.term import readable

REDUCTIONS = ("mean", "mean_all", "sum", "none")
MODES = ("all", "one")
_LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class SupConOptions(NamedTuple):
    """The options of a contrastive loss that are no tensors; see ``fusedloss.supcon``."""

    normalize: bool = True
    reduction: str = "mean"
    class_balance: bool = False
    ignore_index: int = -100
    contrast_mode: str = "all"
    prototype_weight: float = 1.0
    focal_gamma: float = 0.0

    def check(self) -> None:
        """Raises for an option of the wrong type or out of range."""
        check_bool("normalize", self.normalize)
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_bool("class_balance", self.class_balance)
        check_ignore_index(self.ignore_index)
        check_choice("contrast_mode", self.contrast_mode, MODES)
        check_number("prototype_weight", self.prototype_weight, at_least=0.0)
        check_number("focal_gamma", self.focal_gamma, at_least=0.0)


class ExtraRows(NamedTuple):
    """Rows that are contrasts beside the batch's."""

    prototypes: Tensor | None = None  # (P, D)
    prototype_labels: Tensor | None = None  # (P,)
    prototype_bias: Tensor | None = None  # (P,)
    contrast: Tensor | None = None  # (Q, D), without gradient
    contrast_labels: Tensor | None = None  # (Q,)


def check_temperature(temperature: object, like: Tensor) -> None:
    """Raises unless T is a positive finite number, or a tensor of one (its value is read on a CPU alone)."""
    if not isinstance(temperature, Tensor):
        check_number("temperature", temperature, above=0.0)
        return
    if temperature.numel() != 1 or not temperature.is_floating_point():
        got = f"{temperature.dtype} of shape {tuple(temperature.shape)}"
        raise ValueError(f"temperature must be a number or a floating-point tensor with one element; got {got}")
    _check_device("temperature", temperature, like)
    if readable(temperature):
        check_number("temperature", float(temperature.detach()), above=0.0)


def check_features(name: str, value: object, like: Tensor | None = None) -> None:
    """Raises unless `value` holds rows of features; those of `like` (N, D) have their width and device too."""
    tensor = _checked_tensor(name, value, "a floating-point tensor")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16; got {tensor.dtype}")
    shape = tuple(tensor.shape)
    if like is None:
        if tensor.dim() < 2:
            raise ValueError(f"{name} must have shape (B, D) or (B, V, D); got {shape}")
        if tensor.dim() > 2 and tensor.shape[1] == 0:
            raise ValueError(f"{name} must have at least one view of each sample, (B, V, D); got {shape}")
        return
    if tensor.dim() != 2 or tensor.shape[1] != like.shape[1]:
        raise ValueError(f"{name} must have shape (rows, {like.shape[1]}), features' width; got {shape}")
    _check_device(name, tensor, like)


def checked_labels(name: str, value: object, rows: int, like: Tensor) -> Tensor:
    """int64 labels, one for each of `rows` rows."""
    labels = _checked_tensor(name, value, "a tensor of integers")
    if labels.dtype not in _LABEL_DTYPES:
        raise TypeError(f"{name} must be integers (int64, int32, int16, int8, uint8); got {labels.dtype}")
    # The reference code of SupCon takes labels of shape (B, 1) too.
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if labels.dim() != 1 or labels.shape[0] != rows:
        hint = f" ({name}.argmax(1) makes labels of one-hot rows)" if labels.dim() == 2 else ""
        raise ValueError(f"{name} must have shape ({rows},), one label per row; got {tuple(labels.shape)}{hint}")
    _check_device(name, labels, like)
    return labels.to(torch.int64)


def checked_mask(value: object, samples: int, like: Tensor) -> Tensor:
    """The mask as bool ``(B, B)``."""
    mask = _checked_tensor("mask", value, "a tensor")
    if mask.is_complex():
        raise TypeError(f"mask must be bool, or 0 and 1 in an integer or floating-point type; got {mask.dtype}")
    if mask.dim() != 2 or mask.shape[0] != samples or mask.shape[1] != samples:
        got = tuple(mask.shape)
        raise ValueError(f"mask must have shape ({samples}, {samples}), samples x samples; got {got}")
    _check_device("mask", mask, like)
    if mask.dtype == torch.bool:
        return mask
    positive = mask != 0
    if readable(mask) and not bool((positive == mask).all()):
        wrong = mask[positive != mask][0].item()
        raise ValueError(f"mask must hold 0 and 1 (1 where the column is a positive of the row); got {wrong}")
    return positive


def checked_extra(extra: ExtraRows, rows: Tensor, labels: Tensor | None, mask: Tensor | None) -> ExtraRows:
    """The rows beside those of the batch, with int64 labels."""
    for name, value in (("prototypes", extra.prototypes), ("contrast", extra.contrast)):
        if value is None:
            continue
        check_features(name, value, rows)
        if mask is not None:
            raise ValueError(f"{name} must be None with a mask, which says nothing of them; got a tensor")
    return ExtraRows(
        extra.prototypes,
        _prototype_labels(extra, rows, labels),
        _prototype_bias(extra, rows),
        extra.contrast,
        _contrast_labels(extra, rows, labels),
    )


def checked_class_weight(value: object, like: Tensor | None = None) -> Tensor:
    """The weights of the classes ``(K,)``, on the device of `like` where given."""
    weight = check_tensor("class_weight", value, ("K",), like=like, of="features")
    if weight.shape[0] == 0:
        raise ValueError("class_weight must have shape (K,) with at least one class; got (0,)")
    _check_values("class_weight", weight, "at least 0 and finite", lambda x: (x >= 0) & (x < math.inf))
    return weight


def anchor_weight(class_weight: object, labels: Tensor | None, ignore_index: int, features: Tensor) -> Tensor | None:
    """The class weight of each row's label, 0 for ignored rows; None without class weights."""
    if class_weight is None:
        return None
    if labels is None:
        raise ValueError("class_weight must be None without labels; got a value")
    weight = checked_class_weight(class_weight, features)
    kept = labels != ignore_index
    if readable(labels):
        check_labels(labels, weight.shape[0], ignore_index)
    picked = weight.to(compute_dtype(features.dtype))[torch.where(kept, labels, 0)]
    return torch.where(kept, picked, 0.0)


def _prototype_labels(extra: ExtraRows, rows: Tensor, labels: Tensor | None) -> Tensor | None:
    given = {"prototypes": extra.prototypes, "prototype_labels": extra.prototype_labels}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 1:
        raise ValueError(f"{missing[0]} must be given where prototypes or prototype_labels are; got None")
    if extra.prototypes is None:
        return None
    if labels is None:
        raise ValueError("labels must be given with prototypes, or every sample is a class of its own; got None")
    return checked_labels("prototype_labels", extra.prototype_labels, extra.prototypes.shape[0], rows)


def _prototype_bias(extra: ExtraRows, rows: Tensor) -> Tensor | None:
    if extra.prototype_bias is None:
        return None
    if extra.prototypes is None:
        raise ValueError("prototype_bias must be None where there are no prototypes; got a value")
    bias = check_tensor("prototype_bias", extra.prototype_bias, extra.prototypes.shape[:1], like=rows, of="features")
    # exp(bias) has to be a float32.
    _check_values("prototype_bias", bias, "at most 80 (-inf leaves a prototype out)", lambda x: x <= 80)
    return bias.detach()


def _contrast_labels(extra: ExtraRows, rows: Tensor, labels: Tensor | None) -> Tensor | None:
    if extra.contrast_labels is None:
        return None
    for name, value in (("contrast", extra.contrast), ("labels", labels)):
        if value is None:
            raise ValueError(f"{name} must be given with contrast_labels; got None")
    assert extra.contrast is not None
    return checked_labels("contrast_labels", extra.contrast_labels, extra.contrast.shape[0], rows)


def _checked_tensor(name: str, value: object, allowed: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be {allowed}; got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {value.layout}")
    return value


def _check_device(name: str, value: Tensor, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device of features, {like.device}; got {value.device}")


def _check_values(name: str, value: Tensor, allowed: str, fits: Callable[[Tensor], Tensor]) -> None:
    """ValueError naming the first value that does not fit; values are read on a CPU alone."""
    if not readable(value):
        return
    bad = ~fits(value.detach())
    if bool(bad.any()):
        place = int(bad.nonzero()[0])
        raise ValueError(f"{name} must be {allowed}; got {value[place].item()} at {place}")
