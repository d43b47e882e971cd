"""The soft cap: the only term that bends every logit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusedloss.terms.term import Term, check_value


@dataclass(frozen=True, eq=False)
class SoftCap(Term):
    """Keeps every logit between ``-cap`` and ``cap``: ``z_j = cap * tanh(x_j / cap)``.

    Fused where it comes first and `cap` is a float; terms before it, and a tensor `cap`, cost one more pass over the
    logits.

    Args:
        cap: positive and finite; a float or a 0-dim tensor.

    Source: Gemma 2, arXiv:2408.00118, section 2.

    >>> import torch
    >>> from fusedloss.terms import SoftCap
    >>> SoftCap(30.0).apply(torch.tensor([[1.0, 1000.0]]))
    tensor([[ 0.9996, 30.0000]])
    """

    cap: Tensor | float

    def __post_init__(self) -> None:
        if isinstance(self.cap, Tensor) and self.cap.dim() > 0:
            raise ValueError(f"SoftCap: cap must be a float or a 0-dim tensor; got shape {tuple(self.cap.shape)}")
        check_value(self, "cap", above=0.0)

    def apply(self, logits: Tensor, target: Tensor | None = None) -> Tensor:
        return self.cap * torch.tanh(logits / self.cap)

    def label(self, z: Tensor, classes: Tensor) -> tuple[Tensor, Tensor | float]:
        bent = torch.tanh(z / self.cap)
        return self.cap * bent, 1 - bent.square()
