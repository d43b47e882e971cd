"""The losses as functions: arguments are checked once (problem.py), one operation answers, and rows are reduced."""

from fusedloss.functional.cross_entropy import RowStatistics, cross_entropy
from fusedloss.functional.linear_cross_entropy import linear_cross_entropy
from fusedloss.functional.margin_logits import margin_logits
from fusedloss.functional.supcon import supcon

__all__ = ["RowStatistics", "cross_entropy", "linear_cross_entropy", "margin_logits", "supcon"]
