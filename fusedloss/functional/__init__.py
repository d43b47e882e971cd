"""The losses as functions: arguments are checked once (problem.py), one operation answers, and rows are reduced."""

from fusedloss.functional.softmax_ce import RowStatistics, cross_entropy

__all__ = ["RowStatistics", "cross_entropy"]
