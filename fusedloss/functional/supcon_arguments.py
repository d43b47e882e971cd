"""The arguments of a contrastive loss, checked once and brought into the form that the operations take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedloss import ops
from fusedloss.backends import CHECK_VALUES
from fusedloss.backends.reference.supcon import IGNORED, NEGATIVE

_FEATURE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Contrast:
    """Rows as the operations take them: anchors first, then other views, prototypes and rows without gradient."""

    features: Tensor  # (M, D) in the computing dtype
    codes: Tensor  # int32 (M,)
    mask: Tensor | None  # bool (B, B)
    weights: Tensor | None  # (3, M)
    per_positive: Tensor  # (A,)
    temperature: Tensor  # ()
    anchors: int
    learned: int
    unit: bool
    offset: Tensor | None  # (A,): what the biases of the positives add to each loss


@dataclass(frozen=True)
class Extra:
    """Rows beside the batch, and what their similarities count."""

    prototypes: Tensor | None = None
    prototype_labels: Tensor | None = None
    prototype_weight: float = 1.0
    prototype_bias: Tensor | None = None
    contrast: Tensor | None = None
    contrast_labels: Tensor | None = None


class _UnitRows(torch.autograd.Function):
    """u = x / |x| in one pass, and its derivative (g - u <u, g>) / |x| in three."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        length = _length(x)
        return x / length, length

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx, gradient, _):
        x, unit, length = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A second derivative goes through both.
            length = _length(x)
            unit = x / length
        along = (unit * gradient).sum(1, keepdim=True)
        return torch.addcmul(gradient, unit, along, value=-1) / length


def _length(x: Tensor) -> Tensor:
    """``(N, 1)``, infinite for a zero row."""
    # Squares of float32 rows of length 1e20 or 1e-25 fit in float64 alone.
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64).to(x.dtype)
    return length.masked_fill(length == 0, torch.inf)


def unit_rows(x: Tensor) -> Tensor:
    """Each row scaled to length 1, whatever its length; a zero row stays zero and gets no gradient."""
    return _UnitRows.apply(x)[0]


def assembled(
    rows: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    extra: Extra,
    temperature: float | Tensor,
    normalize: bool,
    class_balance: bool,
    ignore_index: int | None,
    anchors: int,
    views: int,
) -> Contrast:
    """Everything but the reduction; the first `anchors` of `rows` are the anchors, and there are labels or a mask."""
    dtype = ops.compute_dtype(rows.dtype)
    parts = [rows]
    if extra.prototypes is not None:
        parts.append(extra.prototypes)
    learned = sum(map(len, parts))
    if extra.contrast is not None:
        parts.append(extra.contrast.detach())
    parts = [part.to(dtype) for part in parts]
    if normalize:
        parts = [unit_rows(part) for part in parts]
    features = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
    if CHECK_VALUES and not torch.compiler.is_compiling():
        _check_finite(features)
    scale = _temperature(temperature, features)
    if mask is not None:
        codes = torch.zeros(len(features), dtype=torch.int32, device=rows.device)
        per_positive = _per_positive_of_mask(mask, anchors, views, dtype)
        return Contrast(features, codes, mask, None, per_positive, scale, anchors, learned, normalize, None)
    assert labels is not None
    classes = _classes(labels, extra, ignore_index)
    codes, size = classes.codes, classes.size.to(dtype)
    prototypes = slice(len(rows), learned)
    share = features.new_ones(len(features))
    total = size[:anchors] - 1
    if extra.prototype_weight != 1.0:
        share[prototypes] = extra.prototype_weight
        total = (classes.sum(share) - share)[:anchors]
    # What subtracting shares other than 1 leaves by rounding is no positive.
    has_positive = (codes[:anchors] >= 0) & ((size[:anchors] > 1) if extra.prototype_weight else (total > 0.5))
    per_positive = torch.where(has_positive, 1 / total, 0.0)
    weights, offset = None, None
    if class_balance or extra.prototype_weight != 1.0 or extra.prototype_bias is not None:
        weights = features.new_ones(3, len(features))
        weights[2] = share
    if class_balance:
        assert weights is not None
        weights[0] = 1 / size
        weights[1] = 1 / (size - 1).clamp(min=1)
    if extra.prototype_bias is not None:
        assert weights is not None
        bias = extra.prototype_bias.detach().to(dtype)
        weights[:2, prototypes] *= bias.exp()
        biases = torch.zeros_like(share)
        biases[prototypes] = bias
        offset = -classes.sum(share * biases)[:anchors] * per_positive
    return Contrast(features, codes, None, weights, per_positive, scale, anchors, learned, normalize, offset)


def _temperature(temperature: float | Tensor, features: Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        return temperature.reshape(()).to(features.dtype)
    return torch.full((), float(temperature), dtype=features.dtype, device=features.device)


class _Classes:
    """Rows by label: int32 codes ``(M,)``, and how many rows share each row's; no shape depends on values."""

    def __init__(self, labels: Tensor, ignore_index: int | None, more: int) -> None:
        ordered, self.order = labels.sort(stable=True)
        steps = torch.zeros_like(ordered)
        steps[1:] = ordered[1:] != ordered[:-1]
        ranks = steps.cumsum(0)
        codes = torch.zeros_like(ranks).scatter(0, self.order, ranks)
        self.first = torch.searchsorted(ranks, codes)
        self.last = torch.searchsorted(ranks, codes, right=True)
        if ignore_index is not None:
            codes = torch.where(labels == ignore_index, IGNORED, codes)
        self.codes = codes.to(torch.int32)
        self.size = self.last - self.first
        if more:
            self.codes = torch.cat([self.codes, self.codes.new_full((more,), NEGATIVE)])
            self.size = torch.cat([self.size, self.size.new_ones(more)])

    def sum(self, values: Tensor) -> Tensor:
        """The sum of values ``(M,)`` over the rows of each row's class, for the rows that have one."""
        sums = torch.cat([values.new_zeros(1, dtype=torch.float64), values[self.order].double().cumsum(0)])
        found = (sums[self.last] - sums[self.first]).to(values.dtype)
        return torch.cat([found, values[len(found) :]])


def _classes(labels: Tensor, extra: Extra, ignore_index: int | None) -> _Classes:
    known = [labels]
    if extra.prototype_labels is not None:
        known.append(extra.prototype_labels)
    unknown = 0
    if extra.contrast_labels is not None:
        known.append(extra.contrast_labels)
    elif extra.contrast is not None:
        unknown = len(extra.contrast)
    return _Classes(torch.cat(known) if len(known) > 1 else labels, ignore_index, unknown)


def _per_positive_of_mask(mask: Tensor, anchors: int, views: int, dtype: torch.dtype) -> Tensor:
    count = (views * mask.sum(1) - mask.diagonal().to(torch.int64)).repeat(anchors // max(len(mask), 1))
    return torch.where(count > 0, 1 / count.to(dtype), 0.0)


def _check_finite(features: Tensor) -> None:
    bad = ~torch.isfinite(features).all(1)
    if bad.any():
        rows = bad.nonzero()[:, 0].tolist()
        shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
        raise ValueError(
            f"features must be finite; rows {shown} are not (view-major, then prototypes, then contrast rows)"
        )


def check_features(name: str, value: Any, width: int | None = None, like: Tensor | None = None) -> None:
    """Raises unless `value` is a floating ``(N, D)`` tensor, of `width` and on the device of `like` where given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if value.dtype not in _FEATURE_DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16; got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {value.layout}")
    if like is None:
        if value.dim() < 2:
            raise ValueError(f"{name} must have shape (B, D) or (B, V, D); got {tuple(value.shape)}")
        return
    if value.dim() != 2 or value.shape[1] != width:
        raise ValueError(f"{name} must have shape (rows, {width}), features' width; got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device of features, {like.device}; got {value.device}")


def checked_labels(name: str, value: Any, rows: int, like: Tensor) -> Tensor:
    """int64 labels, one for each of `rows` rows."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of integers; got {type(value).__name__}")
    if value.dtype not in _LABEL_DTYPES:
        raise TypeError(f"{name} must be integers (int64, int32, int16, int8, uint8); got {value.dtype}")
    # The reference code of SupCon takes labels of shape (B, 1) too.
    if value.dim() == 2 and value.shape[1] == 1:
        value = value.squeeze(1)
    if tuple(value.shape) != (rows,):
        raise ValueError(f"{name} must have shape ({rows},), one label per row; got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device of features, {like.device}; got {value.device}")
    return value.to(torch.int64)


def checked_mask(mask: Any, samples: int, like: Tensor) -> Tensor:
    """The mask as bool ``(B, B)``."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor; got {type(mask).__name__}")
    if tuple(mask.shape) != (samples, samples):
        raise ValueError(f"mask must have shape ({samples}, {samples}), samples x samples; got {tuple(mask.shape)}")
    if mask.device != like.device:
        raise ValueError(f"mask must be on the device of features, {like.device}; got {mask.device}")
    if mask.dtype == torch.bool:
        return mask
    positive = mask != 0
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((positive == mask).all()):
        raise ValueError("mask must hold 0 and 1 (1 where the column is a positive of the row)")
    return positive


def check_temperature(temperature: Any, like: Tensor) -> None:
    """Raises unless T is a positive finite number, or a tensor of one (its value is read on a CPU alone)."""
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1 or not temperature.is_floating_point():
            raise ValueError(
                f"temperature must be a number or a floating tensor with one element; got {temperature.dtype} of "
                f"shape {tuple(temperature.shape)}"
            )
        if temperature.device != like.device:
            raise ValueError(f"temperature must be on the device of features, {like.device}; got {temperature.device}")
        if temperature.device.type != "cpu" or torch.compiler.is_compiling():
            return
        value = float(temperature.detach())
    elif isinstance(temperature, bool) or not hasattr(temperature, "__float__"):
        raise TypeError(f"temperature must be a number or a tensor; got {type(temperature).__name__}")
    else:
        value = float(temperature)
    if not 0 < value < math.inf:
        raise ValueError(f"temperature must be positive and finite; got {value}")
