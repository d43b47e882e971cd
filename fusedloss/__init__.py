"""Fused classification and metric-learning losses for PyTorch."""

from typing import TYPE_CHECKING

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
    PolyLoss,
    PrototypeLoss,
    RowLoss,
    SupConLoss,
    VACELoss,
)
from fusedloss.losses.class_statistics import ClassStatistics
from fusedloss.losses.norm_statistics import NormStatistics
from fusedloss.terms import AdditiveMargin, AngularMargin, ClassTemperature, CombinedMargin, Prior, Scale, SoftCap

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
    "PolyLoss",
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

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name):
        """`__version__`, which reads the installed package's metadata only when it is asked for."""
        if name != "__version__":
            raise AttributeError(f"module 'fusedloss' has no attribute {name!r}")
        from importlib import metadata

        try:
            return metadata.version("fusedloss")
        except metadata.PackageNotFoundError:
            return "0+unknown"  # a source tree that was never installed
