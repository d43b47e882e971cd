"""Fused classification and metric-learning losses for PyTorch."""

from fusedloss import functional, terms
from fusedloss.backends import backend
from fusedloss.core.row_loss import MarginPenalty
from fusedloss.functional import RowStatistics, cross_entropy, linear_cross_entropy, margin_logits, supcon
from fusedloss.losses import (
    ACLSLoss,
    AdaFaceLoss,
    ArcFaceHead,
    ArcFaceLoss,
    BalancedSoftmaxLoss,
    CombinedMarginLoss,
    CosFaceLoss,
    CrossEntropyLoss,
    CurricularFaceLoss,
    DualFocalLoss,
    ECPLoss,
    FeatureQueue,
    FeDLaSLoss,
    FLSD53Loss,
    FocalLoss,
    LDAMLoss,
    LinearCrossEntropyLoss,
    MbLSLoss,
    PrototypeLoss,
    RowLoss,
    SupConLoss,
    VACELoss,
)
from fusedloss.losses.class_statistics import ClassStatistics
from fusedloss.losses.norm_statistics import NormStatistics
from fusedloss.terms import AdditiveMargin, AngularMargin, ClassTemperature, CombinedMargin, Prior, Scale, SoftCap

__version__ = "0.1.0"

__all__ = [
    "ACLSLoss",
    "AdaFaceLoss",
    "AdditiveMargin",
    "AngularMargin",
    "ArcFaceHead",
    "ArcFaceLoss",
    "BalancedSoftmaxLoss",
    "ClassStatistics",
    "ClassTemperature",
    "CombinedMargin",
    "CombinedMarginLoss",
    "CosFaceLoss",
    "CrossEntropyLoss",
    "CurricularFaceLoss",
    "DualFocalLoss",
    "ECPLoss",
    "FLSD53Loss",
    "FeDLaSLoss",
    "FeatureQueue",
    "FocalLoss",
    "LDAMLoss",
    "LinearCrossEntropyLoss",
    "MarginPenalty",
    "MbLSLoss",
    "NormStatistics",
    "Prior",
    "PrototypeLoss",
    "RowLoss",
    "RowStatistics",
    "Scale",
    "SoftCap",
    "SupConLoss",
    "VACELoss",
    "backend",
    "cross_entropy",
    "functional",
    "linear_cross_entropy",
    "margin_logits",
    "supcon",
    "terms",
]
