"""Softmax cross-entropy and the row statistics on a GPU: the schema's functions over the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fusedloss.backends.cuda import cluster
from fusedloss.core.dtypes import compute_dtype
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
from .blocks import Inputs, Spec, spec_of
from .grad_logits import SAVED, SAVED_OF_HINGE, Outputs, Saved
from .layout import View, layout_of
from .row_loss import row_options
from .softmax_kernels import Sizes, column_kernel, label_kernel, row_kernel, scale_kernel
from .softmax_rows import BackwardTensors, LossTensors, loss_row, statistics_row, stats_backward_row
from .statistics import computed_top, saved_top

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
    call = _Call(inputs, options, mask.logits, in_place and not mask.affine)
    denominator = call.denominator() if mean else None
    if not mean:
        call.check_labels()
    served = cluster.try_softmax_ce(inputs, rows, options, denominator, mask, call.grad)
    row_loss = call.new_rows() if served is None else served[0]
    of_rows = [call.new_rows() if needed else None for needed in mask[2:]]
    call.smooth_loss = needs_smooth_loss(options, rows) or mask.label_smoothing
    call.top = computed_top if needs_hinge(options, rows) else None
    tensors = LossTensors(*launch.contiguous((row_loss, *of_rows, *rows, denominator)))
    grads = call.run(loss_row, tensors, mask.affine) if served is None else served[1]
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
    call = _Call(inputs, RowOptions(penalty_margin=options.penalty_margin))
    call.check_labels()
    dtypes = dict.fromkeys(SoftmaxStatistics._fields, call.dtype) | {"prediction": torch.int64}
    needed = {"smooth_loss": options.smooth_loss, "hinge": options.hinge}
    needed |= {"prediction": options.prediction, "confidence": options.prediction}
    rows = {name: call.new_rows(dtype) if needed.get(name, True) else None for name, dtype in dtypes.items()}
    call.smooth_loss, call.prediction = options.smooth_loss, options.prediction
    call.top = computed_top if options.hinge else None
    call.run(statistics_row, SoftmaxStatistics(**rows))  # type: ignore[arg-type]
    empty = {name: call.new(0, dtype=dtypes[name]) for name, values in rows.items() if values is None}
    return SoftmaxStatistics(**{**rows, **empty})  # type: ignore[arg-type]


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
    call = _Call(inputs, RowOptions(penalty_margin=penalty_margin), mask.logits, in_place and not mask.affine)
    call.smooth_loss, call.top = grads.smooth_loss is not None, None if grads.hinge is None else saved_top
    # Only the sum of w_j q_j isn't among the saved statistics.
    call.sums = call.soft and grads.cross_entropy is not None
    class_weight = call.inputs.class_weight
    weight_sum = class_weight.sum() if call.smooth_loss and class_weight is not None else None
    grad_override = call.new_rows() if mask.target_override else None
    tensors = BackwardTensors(*launch.contiguous((*saved, *grads, weight_sum, grad_override)))
    return call.run(stats_backward_row, tensors, mask.affine) + ([] if grad_override is None else [grad_override])


def scale_in_place(grad: Tensor, factor: Tensor) -> Tensor:
    """Multiplies a gradient by a 0-dim tensor on its device; programs leave at once when it is 1."""
    run = grad.permute(sorted(range(grad.dim()), key=grad.stride, reverse=True))
    if not run.is_contiguous():
        return grad.mul_(factor)
    block, warps = launch.SCALE
    dtype = launch.triton_dtype(compute_dtype(grad.dtype))
    grid = (triton.cdiv(grad.numel(), block),)
    launch.start(scale_kernel, grid, (run, factor, grad.numel()), grad.device, warps, T=dtype, BLOCK=block)
    return grad


class _Call:
    """The tensors of one call as kernels see them, its gradient, and which sums its rows need."""

    smooth_loss = prediction = False
    sums = True
    top: Any = None  # finds the maximum of the hinge

    def __init__(
        self, inputs: LogitInputs, options: RowOptions, needs_logits: bool = False, in_place: bool = False
    ) -> None:
        logits, target = inputs.logits, inputs.target
        self.logits, self.ignore_index, self.options = logits, inputs.ignore_index, row_options(options)
        self.soft = target.is_floating_point()
        self.dtype = compute_dtype(logits.dtype)
        self.grad = (logits if in_place else torch.empty_like(logits)) if needs_logits else None
        wide = [logits, *([target] if self.soft else []), *([] if self.grad is None else [self.grad])]
        self.layout = layout_of(wide, None if self.soft else target)
        self.row_view = self.layout.row_view()
        view = self.layout.view
        self.labels = None if self.soft else self.layout.label_view(target)
        soft_view = view(target) if self.soft else _NO_VIEW
        cap = launch.float64_bits(inputs.soft_cap) if inputs.soft_cap != 0 else None
        views = (*view(logits), *soft_view, *(self.labels or _NO_VIEW)[:3])
        self.inputs = Inputs(*(*views, *launch.contiguous(inputs[2:7]), cap, inputs.ignore_index))
        self.outputs = Outputs(*(_NO_VIEW if self.grad is None else view(self.grad)), None, None)
        self.contiguous_rows = logits.stride(1) == 1

    @property
    def extras(self) -> bool:
        """Whether a hinge or a soft cap needs registers."""
        return self.top is not None or self.inputs.soft_cap is not None

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
        arguments = (self.labels, weights, self.inputs.class_weight, self.row_view, sizes, self.layout.num_classes,
                     self.ignore_index)  # fmt: skip
        dtype = launch.triton_dtype(self.dtype)
        self._start(label_kernel, (sizes.tiles,), arguments, launch.Tile(rows, 1, warps), T=dtype, ROWS=rows)

    def run(self, row: Any, row_tensors: Any, needs_columns: bool = False) -> list[Tensor]:
        """Runs a row function over all rows; returns the needed ones of the logits' gradient and column sums."""
        grads = [] if self.grad is None else [self.grad]
        tile = self._row_tile(needs_columns)
        if not needs_columns:
            self._run_rows(row, row_tensors, tile, self.outputs)
            return grads
        separate = launch.column_tile(
            tile, self.layout.num_classes, self.logits.dtype, self.contiguous_rows, self.extras, self.logits.device
        )  # fmt: skip
        if separate is not None:
            # Programs that own classes follow, from the coefficients that each row leaves.
            saved = self._new_saved()
            self._run_rows(row, row_tensors, tile, _NO_OUTPUTS, saved=saved)
            tile = separate
        blocks = triton.cdiv(self.layout.num_classes, tile.block)
        sizes = self._sizes(tile.rows)
        programs = max(1, launch.programs_for(sizes.tiles, self.logits.device) // blocks)
        sizes = sizes._replace(tiles_per_program=triton.cdiv(sizes.tiles, programs))
        parts = [self.new(programs, self.layout.num_classes) for _ in range(2)]
        outputs = self.outputs._replace(grad_scale=parts[0], grad_bias=parts[1])
        if separate is None:
            self._run_rows(row, row_tensors, tile, outputs, programs, sizes.tiles_per_program)
        else:
            arguments = (self.inputs, outputs, saved, self.row_view, sizes, self._spec(None, tile))
            self._start(column_kernel, (programs, blocks), arguments, tile)
        return grads + [part.sum(0) for part in parts]

    def _row_tile(self, needs_columns: bool) -> launch.Tile:
        return launch.row_tile(
            self.layout.num_classes, self.logits.dtype, self.contiguous_rows, needs_columns, self.extras,
            self.logits.device,
        )  # fmt: skip

    def _new_saved(self) -> Saved:
        rows = self.layout.outer * self.layout.inner
        hinge = None if self.top is None else self.new(SAVED_OF_HINGE, rows)
        first_top = None if self.top is None else self.new(rows, dtype=torch.int32)
        return Saved(self.new(SAVED, rows), hinge, first_top)

    def _run_rows(
        self, row: Any, row_tensors: Any, tile: launch.Tile, outputs: Outputs, programs: int | None = None,
        tiles_per_program: int = 1, saved: Saved = _NOT_SAVED,
    ) -> None:  # fmt: skip
        sizes = self._sizes(tile.rows)._replace(tiles_per_program=tiles_per_program)
        arguments = (self.inputs, outputs, saved, row_tensors, self.row_view, sizes, self.options,
                     self._spec(row, tile))  # fmt: skip
        self._start(row_kernel, (sizes.tiles if programs is None else programs,), arguments, tile)

    def _spec(self, row: Any, tile: launch.Tile) -> Spec:
        layout, override = self.layout, self.inputs.target_override is not None
        return spec_of(
            row=row,
            top=self.top,
            soft=self.soft,
            override=override,
            sums=self.sums,
            smooth_loss=self.smooth_loss,
            prediction=self.prediction,
            dtype=launch.triton_dtype(self.dtype),
            rows=tile.rows,
            block=tile.block,
            one_block=layout.num_classes <= tile.block,
            align=layout.align,
        )

    def _sizes(self, rows: int) -> Sizes:
        layout = self.layout
        inner_tiles = triton.cdiv(layout.inner, rows)
        units = layout.num_classes // layout.align
        return Sizes(units, layout.outer * layout.inner, layout.inner, inner_tiles, layout.outer * inner_tiles, 1)

    def _start(
        self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], tile: launch.Tile, **constants: Any
    ) -> None:
        if self.extras or self.inputs.target_override is not None or self.dtype == torch.float64:
            # The assembler would spill a few values to fit in more programs.
            constants["maxnreg"] = launch.most_registers(tile.warps)
        launch.start(kernel, grid, arguments, self.logits.device, tile.warps, tile.stages, **constants)
