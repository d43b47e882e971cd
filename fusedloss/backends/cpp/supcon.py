"""supcon on the CPU: PyTorch multiplies panels of similarities, csrc/supcon.inl turns them into sums and slopes.

A panel is some rows and every column from its first row on: each pair is computed once and stands for both directions,
so that the sums cost half a matrix product and the gradient one and a half.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusedloss.backends.cpp import extension
from fusedloss.backends.cpp.views import address
from fusedloss.backends.reference.supcon import IGNORED

# A panel that stays in the second-level cache.
PANEL_BYTES = 4 << 20
FEWEST_ROWS, MOST_ROWS = 64, 128
# exp(s - shift) with one shift for all rows keeps its digits in float32 over such a range of s.
WIDEST_RANGE = 80.0


def supcon_stats(
    features: Tensor,
    codes: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    per_positive: Tensor,
    temperature: Tensor,
    anchors: int,
    unit: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = _kept(codes)
    if kept is not None:
        return _stats_of_kept(kept, features, codes, weights, per_positive, temperature, anchors, unit)
    panels = _Panels(features, codes, mask, weights, float(temperature), anchors, unit)
    shift = panels.largest_similarities()
    sums = torch.zeros(2, anchors, dtype=torch.float64)
    places = (sums[0].data_ptr(), sums[1].data_ptr())
    for panel, _ in panels:
        extension.supcon_sums(panel, panels.is_double, anchors, places, torch.get_num_threads())
    share = per_positive.double()
    loss = torch.where(per_positive > 0, sums[0].log() - sums[1] * share, 0.0)
    return loss.to(features.dtype), shift[:anchors].clone(), sums[0].to(features.dtype)


def supcon_backward(
    features: Tensor,
    codes: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    per_positive: Tensor,
    temperature: Tensor,
    row_shift: Tensor,
    row_sum: Tensor,
    upstream: Tensor,
    anchors: int,
    learned: int,
    unit: bool,
    wanted: list[bool],
) -> list[Tensor]:
    kept = _kept(codes)
    if kept is not None:
        given = (features, codes, weights, per_positive, temperature, row_shift, row_sum, upstream)
        return _sweep_of_kept(kept, *given, anchors, learned, unit, wanted)
    panels = _Panels(features, codes, mask, weights, float(temperature), anchors, unit)
    panels.use_shifts(row_shift)
    upstream = torch.where(per_positive > 0, upstream, 0.0) / float(temperature)
    slopes = features.new_zeros(2, len(features))
    slopes[0, :anchors] = torch.where(upstream == 0, 0.0, upstream / row_sum)
    slopes[1, :anchors] = upstream * per_positive
    places = (slopes[0].data_ptr(), slopes[1].data_ptr())
    gradient = torch.zeros_like(features)
    moment = 0.0
    for panel, similarity in panels:
        moment += extension.supcon_backward(panel, panels.is_double, places, torch.get_num_threads())
        if not wanted[0]:
            continue
        rows, columns = panel[1], min(learned - panel[1], similarity.shape[1])
        last = rows + len(similarity)
        gradient[rows:last].addmm_(similarity, features[rows:])
        gradient[rows : rows + columns].addmm_(similarity[:, :columns].t(), features[rows:last])
    found = [gradient] if wanted[0] else []
    return [*found, features.new_tensor(-moment)] if wanted[1] else found


class _Panels:
    """Iterates over (the tuple that bind_supcon.cpp unpacks, the similarities), always in the same memory."""

    def __init__(
        self,
        features: Tensor,
        codes: Tensor,
        mask: Tensor | None,
        weights: Tensor | None,
        temperature: float,
        anchors: int,
        unit: bool,
    ) -> None:
        self.features, self.codes, self.mask, self.weights, self.anchors = features, codes, mask, weights, anchors
        self.scaled = features[:anchors] / temperature
        self.is_double = features.dtype == torch.float64
        columns = max(len(features), 1)
        fitting = PANEL_BYTES // (columns * features.element_size())
        self.rows = min(max(fitting, FEWEST_ROWS), MOST_ROWS, max(anchors, 1))
        self.buffer = features.new_empty(self.rows * columns)
        self.common = _common_shift(features, weights, temperature, unit)
        self.shift = features.new_full((columns,), self.common if self.common is not None else -torch.inf)
        # A contrast that is no anchor has no sum.
        self.shift[anchors:] = 0.0

    def largest_similarities(self) -> Tensor:
        """The shift of each row: what is subtracted before exp."""
        if self.common is None:
            for panel, _ in self:
                extension.supcon_maxima(panel, self.is_double, self.anchors, torch.get_num_threads())
            self.shift.masked_fill_(self.shift == -torch.inf, 0.0)
        return self.shift

    def use_shifts(self, row_shift: Tensor) -> None:
        """The shifts that an earlier pass found."""
        self.shift[: self.anchors] = row_shift

    def __iter__(self) -> Iterator[tuple[tuple, Tensor]]:
        features = self.features
        weights = [0, 0, 0] if self.weights is None else [row.data_ptr() for row in self.weights]
        shift = 0 if self.common is not None else self.shift.data_ptr()
        for first in range(0, self.anchors, self.rows):
            last, columns = min(first + self.rows, self.anchors), len(features) - first
            similarity = self.buffer[: (last - first) * columns].view(last - first, columns)
            torch.mm(self.scaled[first:last], features[first:].t(), out=similarity)
            mask, mask_back = _mask_panel(self.mask, first, last, len(features))
            panel = (similarity.data_ptr(), first, last - first, columns, self.codes.data_ptr())
            yield (*panel, address(mask), address(mask_back), self.common or 0.0, shift, *weights), similarity


def _common_shift(features: Tensor, weights: Tensor | None, temperature: float, unit: bool) -> float | None:
    """A bound of all similarities, where exp(s - bound) loses no digits; None where each row needs its own."""
    largest = 1.0 if unit or not len(features) else float(torch.linalg.vector_norm(features, dim=1).max()) ** 2
    bound = largest / temperature
    spread = 0.0
    if weights is not None:
        counted = weights[:2][weights[:2] > 0].log()
        spread = float(counted.max() - counted.min()) if len(counted) else 0.0
    return bound if 2 * bound + spread <= WIDEST_RANGE else None


def _mask_panel(mask: Tensor | None, first: int, last: int, rows: int) -> tuple[Tensor | None, Tensor | None]:
    """The mask of some rows and all columns from the first of them on, and the same of its transpose."""
    if mask is None:
        return None, None
    samples = torch.arange(first, last) % len(mask)
    columns = torch.arange(first, rows) % len(mask)
    return mask[samples][:, columns].contiguous(), mask[:, samples].t()[:, columns].contiguous()


def _kept(codes: Tensor) -> Tensor | None:
    """The rows that are not ignored; None for all of them."""
    ignored = codes == IGNORED
    return (~ignored).nonzero()[:, 0] if bool(ignored.any()) else None


def _stats_of_kept(kept, features, codes, weights, per_positive, temperature, anchors, unit):
    of_anchors = kept[kept < anchors]
    weights = None if weights is None else weights[:, kept].contiguous()
    found = supcon_stats(
        features[kept], codes[kept], None, weights, per_positive[of_anchors], temperature, len(of_anchors), unit
    )
    spread = [tensor.new_zeros(anchors) for tensor in found]
    for tensor, values in zip(spread, found, strict=True):
        tensor[of_anchors] = values
    return tuple(spread)


def _sweep_of_kept(kept, features, codes, weights, per_positive, temperature, row_shift, row_sum, upstream,
                   anchors, learned, unit, wanted):  # fmt: skip
    of_anchors = kept[kept < anchors]
    weights = None if weights is None else weights[:, kept].contiguous()
    rows = (per_positive[of_anchors], temperature, row_shift[of_anchors], row_sum[of_anchors], upstream[of_anchors])
    counts = (len(of_anchors), int((kept < learned).sum()))
    found = supcon_backward(features[kept], codes[kept], None, weights, *rows, *counts, unit, wanted)
    if wanted[0]:
        found[0] = torch.zeros_like(features).index_copy_(0, kept, found[0])
    return found
