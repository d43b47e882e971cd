"""Solvers of heads on frozen features that are no training loop: full-batch logistic regression and closed forms.

Everything here works on tensors and row sources, and knows neither recipes nor banks.
"""

from fusedloss.train.solvers.logistic import LogisticFit, LogisticSettings, fit_logistic_path
from fusedloss.train.solvers.rows import ArrayRows, RowSource, TensorRows

__all__ = ["ArrayRows", "LogisticFit", "LogisticSettings", "RowSource", "TensorRows", "fit_logistic_path"]
