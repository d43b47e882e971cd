"""Wrong versions of the Triton backend's small functions: each makes a mistake that a comparison must see."""

import triton
import triton.language as tl

from fusedloss.backends.triton import blocks, slopes, statistics_rows
from fusedloss.backends.triton import class_stats as classes
from fusedloss.backends.triton import rows as row_functions
from fusedloss.backends.triton import sums as gathered
from fusedloss.backends.triton.slopes import Slopes
from fusedloss.backends.triton.sums import RowSums

_label_row, _soft_row, _sweep_row = row_functions.label_row, row_functions.soft_row, statistics_rows.sweep_row
_statistics_row, _add_block, _add_columns = statistics_rows.statistics_row, gathered.add_block, slopes.add_columns
_add_hinge, _with_label, _best_class = gathered.add_hinge, gathered.with_label, gathered.best_class
_hinge_at_label, _penalise, _tanh = row_functions.hinge_at_label, row_functions.penalise, blocks.tanh
_add_chunks = classes.add_chunks


@triton.jit
def label_row(
    rows, sums, hinge, label, num_classes, scalars, arguments, T: tl.constexpr, SOFT: tl.constexpr,
    STAND_IN: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    right = _label_row(rows, sums, hinge, label, num_classes, scalars, arguments, T, SOFT, STAND_IN, UNIFORM)
    return Slopes(
        right.shift,
        right.softmax * 1.001,
        right.uniform,
        right.at_target,
        right.kept,
        right.threshold,
        right.hinge,
        right.at_first,
        right.first,
    )


@triton.jit
def soft_row(
    rows, sums, hinge, label, num_classes, scalars, arguments, T: tl.constexpr, SOFT: tl.constexpr,
    STAND_IN: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    right = _soft_row(rows, sums, hinge, label, num_classes, scalars, arguments, T, SOFT, STAND_IN, UNIFORM)
    return Slopes(
        right.shift,
        right.softmax,
        right.uniform,
        right.at_target * 1.001,
        right.kept,
        right.threshold,
        right.hinge,
        right.at_first,
        right.first,
    )


@triton.jit
def sweep_row(
    rows, sums, hinge, label, num_classes, scalars, arguments, T: tl.constexpr, SOFT: tl.constexpr,
    STAND_IN: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    right = _sweep_row(rows, sums, hinge, label, num_classes, scalars, arguments, T, SOFT, STAND_IN, UNIFORM)
    return Slopes(
        right.shift,
        right.softmax,
        right.uniform,
        right.at_target * 1.001,
        right.kept,
        right.threshold,
        right.hinge,
        right.at_first,
        right.first,
    )


@triton.jit
def statistics_row(
    rows, sums, hinge, label, num_classes, scalars, arguments, T: tl.constexpr, SOFT: tl.constexpr,
    STAND_IN: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    wrong = RowSums(sums.top, sums.rest * 1.001, sums.weight, sums.uniform, sums.soft_weight, sums.soft,
                    sums.first_top, sums.first_nan)  # fmt: skip
    return _statistics_row(rows, wrong, hinge, label, num_classes, scalars, arguments, T, SOFT, STAND_IN, UNIFORM)


@triton.jit
def add_columns(scale_sum, bias_sum, slope, x):
    scale_sum, bias_sum = _add_columns(scale_sum, bias_sum, slope, x)
    return scale_sum * 0.999, bias_sum


@triton.jit
def add_block(
    sums, block, label, classes, SOFT: tl.constexpr, STAND_IN: tl.constexpr, UNIFORM: tl.constexpr,
    PREDICTION: tl.constexpr,
):  # fmt: skip
    # The sum of earlier blocks is not moved to the new maximum.
    right = _add_block(sums, block, label, classes, SOFT, STAND_IN, UNIFORM, PREDICTION)
    rest = right.rest + sums.rest * (1.0 - tl.exp(sums.top - right.top))
    return RowSums(
        right.top, rest, right.weight, right.uniform, right.soft_weight, right.soft, right.first_top,
        right.first_nan,
    )  # fmt: skip


@triton.jit
def add_chunks(parts, first, last, width, columns, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    return _add_chunks(parts, first + 1, last, width, columns, CHUNKS, BLOCK)


@triton.jit
def add_hinge(hinge, block, classes, num_classes, T: tl.constexpr):
    # The last, ragged block counts classes that don't exist.
    return _add_hinge(hinge, block, classes, num_classes + 1, T)


@triton.jit
def hinge_at_label(coefficient, hinge, label):
    return _hinge_at_label(coefficient, hinge, label) + 0.001 * coefficient


@triton.jit
def label_slope(softmax, counted, drift, p, rest):
    return drift - softmax * rest


@triton.jit
def penalise(loss, hinge, rows, kept, scale, scalars, arguments, T: tl.constexpr):
    total, _, coefficient = _penalise(loss, hinge, rows, kept, scale, scalars, arguments, T)
    return total, 1.0, coefficient


@triton.jit
def with_label(sums, label, STAND_IN: tl.constexpr):
    # The maximum without the label.
    right = _with_label(sums, label, STAND_IN)
    return RowSums(sums.top, right.rest, right.weight, right.uniform, right.soft_weight, right.soft,
                   right.first_top, right.first_nan)  # fmt: skip


@triton.jit
def best_class(sums, label, total, num_classes, STAND_IN: tl.constexpr):
    # The stand-in's sum in place of the plain logits'.
    first, _ = _best_class(sums, label, total, num_classes, STAND_IN)
    return first, 1.0 / total


@triton.jit
def tanh(x, T: tl.constexpr):
    return _tanh(x, T) * 0.9999


@triton.jit
def is_label(classes, label):
    # The stand-in's slope lands one class further.
    return classes[None, :] == label.index[:, None] + 1
