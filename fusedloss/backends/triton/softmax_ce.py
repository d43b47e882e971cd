"""Softmax cross-entropy and the row statistics on a GPU: the schema's functions over the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

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
    logits: Tensor, target: Tensor, scale: Tensor | None, bias: Tensor | None, class_weight: Tensor | None,
    target_override: Tensor | None, target_override_grad: Tensor | None, row_smoothing: Tensor | None,
    row_scale: Tensor | None, row_penalty: Tensor | None, soft_cap: float, smoothing: float, focal_gamma: float,
    z_loss: float, penalty_margin: float, penalty: float, penalty_share: float, penalty_mix: bool,
    ignore_index: int, mean: bool, wanted: Sequence[bool], gradient_scale: float = 1.0, in_place: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """The scalar loss, the loss of each row, and the gradients that are wanted of the scalar one."""
    want_logits, want_columns, *want_rows = wanted
    call = _Call(
        _Problem(logits, target, scale, bias, class_weight, target_override, target_override_grad), ignore_index, want_logits,
        # Programs that own classes read logits which others have written over.
        in_place and not want_columns,
    )  # fmt: skip
    denominator = call.denominator() if mean else None
    if not mean:
        call.check_labels()
    row_loss = call.new_rows()
    smoothing_slope, label_gradient, penalty_slope = (call.new_rows() if want else None for want in want_rows)
    arguments = CrossEntropyArguments(
        row_loss, smoothing_slope, label_gradient, penalty_slope, row_smoothing, row_scale, row_penalty, denominator
    )
    row = soft_row if call.soft else focal_row if focal_gamma != 0 else label_row
    call.uniform = smoothing != 0 or row_smoothing is not None or smoothing_slope is not None
    if penalty != 0 or row_penalty is not None:
        call.top = computed_top
    numbers = (smoothing, focal_gamma, z_loss, soft_cap, penalty, penalty_margin, penalty_share, penalty_mix)
    call.scalars = Scalars(*map(float, numbers))
    gradients = call.run(row, arguments, want_columns)
    loss = row_loss.sum() if row_scale is None else (row_loss * row_scale).sum()
    if denominator is not None:
        # Torch's smoothed loss is 0 / 0 too where no kept row has weight.
        loss = torch.where(denominator == 0, torch.nan, loss / denominator)
    of_rows = [slope for slope in (smoothing_slope, label_gradient, penalty_slope) if slope is not None]
    gradients += of_rows
    if gradient_scale != 1:
        for gradient in gradients:
            gradient.mul_(gradient_scale)
    return loss, row_loss, gradients


def softmax_stats(
    logits: Tensor, target: Tensor, scale: Tensor | None, bias: Tensor | None, class_weight: Tensor | None,
    target_override: Tensor | None, soft_cap: float, penalty_margin: float, ignore_index: int, want_uniform: bool,
    want_hinge: bool, want_prediction: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The statistics of each row, in the order of the schema."""
    call = _Call(_Problem(logits, target, scale, bias, class_weight, target_override), ignore_index, want_logits=False)
    call.check_labels()
    found = StatisticsArguments(
        row_max=call.new_rows(),
        row_sum=call.new_rows(),
        log_sum_exp=call.new_rows(),
        target_logit=call.new_rows(),
        cross_entropy=call.new_rows(),
        uniform=call.new_rows() if want_uniform else None,
        rest=call.new_rows(),
        hinge=call.new_rows() if want_hinge else None,
        prediction=call.new_rows(torch.int64) if want_prediction else None,
        confidence=call.new_rows() if want_prediction else None,
    )
    call.uniform, call.prediction, call.top = want_uniform, want_prediction, computed_top if want_hinge else None
    call.scalars = Scalars(soft_cap=float(soft_cap), penalty_margin=float(penalty_margin))
    call.run(statistics_row, found)
    absent = {name: call.new(0) for name in ("uniform", "hinge", "confidence") if getattr(found, name) is None}
    if found.prediction is None:
        absent["prediction"] = call.new(0, dtype=torch.int64)
    return tuple(found._replace(**absent))


def softmax_stats_backward(
    logits: Tensor, target: Tensor, scale: Tensor | None, bias: Tensor | None, class_weight: Tensor | None,
    target_override: Tensor | None, target_override_grad: Tensor | None, row_max: Tensor, row_sum: Tensor, rest: Tensor,
    soft_cap: float, penalty_margin: float, ignore_index: int, grad_log_sum_exp: Tensor | None,
    grad_target_logit: Tensor | None, grad_cross_entropy: Tensor | None, grad_uniform: Tensor | None,
    grad_rest: Tensor | None, grad_hinge: Tensor | None, wanted: Sequence[bool], in_place: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Gradients under any upstream gradients; long rows are read once from the saved sums, twice with a hinge."""
    want_logits, want_columns, want_label = wanted
    call = _Call(
        _Problem(logits, target, scale, bias, class_weight, target_override, target_override_grad), ignore_index, want_logits,
        # Programs that own classes read logits which others have written over.
        in_place and not want_columns,
    )  # fmt: skip
    call.uniform, call.top = grad_uniform is not None, None if grad_hinge is None else saved_top
    call.scalars = Scalars(soft_cap=float(soft_cap), penalty_margin=float(penalty_margin))
    weight_sum = class_weight.sum() if call.uniform and class_weight is not None else None
    label_gradient = call.new_rows() if want_label else None
    arguments = SweepArguments(row_max, row_sum, rest, weight_sum, grad_log_sum_exp, grad_target_logit,
                               grad_cross_entropy, grad_uniform, grad_rest, grad_hinge, label_gradient)  # fmt: skip
    # Only the sum of w_j q_j isn't among the saved statistics.
    call.sums = call.soft and grad_cross_entropy is not None
    return call.run(sweep_row, arguments, want_columns) + ([] if label_gradient is None else [label_gradient])


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


class _Problem(NamedTuple):
    """The tensors that z and the target distribution are made of."""

    logits: Tensor
    target: Tensor
    scale: Tensor | None
    bias: Tensor | None
    class_weight: Tensor | None
    target_override: Tensor | None = None
    target_override_grad: Tensor | None = None


class _Call:
    """The tensors of one call as kernels see them, its gradient, and which sums its rows need."""

    uniform = prediction = False
    sums = True
    top: Any = None  # finds the maximum that a hinge hangs from
    scalars = Scalars()

    def __init__(self, problem: _Problem, ignore_index: int, want_logits: bool, in_place: bool = False) -> None:
        self.logits, self.class_weight, self.ignore_index = problem.logits, problem.class_weight, ignore_index
        logits, target, *classwise = problem
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
