"""From checked rows and labels to what the contrastive operations read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedloss import ops
from fusedloss.backends import CHECK_VALUES, resolve_backend
from fusedloss.backends.reference.supcon import IGNORED, NEGATIVE
from fusedloss.core.dtypes import compute_dtype
from fusedloss.core.normalize import unit_rows
from fusedloss.core.operands import SupConInputs
from fusedloss.functional.engine import transformed
from fusedloss.functional.supcon_checks import ExtraRows, SupConOptions
from fusedloss.terms.term import readable


class BatchRows(NamedTuple):
    """The rows of the batch, anchors first, with labels or a mask."""

    rows: Tensor  # (N, D)
    labels: Tensor | None  # int64 (N,)
    mask: Tensor | None  # bool (B, B), N = V * B
    num_anchors: int
    ignore_index: int | None  # None where no label means that


class Contrast(NamedTuple):
    """What an operation reads, and what the loss of each anchor takes beyond it."""

    inputs: SupConInputs
    offset: Tensor | None = None  # (A,): what the biases of the positives add to each loss


def kept_anchors(inputs: SupConInputs) -> Tensor:
    """Bool ``(A,)``: which anchors are not ignored."""
    return inputs.codes[: inputs.per_positive.shape[0]] != IGNORED


def contrast_of(batch: BatchRows, extra: ExtraRows, options: SupConOptions, temperature: float | Tensor) -> Contrast:
    """The contrast of the batch's rows with each other and with those of `extra`."""
    if batch.mask is not None:
        return _by_mask(batch, batch.mask, options, temperature)
    absent = None if extra.prototype_bias is None else extra.prototype_bias == -torch.inf
    classes = _classes(batch, extra, absent)
    rows = _joined(batch, extra, classes.codes, options.normalize)
    weights = _Weights(classes, compute_dtype(batch.rows.dtype), batch, extra, options)
    inputs = SupConInputs(
        rows.features,
        classes.codes,
        None,
        weights.columns(),
        weights.per_positive,
        _temperature(temperature, weights.per_positive),
        rows.num_grad_rows,
        options.normalize,
        rows.norms,
    )
    return Contrast(inputs, weights.offset)


def _by_mask(batch: BatchRows, mask: Tensor, options: SupConOptions, temperature: float | Tensor) -> Contrast:
    codes = torch.zeros(batch.rows.shape[0], dtype=torch.int32, device=batch.rows.device)
    rows = _joined(batch, ExtraRows(), codes, options.normalize)
    samples = max(mask.shape[0], 1)
    positives = (batch.rows.shape[0] // samples) * mask.sum(1) - mask.diagonal().to(torch.int64)
    count = positives.repeat(batch.num_anchors // samples)
    per_positive = torch.where(count > 0, 1 / count.to(compute_dtype(batch.rows.dtype)), 0.0)
    scale = _temperature(temperature, per_positive)
    numbers = rows.num_grad_rows, options.normalize
    return Contrast(SupConInputs(rows.features, codes, mask, None, per_positive, scale, *numbers, rows.norms))


class _JoinedRows(NamedTuple):
    """See SupConInputs."""

    features: Tensor
    num_grad_rows: int
    norms: Tensor | None = None


def _joined(batch: BatchRows, extra: ExtraRows, codes: Tensor, normalize: bool) -> _JoinedRows:
    """All rows, and how many of them get gradients."""
    dtype = compute_dtype(batch.rows.dtype)
    parts = [batch.rows] if extra.prototypes is None else [batch.rows, extra.prototypes]
    num_grad_rows = sum(part.shape[0] for part in parts)
    if extra.contrast is not None:
        parts.append(extra.contrast.detach())
    narrow = normalize and _multiplies_16_bits(parts)
    if not narrow:
        parts = [part.to(dtype) for part in parts]
    ignored = codes == IGNORED
    may_ignore = batch.ignore_index is not None or extra.prototype_bias is not None
    if may_ignore and not (readable(ignored) and not bool(ignored.any())):
        # NaN in a row that nobody contrasts would be NaN in everyone's gradient.
        of_parts = ignored.split([part.shape[0] for part in parts])
        parts = [part.masked_fill(rows.unsqueeze(1), 0.0) for part, rows in zip(parts, of_parts, strict=True)]
    if CHECK_VALUES and not torch.compiler.is_compiling():
        _check_finite(torch.cat(parts))
    if normalize and not narrow:
        parts = [unit_rows(part) for part in parts]
    features = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
    return _JoinedRows(features, num_grad_rows, ops.row_norms(features) if narrow else None)


def _multiplies_16_bits(parts: list[Tensor]) -> bool:
    """Whether a backend takes these rows as they are, lengths apart."""
    dtype = parts[0].dtype
    narrow = dtype in (torch.bfloat16, torch.float16) and all(part.dtype == dtype for part in parts)
    return narrow and not transformed() and resolve_backend(parts[0].device.type) == "triton"


class _Classes:
    """Rows by label: int32 codes ``(M,)``, and how many rows share each row's; no shape depends on values."""

    def __init__(self, labels: Tensor, ignored: Tensor | None, absent: Tensor | None, unlabelled: int) -> None:
        ordered, self.order = labels.sort(stable=True)
        steps = torch.zeros_like(ordered)
        steps[1:] = ordered[1:] != ordered[:-1]
        ranks = steps.cumsum(0)
        codes = torch.zeros_like(ranks).scatter(0, self.order, ranks)
        self.first = torch.searchsorted(ranks, codes)
        self.last = torch.searchsorted(ranks, codes, right=True)
        size = self.last - self.first
        if absent is not None:
            size = self.sum((~absent).to(torch.float64)).to(size.dtype)
            ignored = absent if ignored is None else ignored | absent
        if ignored is not None:
            codes = torch.where(ignored, IGNORED, codes)
        self.codes, self.size = codes.to(torch.int32), size
        if unlabelled:
            # Each is a class of its own and nobody's positive.
            self.codes = torch.cat([self.codes, self.codes.new_full((unlabelled,), NEGATIVE)])
            self.size = torch.cat([size, size.new_ones(unlabelled)])

    def sum(self, values: Tensor) -> Tensor:
        """The sum of values ``(M,)`` over the rows of each row's class; unlabelled rows keep their own."""
        sums = torch.cat([values.new_zeros(1, dtype=torch.float64), values[self.order].double().cumsum(0)])
        of_labelled = (sums[self.last] - sums[self.first]).to(values.dtype)
        return torch.cat([of_labelled, values[self.order.shape[0] :]])


def _classes(batch: BatchRows, extra: ExtraRows, absent: Tensor | None) -> _Classes:
    assert batch.labels is not None
    given = (batch.labels, extra.prototype_labels, extra.contrast_labels)
    known = [labels for labels in given if labels is not None]
    unlabelled = 0 if extra.contrast is None or extra.contrast_labels is not None else extra.contrast.shape[0]
    labels = torch.cat(known) if len(known) > 1 else batch.labels
    ignored = None if batch.ignore_index is None else labels == batch.ignore_index
    if absent is not None:
        after = labels.shape[0] - batch.rows.shape[0] - absent.shape[0]
        absent = torch.cat([absent.new_zeros(batch.rows.shape[0]), absent, absent.new_zeros(after)])
    return _Classes(labels, ignored, absent, unlabelled)


class _Weights:
    """What a column weighs as a contrast and in the mean over positives, and what follows for the anchors."""

    def __init__(
        self, classes: _Classes, dtype: torch.dtype, batch: BatchRows, extra: ExtraRows, options: SupConOptions
    ) -> None:
        self.classes, self.class_balance = classes, options.class_balance
        self.size, self.bias, self.offset = classes.size.to(dtype), extra.prototype_bias, None
        anchors, share_of_prototype = batch.num_anchors, options.prototype_weight
        count = 0 if extra.prototypes is None else extra.prototypes.shape[0]
        self.prototypes = slice(batch.rows.shape[0], batch.rows.shape[0] + count)
        self.share: Tensor | None = None
        total = self.size[:anchors] - 1
        if share_of_prototype != 1.0 or self.bias is not None:
            self.share = torch.ones_like(self.size)
            self.share[self.prototypes] = share_of_prototype
            self.share = self.share.masked_fill(classes.codes == IGNORED, 0.0)
        if share_of_prototype != 1.0 and self.share is not None:
            total = (classes.sum(self.share) - self.share)[:anchors]
        # What subtracting shares other than 1 leaves by rounding is no positive.
        several = self.size[:anchors] > 1 if share_of_prototype else total > 0.5
        self.per_positive = torch.where((classes.codes[:anchors] >= 0) & several, 1 / total, 0.0)
        if self.bias is not None and self.share is not None:
            biases = torch.zeros_like(self.share)
            biases[self.prototypes] = self._finite_bias().to(biases.dtype)
            self.offset = -classes.sum(self.share * biases)[:anchors] * self.per_positive

    def columns(self) -> Tensor | None:
        """``(3, M)``, or None for ones."""
        if not self.class_balance and self.share is None:
            return None
        weights = self.size.new_ones(3, self.size.shape[0])
        if self.share is not None:
            weights[2] = self.share
        if self.class_balance:
            weights[0] = 1 / self.size.clamp(min=1)
            weights[1] = 1 / (self.size - 1).clamp(min=1)
        if self.bias is not None:
            weights[:2, self.prototypes] *= self._finite_bias().to(weights.dtype).exp()
        return weights

    def _finite_bias(self) -> Tensor:
        assert self.bias is not None
        return self.bias.masked_fill(self.bias == -torch.inf, 0.0)


def _temperature(temperature: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        return temperature.reshape(()).to(like.dtype)
    return torch.full((), float(temperature), dtype=like.dtype, device=like.device)


def _check_finite(features: Tensor) -> None:
    bad = ~torch.isfinite(features).all(1)
    if bad.any():
        rows = bad.nonzero()[:, 0].tolist()
        shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
        raise ValueError(
            f"features must be finite; got other values in rows {shown} (view-major, then prototypes, then contrast)"
        )
