"""Solvers of heads on frozen features that are no training loop: full-batch logistic regression and closed forms.

Everything here works on tensors and row sources, and knows neither recipes nor banks:

    fit_logistic_path(rows, num_classes, c, settings, finished=..., on_fit=...) -> [LogisticFit(weight, bias, ...), ...]
    fit_class_means(rows, num_classes, metric, scale) -> LinearFit(weight, bias, unit_rows)
    fit_gda(rows, num_classes, shrinkage, prior) -> LinearFit
    NearestNeighbours(rows, num_classes, k, temperature, metric, smoothing)(features) -> logits

with ``rows`` a ``TensorRows(features, labels)`` or an
``ArrayRows(memory_map, labels, row_numbers, transform, device)``.
"""

from fusedloss.train.solvers.closed import LinearFit, fit_class_means, fit_gda
from fusedloss.train.solvers.logistic import LogisticFit, LogisticSettings, fit_logistic_path
from fusedloss.train.solvers.nearest import NearestNeighbours
from fusedloss.train.solvers.rows import ArrayRows, RowSource, TensorRows

__all__ = [
    "ArrayRows",
    "LinearFit",
    "LogisticFit",
    "LogisticSettings",
    "NearestNeighbours",
    "RowSource",
    "TensorRows",
    "fit_class_means",
    "fit_gda",
    "fit_logistic_path",
]
