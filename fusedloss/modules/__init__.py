"""The losses as modules: they keep parameters, buffers and hooks, and call functional."""

from fusedloss.modules.cross_entropy import CrossEntropyLoss
from fusedloss.modules.feature_queue import FeatureQueue
from fusedloss.modules.fedlas import FeDLaSLoss
from fusedloss.modules.linear_cross_entropy import LinearCrossEntropyLoss
from fusedloss.modules.margin_heads import (
    AdaFaceLoss,
    ArcFaceHead,
    ArcFaceLoss,
    CombinedMarginLoss,
    CosFaceLoss,
    CurricularFaceLoss,
)
from fusedloss.modules.presets import BalancedSoftmaxLoss, FocalLoss, LDAMLoss, MbLSLoss
from fusedloss.modules.prototypes import PrototypeLoss
from fusedloss.modules.rows_over_statistics import ACLSLoss, DualFocalLoss, ECPLoss, FLSD53Loss, RowLoss
from fusedloss.modules.supcon import SupConLoss
from fusedloss.modules.vace import VACELoss

__all__ = [
    "ACLSLoss",
    "AdaFaceLoss",
    "ArcFaceHead",
    "ArcFaceLoss",
    "BalancedSoftmaxLoss",
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
    "MbLSLoss",
    "PrototypeLoss",
    "RowLoss",
    "SupConLoss",
    "VACELoss",
]
