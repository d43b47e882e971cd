"""Fused classification and metric-learning losses for PyTorch."""

from fusedloss import functional, terms
from fusedloss.backends import backend
from fusedloss.functional import RowStatistics, cross_entropy
from fusedloss.modules import CrossEntropyLoss, VACELoss
from fusedloss.statistics import ClassStatistics, NormStatistics
from fusedloss.terms import ClassTemperature, Prior, Scale

__version__ = "0.1.0"

__all__ = [
    "ClassStatistics",
    "ClassTemperature",
    "CrossEntropyLoss",
    "NormStatistics",
    "Prior",
    "RowStatistics",
    "Scale",
    "VACELoss",
    "backend",
    "cross_entropy",
    "functional",
    "terms",
]
