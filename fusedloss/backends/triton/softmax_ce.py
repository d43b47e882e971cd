"""Softmax cross-entropy and the row statistics on a GPU: the schema's functions over the kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
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
from .layout import Layout, View, places_of
from .row_loss import row_options
from .softmax_kernels import PARTS, Bounds, Sizes, column_kernel, label_kernel, row_kernel, scale_kernel
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
    call.smooth_loss = needs_smooth_loss(options, rows) or mask.label_smoothing
    call.top = computed_top if needs_hinge(options, rows) else None
    call.reduced, call.mean = True, mean
    tile = call.row_tile(mask.affine)
    # One sum of weights from each program of the first kernel, one of losses from each of the second.
    programs = call.programs(tile, mask.affine)
    parts = call.new(PARTS.value + programs)
    finished, loss = call.new(dtype=torch.int32), call.new()
    call.check_labels(parts, finished)
    if cluster.ENABLED:
        denominator = parts[: PARTS.value].sum() if mean else None
        served = cluster.try_softmax_ce(inputs, rows, options, denominator, mask, call.grad)
        if served is not None:
            row_loss, grads = served
            total = row_loss.sum() if rows.sample_weight is None else (row_loss * rows.sample_weight).sum()
            return total if denominator is None else total / denominator, row_loss, grads
    row_loss = call.new_rows()
    of_rows = [call.new_rows() if needed else None for needed in mask[2:]]
    tensors = LossTensors(*launch.contiguous((row_loss, *of_rows, *rows, parts, finished, loss)))
    grads = call.run(loss_row, tensors, tile, programs, mask.affine)
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
    tile = call.row_tile(False)
    call.run(statistics_row, SoftmaxStatistics(**rows), tile, call.programs(tile, False))  # type: ignore[arg-type]
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
    tile = call.row_tile(mask.affine)
    grads_of_logits = call.run(stats_backward_row, tensors, tile, call.programs(tile, mask.affine), mask.affine)
    return grads_of_logits + ([] if grad_override is None else [grad_override])


def scale_in_place(grad: Tensor, factor: Tensor) -> Tensor:
    """Multiplies a gradient by a 0-dim tensor on its device; the few programs leave at once when it is 1."""
    run = grad
    if not grad.is_contiguous():
        run = grad.permute(sorted(range(grad.dim()), key=grad.stride, reverse=True))
        if not run.is_contiguous():
            return grad.mul_(factor)
    block, warps = launch.SCALE
    dtype = launch.triton_dtype(compute_dtype(grad.dtype))
    grid = (launch.programs_at_once(launch.cdiv(grad.numel(), block), warps, grad.device),)
    launch.start(scale_kernel, grid, (run, factor, grad.numel()), grad.device, warps, T=dtype, BLOCK=block)
    return grad


class _Call:
    """The tensors of one call as kernels see them, its gradient, and which sums its rows need."""

    smooth_loss = prediction = reduced = mean = False
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
        places = places_of(wide, None if self.soft else target)
        self.layout, self.row_view = places.layout, places.row_view
        self.labels = None if places.label_steps is None else View(target, *places.label_steps)
        soft_view = View(target, *places.steps[1]) if self.soft else _NO_VIEW
        cap = launch.float64_bits(inputs.soft_cap) if inputs.soft_cap != 0 else None
        views = (logits, *places.steps[0], *soft_view, *(self.labels or _NO_VIEW)[:3])
        self.inputs = Inputs(*(*views, *launch.contiguous(inputs[2:7]), cap, inputs.ignore_index))
        self.outputs = _NO_OUTPUTS if self.grad is None else Outputs(self.grad, *places.steps[-1], None, None)
        self.contiguous_rows = logits.stride(1) == 1

    @property
    def extras(self) -> bool:
        """Whether a hinge or a soft cap needs registers."""
        return self.top is not None or self.inputs.soft_cap is not None

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.logits.new_empty(shape, dtype=dtype or self.dtype)

    def new_rows(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.new(*self.logits.shape[:1], *self.logits.shape[2:], dtype=dtype)

    def check_labels(self, parts: Tensor | None = None, finished: Tensor | None = None) -> None:
        """Asserts on the device that labels are in range; fills PARTS `parts` of the mean's denominator."""
        if self.labels is None and parts is None:
            return
        rows, warps = launch.LABELS
        bounds = Bounds(self.layout.num_classes, self.ignore_index)
        arguments = (self.labels, parts, finished, self.inputs.class_weight, self.row_view, self._sizes(rows), bounds)
        constants = {"T": launch.triton_dtype(self.dtype), "ROWS": rows}
        launch.start(label_kernel, (PARTS.value,), arguments, self.logits.device, warps, **constants)

    def programs(self, tile: launch.Tile, needs_columns: bool) -> int:
        """Programs of the row kernel: those that run at a time, fewer where each keeps column sums."""
        tiles, device = self._sizes(tile.rows).tiles, self.logits.device
        if needs_columns and self._column_tile(tile) is None:
            return launch.programs_for(tiles, device)
        return launch.programs_at_once(tiles, tile.warps, device)

    def run(
        self, row: Any, row_tensors: Any, tile: launch.Tile, programs: int, needs_columns: bool = False
    ) -> list[Tensor]:
        """Runs a row function over all rows; returns the needed ones of the logits' gradient and column sums."""
        grads = [] if self.grad is None else [self.grad]
        if not needs_columns:
            self._run_rows(row, row_tensors, tile, self.outputs, programs)
            return grads
        separate = self._column_tile(tile)
        if separate is None:
            parts, outputs = self._new_column_sums(programs)
            self._run_rows(row, row_tensors, tile, outputs, programs)
            return grads + [part.sum(0) for part in parts]
        # Programs that own classes follow, from the coefficients that each row leaves.
        saved = self._new_saved()
        self._run_rows(row, row_tensors, tile, _NO_OUTPUTS, programs, saved)
        blocks, sizes = launch.cdiv(self.layout.num_classes, separate.block), self._sizes(separate.rows)
        programs = max(1, launch.programs_for(sizes.tiles, self.logits.device) // blocks)
        parts, outputs = self._new_column_sums(programs)
        arguments = (self.inputs, outputs, saved, self.row_view, sizes, self._spec(None, separate))
        self._start(column_kernel, (programs, blocks), arguments, separate)
        return grads + [part.sum(0) for part in parts]

    def _new_column_sums(self, programs: int) -> tuple[list[Tensor], Outputs]:
        parts = [self.new(programs, self.layout.num_classes) for _ in range(2)]
        return parts, self.outputs._replace(grad_scale=parts[0], grad_bias=parts[1])

    def row_tile(self, needs_columns: bool) -> launch.Tile:
        """The tile of the row kernel."""
        # The longest rows leave no registers for more than their sums and a scale.
        more = self.inputs.bias is not None or self.inputs.target_override is not None
        more = more or self.soft or self.smooth_loss or self.prediction
        extras = self.extras or (more and self.layout.num_classes > launch.WIDEST_WITH_MORE)
        return launch.row_tile(
            self.layout.num_classes, self.logits.dtype, self.contiguous_rows, self.layout.align, needs_columns,
            extras, self.logits.device,
        )  # fmt: skip

    @property
    def class_tensors(self) -> int:
        """How many of scale, bias and class weights there are."""
        return sum(values is not None for values in (self.inputs.scale, self.inputs.bias, self.inputs.class_weight))

    def _column_tile(self, tile: launch.Tile) -> launch.Tile | None:
        return launch.column_tile(
            tile, self.layout.num_classes, self.logits.dtype, self.contiguous_rows, self.extras, self.logits.device
        )  # fmt: skip

    def _new_saved(self) -> Saved:
        rows = self.layout.outer * self.layout.inner
        hinge = None if self.top is None else self.new(SAVED_OF_HINGE, rows)
        first_top = None if self.top is None else self.new(rows, dtype=torch.int32)
        return Saved(self.new(SAVED, rows), hinge, first_top)

    def _run_rows(
        self, row: Any, row_tensors: Any, tile: launch.Tile, outputs: Outputs, programs: int,
        saved: Saved = _NOT_SAVED,
    ) -> None:  # fmt: skip
        arguments = (self.inputs, outputs, saved, row_tensors, self.row_view, self._sizes(tile.rows), self.options,
                     self._spec(row, tile))  # fmt: skip
        self._start(row_kernel, (programs,), arguments, tile)

    def _spec(self, row: Any, tile: launch.Tile) -> Spec:
        layout, override = self.layout, self.inputs.target_override is not None
        chunks = 0 if tile.loop else launch.cdiv(layout.num_classes, tile.block)
        return spec_of(
            row=row,
            top=self.top,
            soft=self.soft,
            override=override,
            sums=self.sums,
            smooth_loss=self.smooth_loss,
            prediction=self.prediction,
            reduced=self.reduced,
            mean=self.mean,
            dtype=launch.triton_dtype(self.dtype),
            rows=tile.rows,
            block=tile.block,
            chunks=chunks,
            wide=chunks * tile.block * tile.rows <= launch.most_held_wide(tile.warps) * 32 * tile.warps,
            align=layout.align,
            flat=layout.outer == 1,
        )

    def _sizes(self, rows: int) -> Sizes:
        return _sizes_of(self.layout, rows)

    def _start(
        self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], tile: launch.Tile, **constants: Any
    ) -> None:
        override = self.inputs.target_override is not None
        extras = (self.top is not None) + (self.inputs.soft_cap is not None) + override
        if kernel is row_kernel and self.dtype == torch.float32:
            wide = tile.warps == 8 and extras == 0 and self.class_tensors < 2
            if tile.loop and extras < 2 and (tile.warps == 16 or self.class_tensors == 0):
                # 32 warps to a multiprocessor; left to itself the assembler takes more registers, or spills for more.
                constants["maxnreg"] = launch.most_registers(32)
            elif not tile.loop and tile.warps <= 8 and (wide or (extras == 1 and self.class_tensors == 0)):
                # 16 warps to a multiprocessor, where nothing spills for it.
                constants["maxnreg"] = launch.most_registers(16)
        if "maxnreg" not in constants and (extras or self.dtype == torch.float64):
            # The assembler would spill a few values to fit in more programs.
            constants["maxnreg"] = launch.most_registers(tile.warps)
        launch.start(kernel, grid, arguments, self.logits.device, tile.warps, tile.stages, **constants)


@functools.lru_cache(4096)
def _sizes_of(layout: Layout, rows: int) -> Sizes:
    """The counts of a launch whose tiles have so many rows."""
    inner_tiles = launch.cdiv(layout.inner, rows)
    units = layout.num_classes // layout.align
    return Sizes(units, layout.outer * layout.inner, layout.inner, inner_tiles, layout.outer * inner_tiles)
