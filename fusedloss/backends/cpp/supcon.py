"""supcon on the CPU: PyTorch multiplies panels of similarities, csrc/supcon.inl turns them into sums and gradients.

A panel is some rows and every column from its first row on: each pair is computed once and stands for both directions,
so that the sums cost half a matrix product and the gradient one and a half.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusedloss.backends.cpp import extension
from fusedloss.backends.cpp.views import address
from fusedloss.backends.reference.supcon import IGNORED, wide_rows
from fusedloss.core.operands import AnchorSums, SavedAnchors, SupConInputs, SupConMask

# A panel that stays in the second-level cache.
PANEL_BYTES = 4 << 20
FEWEST_ROWS, MOST_ROWS = 64, 128
# exp(s - shift) with one shift for all rows keeps its digits in float32 over such a range of s.
WIDEST_RANGE = 80.0


def supcon_stats(inputs: SupConInputs) -> AnchorSums:
    """The loss of each anchor, its shift and its sum of exponentials; the contract is the reference's."""
    if inputs.norms is not None:
        return supcon_stats(inputs._replace(features=wide_rows(inputs), norms=None))
    kept = _kept_rows(inputs)
    if kept is not None:
        return _of_all_anchors(supcon_stats(_without_ignored(inputs, kept)), inputs, kept)
    panels = _Panels(inputs)
    panels.take_largest_similarities()
    sums = inputs.features.new_zeros(2, len(inputs.features), dtype=torch.float64)
    for panel, _ in panels:
        extension.supcon_sums(panel, address(sums[0]), address(sums[1]), threads=torch.get_num_threads())
    totals, positives = sums[:, : inputs.num_anchors]
    loss = torch.where(inputs.per_positive > 0, totals.log() - positives * inputs.per_positive.double(), 0.0)
    dtype = inputs.features.dtype
    return AnchorSums(loss.to(dtype), panels.anchor_shift(), totals.to(dtype))


def supcon_backward(inputs: SupConInputs, saved: SavedAnchors, grad_loss: Tensor, mask: SupConMask) -> list[Tensor]:
    """The gradients that `mask` names, from those of the losses; rows from ``num_grad_rows`` on have zeros."""
    if inputs.norms is not None:
        return _backward_of_16_bits(inputs, saved, grad_loss, mask)
    kept = _kept_rows(inputs)
    if kept is not None:
        return _backward_of_kept(inputs, saved, grad_loss, mask, kept)
    panels = _Panels(inputs)
    total = panels.use_shifts(saved)
    anchors = inputs.num_anchors
    grad_loss = torch.where(inputs.per_positive > 0, grad_loss, 0.0) / inputs.temperature
    coefficients = inputs.features.new_zeros(2, len(inputs.features))
    coefficients[0, :anchors] = torch.where(grad_loss == 0, 0.0, grad_loss / total)
    coefficients[1, :anchors] = grad_loss * inputs.per_positive
    softmax, positive = address(coefficients[0]), address(coefficients[1])
    features = panels.inputs.features
    grad = torch.zeros_like(features) if mask.features else None
    moment = 0.0
    for panel, similarity in panels:
        moment += extension.supcon_backward(panel, softmax, positive, threads=torch.get_num_threads())
        if grad is None:
            continue
        first, last = panel.first, panel.first + panel.rows
        columns = min(inputs.num_grad_rows - first, panel.columns)
        grad[first:last].addmm_(similarity, features[first:])
        grad[first : first + columns].addmm_(similarity[:, :columns].t(), features[first:last])
    grads = [] if grad is None else [grad]
    return [*grads, features.new_full((), -moment)] if mask.temperature else grads


def _backward_of_16_bits(
    inputs: SupConInputs, saved: SavedAnchors, grad_loss: Tensor, mask: SupConMask
) -> list[Tensor]:
    features = inputs.features.detach().requires_grad_(mask.features)
    with torch.enable_grad():
        wide = wide_rows(inputs._replace(features=features))
    grads = supcon_backward(inputs._replace(features=wide.detach(), norms=None), saved, grad_loss, mask)
    if mask.features:
        grads[0] = torch.autograd.grad(wide, features, grads[0])[0]
    return grads


class _Panels:
    """Iterates over (the panel that csrc reads, its similarities), always in the same memory."""

    def __init__(self, inputs: SupConInputs) -> None:
        self.inputs = inputs = _addressable(inputs)
        features, self.anchors = inputs.features, inputs.num_anchors
        temperature = float(inputs.temperature)
        self.scaled = features[: self.anchors] / temperature
        columns = max(len(features), 1)
        fitting = PANEL_BYTES // (columns * features.element_size())
        self.rows = min(max(fitting, FEWEST_ROWS), MOST_ROWS, max(self.anchors, 1))
        self.buffer = features.new_empty(self.rows * columns)
        self.common = _common_shift(inputs, temperature)
        if self.common is None:
            self.shift = features.new_full((columns,), -torch.inf)
            # A contrast that is no anchor has no sum.
            self.shift[self.anchors :] = 0.0
        self.panel = self._panel()

    def _panel(self) -> Any:
        inputs, panel = self.inputs, extension.SupConPanel()
        panel.is_double = inputs.features.dtype == torch.float64
        panel.similarity, panel.codes = address(self.buffer), address(inputs.codes)
        if self.common is None:
            panel.row_shift = address(self.shift)
        else:
            panel.common_shift = self.common
        if inputs.weights is not None:
            panel.negative_weight, panel.positive_weight, panel.share = map(address, inputs.weights)
        return panel

    def take_largest_similarities(self) -> None:
        """Takes each row's largest similarity for its shift, which is subtracted before exp, unless one serves all."""
        if self.common is None:
            for panel, _ in self:
                extension.supcon_maxima(panel, self.anchors, threads=torch.get_num_threads())
            self.shift.masked_fill_(self.shift == -torch.inf, 0.0)

    def anchor_shift(self) -> Tensor:
        """The shift of each anchor."""
        if self.common is not None:
            return self.inputs.features.new_full((self.anchors,), self.common)
        return self.shift[: self.anchors].clone()

    def use_shifts(self, saved: SavedAnchors) -> Tensor:
        """Takes the shifts of an earlier pass, of any backend; returns its sums as they are with the shifts in use."""
        if self.common is None:
            self.shift[: self.anchors] = saved.shift
            return saved.sum
        return saved.sum * (saved.shift - self.common).exp()

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        features, panel = self.inputs.features, self.panel
        for first in range(0, self.anchors, self.rows):
            last, columns = min(first + self.rows, self.anchors), len(features) - first
            similarity = self.buffer[: (last - first) * columns].view(last - first, columns)
            torch.mm(self.scaled[first:last], features[first:].t(), out=similarity)
            panel.first, panel.rows, panel.columns = first, last - first, columns
            # Held here until the next panel.
            masks = _mask_panel(self.inputs.mask, first, last, len(features))
            panel.mask, panel.mask_back = map(address, masks)
            yield panel, similarity


def _addressable(inputs: SupConInputs) -> SupConInputs:
    """The tensors as addresses describe them: contiguous, and no view that negates on reading."""
    return inputs._replace(
        features=_resolved(inputs.features),
        codes=_resolved(inputs.codes),
        mask=None if inputs.mask is None else _resolved(inputs.mask),
        weights=None if inputs.weights is None else _resolved(inputs.weights),
    )


def _resolved(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_neg().contiguous()


def _common_shift(inputs: SupConInputs, temperature: float) -> float | None:
    """A bound of all similarities, where exp(s - bound) loses no digits; None where each row needs its own."""
    features, weights = inputs.features, inputs.weights
    largest = 1.0
    if not inputs.normalized and len(features):
        largest = float(torch.linalg.vector_norm(features, dim=1).max()) ** 2
    bound = largest / temperature
    spread = 0.0
    if weights is not None:
        logs = weights[:2][weights[:2] > 0].log()
        spread = float(logs.max() - logs.min()) if len(logs) else 0.0
    return bound if 2 * bound + spread <= WIDEST_RANGE else None


def _mask_panel(mask: Tensor | None, first: int, last: int, rows: int) -> tuple[Tensor | None, Tensor | None]:
    """The mask of some rows and all columns from the first of them on, and the same of its transpose."""
    if mask is None:
        return None, None
    samples = torch.arange(first, last, device=mask.device) % len(mask)
    columns = torch.arange(first, rows, device=mask.device) % len(mask)
    return mask[samples][:, columns].contiguous(), mask[:, samples].t()[:, columns].contiguous()


def _kept_rows(inputs: SupConInputs) -> Tensor | None:
    """The rows that are not ignored; None for all of them."""
    if inputs.mask is not None:
        return None
    ignored = inputs.codes == IGNORED
    return (~ignored).nonzero()[:, 0] if bool(ignored.any()) else None


def _without_ignored(inputs: SupConInputs, kept: Tensor) -> SupConInputs:
    """The contrast of the rows that are not ignored, by codes."""
    return inputs._replace(
        features=inputs.features[kept],
        codes=inputs.codes[kept],
        weights=None if inputs.weights is None else inputs.weights[:, kept],
        per_positive=inputs.per_positive[kept[kept < inputs.num_anchors]],
        num_grad_rows=int((kept < inputs.num_grad_rows).sum()),
    )


def _of_all_anchors(sums: AnchorSums, inputs: SupConInputs, kept: Tensor) -> AnchorSums:
    """The sums of the anchors that are not ignored, and zeros for the others."""
    anchors = kept[kept < inputs.num_anchors]
    return AnchorSums(*(values.new_zeros(inputs.num_anchors).index_copy_(0, anchors, values) for values in sums))


def _backward_of_kept(
    inputs: SupConInputs, saved: SavedAnchors, grad_loss: Tensor, mask: SupConMask, kept: Tensor
) -> list[Tensor]:
    anchors = kept[kept < inputs.num_anchors]
    saved = SavedAnchors(saved.shift[anchors], saved.sum[anchors])
    grads = supcon_backward(_without_ignored(inputs, kept), saved, grad_loss[anchors], mask)
    if mask.features:
        grads[0] = torch.zeros_like(inputs.features).index_copy_(0, kept, grads[0])
    return grads
