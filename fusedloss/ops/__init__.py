"""The operations: schema, shapes for tracing, and autograd glue, one file per stem. ``backends`` chooses the kernel."""

from fusedloss.ops.class_stats import ClassTensors, class_stats
from fusedloss.ops.library import compute_dtype
from fusedloss.ops.softmax_ce import RowTensors, SoftmaxOptions, softmax_ce, softmax_stats

__all__ = [
    "ClassTensors",
    "RowTensors",
    "SoftmaxOptions",
    "class_stats",
    "compute_dtype",
    "softmax_ce",
    "softmax_stats",
]
