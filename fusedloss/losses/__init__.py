"""The losses as modules: they keep parameters, buffers and hooks, and call functional."""

from fusedloss.losses.adaptive_margins import AdaFaceLoss, CurricularFaceLoss
from fusedloss.losses.cross_entropy import CrossEntropyLoss
from fusedloss.losses.custom_row_loss import ACLSLoss, DualFocalLoss, ECPLoss, FLSD53Loss, RowLoss
from fusedloss.losses.feature_queue import FeatureQueue
from fusedloss.losses.fedlas import FeDLaSLoss
from fusedloss.losses.linear_cross_entropy import LinearCrossEntropyLoss
from fusedloss.losses.margin_heads import ArcFaceHead, ArcFaceLoss, CombinedMarginLoss, CosFaceLoss
from fusedloss.losses.presets import BalancedSoftmaxLoss, FocalLoss, LDAMLoss, MbLSLoss, PolyLoss
from fusedloss.losses.prototypes import PrototypeLoss
from fusedloss.losses.supcon import SupConLoss
from fusedloss.losses.vace import VACELoss

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
    "PolyLoss",
    "PrototypeLoss",
    "RowLoss",
    "SupConLoss",
    "VACELoss",
]
