"""The operations: schema, shapes for tracing, and autograd glue, one file per stem. ``backends`` chooses the kernel."""

from fusedloss.core.dtypes import compute_dtype
from fusedloss.ops.class_stats import (
    ClassState,
    ClassTensors,
    class_stats,
    moments,
    row_magnitudes,
    update_class_stats,
    update_from_rows,
)
from fusedloss.ops.flops import register_flop_formulas
from fusedloss.ops.linear_ce import linear_ce, linear_stats, row_norms, target_products
from fusedloss.ops.softmax_ce import softmax_ce, softmax_stats
from fusedloss.ops.supcon import supcon_stats

__all__ = [
    "ClassState",
    "ClassTensors",
    "class_stats",
    "compute_dtype",
    "linear_ce",
    "linear_stats",
    "moments",
    "row_magnitudes",
    "row_norms",
    "softmax_ce",
    "softmax_stats",
    "supcon_stats",
    "target_products",
    "update_class_stats",
    "update_from_rows",
]

register_flop_formulas()
