"""The losses as functions: arguments are checked once, one operation computes, and rows are reduced."""

from fusedloss.functional.cross_entropy import cross_entropy
from fusedloss.functional.engine import RowStatistics
from fusedloss.functional.linear_cross_entropy import linear_cross_entropy
from fusedloss.functional.margin_logits import margin_logits
from fusedloss.functional.supcon import supcon

__all__ = ["RowStatistics", "cross_entropy", "linear_cross_entropy", "margin_logits", "supcon"]
