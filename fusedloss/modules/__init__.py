"""The losses as modules: they keep parameters, buffers and hooks, and call functional."""

from fusedloss.modules.cross_entropy import CrossEntropyLoss
from fusedloss.modules.fedlas import FeDLaSLoss
from fusedloss.modules.presets import BalancedSoftmaxLoss, FocalLoss, LDAMLoss, MbLSLoss
from fusedloss.modules.rows_over_statistics import ACLSLoss, DualFocalLoss, ECPLoss, FLSD53Loss, RowLoss
from fusedloss.modules.vace import VACELoss

__all__ = [
    "ACLSLoss",
    "BalancedSoftmaxLoss",
    "CrossEntropyLoss",
    "DualFocalLoss",
    "ECPLoss",
    "FLSD53Loss",
    "FeDLaSLoss",
    "FocalLoss",
    "LDAMLoss",
    "MbLSLoss",
    "RowLoss",
    "VACELoss",
]
