"""The losses as modules: they keep parameters, buffers and hooks, and call functional."""

from fusedloss.modules.cross_entropy import CrossEntropyLoss
from fusedloss.modules.vace import VACELoss

__all__ = ["CrossEntropyLoss", "VACELoss"]
