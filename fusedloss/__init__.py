"""Fused classification and metric-learning losses for PyTorch."""

from fusedloss import functional, terms
from fusedloss.backends import backend
from fusedloss.functional import RowStatistics, cross_entropy
from fusedloss.modules import (
    ACLSLoss,
    BalancedSoftmaxLoss,
    CrossEntropyLoss,
    DualFocalLoss,
    ECPLoss,
    FeDLaSLoss,
    FLSD53Loss,
    FocalLoss,
    LDAMLoss,
    MbLSLoss,
    RowLoss,
    VACELoss,
)
from fusedloss.rows import MarginPenalty
from fusedloss.statistics import ClassStatistics, NormStatistics
from fusedloss.terms import AdditiveMargin, AngularMargin, ClassTemperature, CombinedMargin, Prior, Scale, SoftCap

__version__ = "0.1.0"

__all__ = [
    "ACLSLoss",
    "AdditiveMargin",
    "AngularMargin",
    "BalancedSoftmaxLoss",
    "ClassStatistics",
    "ClassTemperature",
    "CombinedMargin",
    "CrossEntropyLoss",
    "DualFocalLoss",
    "ECPLoss",
    "FLSD53Loss",
    "FeDLaSLoss",
    "FocalLoss",
    "LDAMLoss",
    "MarginPenalty",
    "MbLSLoss",
    "NormStatistics",
    "Prior",
    "RowLoss",
    "RowStatistics",
    "Scale",
    "SoftCap",
    "VACELoss",
    "backend",
    "cross_entropy",
    "functional",
    "terms",
]
