"""Softmax cross-entropy and the row statistics on a GPU: the schema's functions over the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fusedloss.core.operands import (
    LogitInputs,
    RowInputs,
    SavedStatistics,
    SoftmaxMask,
    SoftmaxStatistics,
    StatisticsGrads,
    StatisticsOptions,
)
from fusedloss.core.row_loss import RowOptions, needs_hinge, needs_smooth_loss

from . import launch
from .blocks import Inputs, tanh_cap
from .layout import View, layout_of
from .rows import CrossEntropyArguments, Scalars, focal_row, label_row, soft_row
from .slopes import SAVED, SAVED_OF_HINGE, Outputs, Saved
from .softmax_kernels import Sizes, column_kernel, label_kernel, row_kernel, scale_kernel
from .statistics_rows import StatisticsArguments, SweepArguments, statistics_row, sweep_row
from .sums import computed_top, saved_top

_NO_VIEW = View(None, None, None, None)
_NO_OUTPUTS = Outputs(*_NO_VIEW, None, None)
_NOT_SAVED = Saved(None, None, None)


def softmax_ce(
    inputs: LogitInputs,
    rows: RowInputs,
    options: RowOptions,
    mean: bool,
    mask: SoftmaxMask,
    grad_scale: float = 1.0,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The scalar loss, the loss of each row, and the gradients of the scalar one that `mask` names."""
    # Programs that own classes read logits which others have written over.
    call = _Call(inputs, mask.logits, in_place and not mask.affine)
    denominator = call.denominator() if mean else None
    if not mean:
        call.check_labels()
    row_loss = call.new_rows()
    of_rows = [call.new_rows() if needed else None for needed in mask[2:]]
    grad_override, grad_smoothing, grad_strength = of_rows
    arguments = CrossEntropyArguments(
        row_loss,
        grad_smoothing,
        grad_override,
        grad_strength,
        rows.label_smoothing,
        rows.sample_weight,
        rows.penalty_strength,
        denominator,
    )
    row = soft_row if call.soft else focal_row if options.focal_gamma != 0 else label_row
    call.uniform = needs_smooth_loss(options, rows) or mask.label_smoothing
    if needs_hinge(options, rows):
        call.top = computed_top
    call.scalars = Scalars(
        smoothing=float(options.label_smoothing),
        focal_gamma=float(options.focal_gamma),
        z_loss=float(options.z_loss),
        soft_cap=float(inputs.soft_cap),
        penalty=float(options.penalty_strength),
        penalty_margin=float(options.penalty_margin),
        penalty_share=float(options.penalty_scale),
        penalty_mix=float(options.penalty_mix),
    )
    grads = call.run(row, arguments, mask.affine)
    loss = row_loss.sum() if rows.sample_weight is None else (row_loss * rows.sample_weight).sum()
    if denominator is not None:
        # Torch's smoothed loss is 0 / 0 too where no kept row has weight.
        loss = torch.where(denominator == 0, torch.nan, loss / denominator)
    grads += [grad for grad in of_rows if grad is not None]
    if grad_scale != 1:
        for grad in grads:
            grad.mul_(grad_scale)
    return loss, row_loss, grads


def softmax_stats(inputs: LogitInputs, options: StatisticsOptions) -> SoftmaxStatistics:
    """The statistics of each row; those that were not asked for are empty."""
    call = _Call(inputs, want_logits=False)
    call.check_labels()
    found = StatisticsArguments(
        row_max=call.new_rows(),
        row_sum=call.new_rows(),
        log_sum_exp=call.new_rows(),
        target_logit=call.new_rows(),
        cross_entropy=call.new_rows(),
        uniform=call.new_rows() if options.smooth_loss else None,
        rest=call.new_rows(),
        hinge=call.new_rows() if options.hinge else None,
        prediction=call.new_rows(torch.int64) if options.prediction else None,
        confidence=call.new_rows() if options.prediction else None,
    )
    call.uniform, call.prediction = options.smooth_loss, options.prediction
    call.top = computed_top if options.hinge else None
    call.scalars = Scalars(soft_cap=float(inputs.soft_cap), penalty_margin=float(options.penalty_margin))
    call.run(statistics_row, found)
    empty = {name: call.new(0) for name in ("uniform", "hinge", "confidence") if getattr(found, name) is None}
    if found.prediction is None:
        empty["prediction"] = call.new(0, dtype=torch.int64)
    return SoftmaxStatistics(*found._replace(**empty))


def softmax_stats_backward(
    inputs: LogitInputs,
    saved: SavedStatistics,
    penalty_margin: float,
    grads: StatisticsGrads,
    mask: SoftmaxMask,
    in_place: bool = False,
) -> list[Tensor]:
    """Gradients under any upstream gradients; long rows are read once from the saved sums, twice with a hinge."""
    # Programs that own classes read logits which others have written over.
    call = _Call(inputs, mask.logits, in_place and not mask.affine)
    call.uniform, call.top = grads.smooth_loss is not None, None if grads.hinge is None else saved_top
    call.scalars = Scalars(soft_cap=float(inputs.soft_cap), penalty_margin=float(penalty_margin))
    class_weight = inputs.class_weight
    weight_sum = class_weight.sum() if call.uniform and class_weight is not None else None
    grad_override = call.new_rows() if mask.target_override else None
    arguments = SweepArguments(*saved, weight_sum, *grads, grad_override)
    # Only the sum of w_j q_j isn't among the saved statistics.
    call.sums = call.soft and grads.cross_entropy is not None
    return call.run(sweep_row, arguments, mask.affine) + ([] if grad_override is None else [grad_override])


def scale_in_place(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiplies a gradient by a 0-dim tensor on its device; programs leave at once when it is 1."""
    run = gradient.permute(sorted(range(gradient.dim()), key=gradient.stride, reverse=True))
    if not run.is_contiguous():
        return gradient.mul_(factor)
    block, warps = launch.SCALE
    dtype = launch.triton_dtype(launch.compute_dtype(gradient))
    grid = (triton.cdiv(gradient.numel(), block),)
    launch.start(scale_kernel, grid, (run, factor, gradient.numel()), gradient.device, warps, T=dtype, BLOCK=block)
    return gradient


class _Call:
    """The tensors of one call as kernels see them, its gradient, and which sums its rows need."""

    uniform = prediction = False
    sums = True
    top: Any = None  # finds the maximum that a hinge hangs from
    scalars = Scalars()

    def __init__(self, inputs: LogitInputs, want_logits: bool, in_place: bool = False) -> None:
        self.logits, self.class_weight, self.ignore_index = inputs.logits, inputs.class_weight, inputs.ignore_index
        logits, target, *classwise = inputs[:7]
        self.soft = target.is_floating_point()
        self.dtype = launch.compute_dtype(logits)
        self.gradient = (logits if in_place else torch.empty_like(logits)) if want_logits else None
        wide = [logits, *([target] if self.soft else []), *([] if self.gradient is None else [self.gradient])]
        self.layout = layout_of(wide, None if self.soft else target)
        self.rows = self.layout.row_view()
        view = self.layout.view
        self.labels = None if self.soft else self.layout.label_view(target)
        soft_view = view(target) if self.soft else _NO_VIEW
        self.inputs = Inputs(*view(logits), *soft_view, *(self.labels or _NO_VIEW)[:3], *classwise)
        self.outputs = Outputs(*(_NO_VIEW if self.gradient is None else view(self.gradient)), None, None)
        self.adjacent = logits.stride(1) == 1

    @property
    def extras(self) -> bool:
        """Whether a hinge or a soft cap needs registers."""
        return self.top is not None or self.cap is not None

    @property
    def cap(self) -> Any:
        """What caps the logits, or None."""
        return tanh_cap if self.scalars.soft_cap != 0 else None

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.logits.new_empty(shape, dtype=dtype or self.dtype)

    def new_rows(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.new(*self.logits.shape[:1], *self.logits.shape[2:], dtype=dtype)

    def denominator(self) -> Tensor:
        """What the mean divides by, on the device; labels are checked on the way."""
        if self.soft:
            return self.new().fill_(self.layout.outer * self.layout.inner)
        weights = self.new_rows()
        self.check_labels(weights)
        return weights.sum()

    def check_labels(self, weights: Tensor | None = None) -> None:
        """Asserts on the device that labels are in range; fills `weights` with those of the rows' labels."""
        if self.labels is None:
            return
        rows, warps = launch.LABELS
        sizes = self._sizes(rows)
        arguments = (
            self.labels,
            weights,
            self.class_weight,
            self.rows,
            sizes,
            self.layout.num_classes,
            self.ignore_index,
        )
        self._start(label_kernel, (sizes.tiles,), arguments, launch.Tile(rows, 1, warps), ROWS=rows)

    def run(self, row: Any, arguments: Any, want_columns: bool = False) -> list[Tensor]:
        """Runs a row function over all rows; returns the wanted ones of gradient and column sums."""
        gradients = [] if self.gradient is None else [self.gradient]
        tile = self.tile = launch.row_tile(
            self.layout.num_classes, self.logits.dtype, self.adjacent, want_columns, self.extras
        )  # fmt: skip
        if not want_columns:
            self._run_rows(row, arguments, self.outputs, tiles_per_program=1)
            return gradients
        apart = launch.column_tile(
            tile, self.layout.num_classes, self.logits.dtype, self.adjacent, self.extras
        )  # fmt: skip
        if apart is not None:
            # Programs that own classes follow, from the slopes that each row leaves.
            saved = self._new_saved()
            self._run_rows(row, arguments, _NO_OUTPUTS, tiles_per_program=1, saved=saved)
            tile = apart
        blocks = triton.cdiv(self.layout.num_classes, tile.block)
        sizes = self._sizes(tile.rows)
        programs = max(1, launch.programs_for(sizes.tiles, self.logits.device) // blocks)
        sizes = sizes._replace(tiles_per_program=triton.cdiv(sizes.tiles, programs))
        parts = [self.new(programs, self.layout.num_classes) for _ in range(2)]
        outputs = self.outputs._replace(scale=parts[0], bias=parts[1])
        if apart is None:
            self._run_rows(row, arguments, outputs, sizes.tiles_per_program, programs=programs)
        else:
            everything = (self.inputs, outputs, saved, self.rows, sizes, self.ignore_index, self.scalars.soft_cap)
            self._start(column_kernel, (programs, blocks), everything, tile, CAP=self.cap,
                        UNIFORM=self.uniform, ROWS=tile.rows, BLOCK=tile.block, ALIGN=self.layout.align)  # fmt: skip
        return gradients + [part.sum(0) for part in parts]

    def _new_saved(self) -> Saved:
        rows = self.layout.outer * self.layout.inner
        hinge = None if self.top is None else self.new(SAVED_OF_HINGE, rows)
        first = None if self.top is None else self.new(rows, dtype=torch.int32)
        return Saved(self.new(SAVED, rows), hinge, first)

    def _run_rows(
        self, row: Any, arguments: Any, outputs: Outputs, tiles_per_program: int, *,
        programs: int | None = None, saved: Saved = _NOT_SAVED,
    ) -> None:  # fmt: skip
        tile = self.tile
        sizes = self._sizes(tile.rows)._replace(tiles_per_program=tiles_per_program)
        everything = (
            self.inputs,
            outputs,
            saved,
            arguments,
            self.rows,
            sizes,
            self.ignore_index,
            *self.scalars,
        )
        self._start(
            row_kernel, (sizes.tiles if programs is None else programs,), everything, tile, ROW=row,
            TOP=self.top, CAP=self.cap, SUMS=self.sums, UNIFORM=self.uniform, PREDICTION=self.prediction,
            ROWS=tile.rows, BLOCK=tile.block, ONE_BLOCK=self.layout.num_classes <= tile.block,
            ALIGN=self.layout.align,
        )  # fmt: skip

    def _sizes(self, rows: int) -> Sizes:
        layout = self.layout
        inner_tiles = triton.cdiv(layout.inner, rows)
        units = layout.num_classes // layout.align
        return Sizes(units, layout.outer * layout.inner, layout.inner, inner_tiles, layout.outer * inner_tiles, 1)

    def _start(
        self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], tile: launch.Tile, **constants: Any
    ) -> None:
        if self.extras or self.inputs.target_override is not None:
            # The assembler would spill a few values to fit in more programs.
            constants["maxnreg"] = launch.most_registers(tile.warps)
        dtype = launch.triton_dtype(self.dtype)
        launch.start(kernel, grid, arguments, self.logits.device, tile.warps, tile.stages, T=dtype, **constants)
