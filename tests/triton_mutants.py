"""Wrong versions of the Triton backend's small functions: each makes a mistake that a comparison must see."""

import triton
import triton.language as tl

from fusedloss.backends.triton import blocks
from fusedloss.backends.triton import class_stats as classes
from fusedloss.backends.triton import rows as row_functions
from fusedloss.backends.triton.blocks import RowSums, Slopes

_label_row, _soft_row, _sweep_row = row_functions.label_row, row_functions.soft_row, row_functions.sweep_row
_statistics_row, _add_block, _add_columns = row_functions.statistics_row, blocks.add_block, blocks.add_columns
_add_chunks = classes.add_chunks


@triton.jit
def label_row(
    rows, sums, label, num_classes, scalars, arguments, T: tl.constexpr, SOFT: tl.constexpr,
    UNIFORM: tl.constexpr,
):  # fmt: skip
    right = _label_row(rows, sums, label, num_classes, scalars, arguments, T, SOFT, UNIFORM)
    return Slopes(right.shift, right.softmax * 1.001, right.uniform, right.at_target, right.kept)


@triton.jit
def soft_row(
    rows, sums, label, num_classes, scalars, arguments, T: tl.constexpr, SOFT: tl.constexpr,
    UNIFORM: tl.constexpr,
):  # fmt: skip
    right = _soft_row(rows, sums, label, num_classes, scalars, arguments, T, SOFT, UNIFORM)
    return Slopes(right.shift, right.softmax, right.uniform, right.at_target * 1.001, right.kept)


@triton.jit
def sweep_row(
    rows, sums, label, num_classes, scalars, arguments, T: tl.constexpr, SOFT: tl.constexpr,
    UNIFORM: tl.constexpr,
):  # fmt: skip
    right = _sweep_row(rows, sums, label, num_classes, scalars, arguments, T, SOFT, UNIFORM)
    return Slopes(right.shift, right.softmax, right.uniform, right.at_target * 1.001, right.kept)


@triton.jit
def statistics_row(
    rows, sums, label, num_classes, scalars, arguments, T: tl.constexpr, SOFT: tl.constexpr,
    UNIFORM: tl.constexpr,
):  # fmt: skip
    wrong = RowSums(sums.top, sums.rest * 1.001, sums.weight, sums.uniform, sums.soft_weight, sums.soft,
                    sums.first_top, sums.first_nan)  # fmt: skip
    return _statistics_row(rows, wrong, label, num_classes, scalars, arguments, T, SOFT, UNIFORM)


@triton.jit
def add_columns(scale_sum, bias_sum, slope, x):
    scale_sum, bias_sum = _add_columns(scale_sum, bias_sum, slope, x)
    return scale_sum * 0.999, bias_sum


@triton.jit
def add_block(sums, block, label, classes, SOFT: tl.constexpr, UNIFORM: tl.constexpr, PREDICTION: tl.constexpr):
    # The sum of earlier blocks is not moved to the new maximum.
    right = _add_block(sums, block, label, classes, SOFT, UNIFORM, PREDICTION)
    rest = right.rest + sums.rest * (1.0 - tl.exp(sums.top - right.top))
    return RowSums(
        right.top, rest, right.weight, right.uniform, right.soft_weight, right.soft, right.first_top,
        right.first_nan,
    )  # fmt: skip


@triton.jit
def add_chunks(parts, first, last, width, columns, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    return _add_chunks(parts, first + 1, last, width, columns, CHUNKS, BLOCK)
