"""Losses whose rows are plain PyTorch over the fused statistics of each row: the pattern for a row of your own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedloss import functional
from fusedloss.core.checks import check_choice, check_class_weight, check_ignore_index, check_number, check_per_row
from fusedloss.core.reduce import mean_denominator
from fusedloss.functional import RowStatistics
from fusedloss.losses.cross_entropy import REDUCTIONS
from fusedloss.losses.registered_terms import current, registered
from fusedloss.losses.settings_repr import SettingsRepr
from fusedloss.terms import MarginTerm, Term, label_chain


class RowLoss(SettingsRepr):
    """Base of a loss given by one function of a row's statistics; weights, ignored rows and the mean are done here.

    A subclass defines ``row(cross_entropy, statistics, logits, target)`` and returns one loss per row.

    Args:
        weight: ``(K,)`` class weights; each multiplies the whole row, and the mean divides by them as torch does.
        ignore_index: rows with this label have loss and gradient 0.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        terms: what changes the logit (``fusedloss.terms``).

    Shape:
        input ``(B, K)`` or ``(B, K, d1, ...)``, labels ``(B,)`` or ``(B, d1, ...)``.

    Raises:
        TypeError: probability targets.

    Example:
        >>> import torch, fusedloss
        >>> class Polynomial(fusedloss.RowLoss):  # Poly-1: cross-entropy + (1 - p_y)
        ...     def row(self, cross_entropy, statistics, logits, target):
        ...         return cross_entropy - torch.expm1(-cross_entropy)
        >>> Polynomial()(torch.zeros(1, 2), torch.tensor([0]))  # log 2 + 0.5
        tensor(1.1931)
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        *,
        terms: Sequence[Term] | Term = (),
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, REDUCTIONS)
        self.register_buffer("weight", check_class_weight("weight", weight))
        self.ignore_index, self.reduction = check_ignore_index(ignore_index), reduction
        self.terms = registered(terms)

    def row(self, cross_entropy: Tensor, statistics: RowStatistics, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of each row, of the target's shape.

        Args:
            cross_entropy: ``-log p_y`` of each row, without class weight, differentiable; 0 in ignored rows.
            statistics: of each row; ``log_sum_exp`` and ``target_logit`` are differentiable.
            logits: as they came, before the terms (``self.transformed(logits)`` applies them).
            target: labels, `ignore_index` included.
        """
        raise NotImplementedError(f"{type(self).__name__} must define row(cross_entropy, statistics, logits, target)")

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of logits `input` against labels `target`; see the class for shapes."""
        self._check(input, target)
        cross_entropy, statistics = functional.cross_entropy(
            input, target, None, self.ignore_index, "none", terms=self._terms(), return_stats=True
        )
        if sample_weight is not None:
            sample_weight = check_per_row("sample_weight", sample_weight, target.shape, input)
        row = self.row(cross_entropy, statistics, input, target)
        if not isinstance(row, Tensor) or row.shape != target.shape:
            got = tuple(row.shape) if isinstance(row, Tensor) else type(row).__name__
            raise ValueError(
                f"{type(self).__name__}.row must return a tensor of shape {tuple(target.shape)}; got {got}"
            )
        row_weight = (target != self.ignore_index).to(row.dtype)
        row = torch.where(row_weight > 0, row, torch.zeros_like(row))
        if self.weight is not None:
            row_weight = row_weight * self.weight.to(row.dtype)[target.long().clamp(0, len(self.weight) - 1)]
        if sample_weight is not None:
            row_weight = row_weight * sample_weight.to(row.dtype)
        if self.reduction == "none":
            return row_weight * row
        total = (row_weight * row).sum()
        if self.reduction == "sum":
            return total
        return total / mean_denominator(target, self.weight, self.ignore_index, sample_weight, row.dtype)

    def settings(self) -> dict[str, Any]:
        return {"terms": self._terms()}

    def transformed(self, logits: Tensor) -> Tensor:
        """The logits after the terms, in the dtype that losses are computed in, with gradient.

        Raises:
            TypeError: a term that depends on the label.
        """
        z = logits if logits.dtype == torch.float64 else logits.float()
        for term in self._terms():
            if isinstance(term, MarginTerm):
                raise TypeError(f"terms must hold no margins for {type(self).__name__}; got {type(term).__name__}")
            z = term.apply(z)
        return z

    def _terms(self) -> tuple[Term, ...]:
        return current(self.terms)

    def _check(self, input: Tensor, target: Tensor) -> None:
        """What ``functional.cross_entropy`` takes and a row does not; class weights, which it is not given."""
        if isinstance(target, Tensor) and target.is_floating_point():
            raise TypeError(f"target must hold labels for {type(self).__name__}; got probabilities ({target.dtype})")
        if not isinstance(input, Tensor):
            return
        if input.dim() < 2:
            raise ValueError(f"input must have shape (B, K) or (B, K, d1, ...); got {tuple(input.shape)}")
        if self.weight is None:
            return
        if len(self.weight) != input.shape[1]:
            raise ValueError(
                f"weight must have shape ({input.shape[1]},), one value per class; got {tuple(self.weight.shape)}"
            )
        if self.weight.device != input.device:
            raise ValueError(f"weight must be on the device of input, {input.device}; got {self.weight.device}")


class FLSD53Loss(RowLoss):
    """Focal loss with a sample-dependent exponent: 5 where p_y < 0.2, 3 up to 0.5, `gamma` from there on.

    ``-(1 - p_y) ** gamma(p_y) * log p_y``; the choice of the exponent carries no gradient.

    Args:
        gamma: exponent of rows with p_y of at least 0.5; at least 1.
        weight, ignore_index, reduction, terms: those of ``RowLoss``. The reference code sums by default; this averages.

    Source: Mukhoti et al. 2020, arXiv:2002.09437; github.com/torrvision/focal_calibration.

    Example:
        >>> import torch, fusedloss
        >>> fusedloss.FLSD53Loss()(torch.tensor([[0.0, 2.0]]), torch.tensor([0]))  # p_y = 0.119
        tensor(1.1275)
    """

    def __init__(
        self,
        gamma: float = 3.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        *,
        terms: Sequence[Term] | Term = (),
    ) -> None:
        super().__init__(weight, ignore_index, reduction, terms=terms)
        self.gamma = check_number("gamma", gamma, at_least=1.0)

    def row(self, cross_entropy: Tensor, statistics: RowStatistics, logits: Tensor, target: Tensor) -> Tensor:
        p = torch.exp(-cross_entropy.detach())
        gamma = torch.where(p < 0.2, 5.0, torch.where(p < 0.5, 3.0, self.gamma))
        return (-torch.expm1(-cross_entropy)) ** gamma * cross_entropy


class DualFocalLoss(RowLoss):
    """Focal loss that also looks at the runner-up: ``-(1 - p_y + p_j) ** gamma * log p_y``.

    p_j is the largest probability below p_y (0 where there is none), with gradient. One more read finds j.

    Args:
        gamma: at least 1.
        weight, ignore_index, reduction, terms: those of ``RowLoss``; no margins. The reference code sums.

    Source: Tao, Dong and Xu 2023, arXiv:2305.13665; github.com/Linwei94/DualFocalLoss.

    Example:
        >>> import torch, fusedloss
        >>> fusedloss.DualFocalLoss(gamma=2.0)(torch.zeros(1, 3) + torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0]))
        tensor(0.2229)
    """

    def __init__(
        self,
        gamma: float = 2.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        *,
        terms: Sequence[Term] | Term = (),
    ) -> None:
        super().__init__(weight, ignore_index, reduction, terms=terms)
        self.gamma = check_number("gamma", gamma, at_least=1.0)

    def row(self, cross_entropy: Tensor, statistics: RowStatistics, logits: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            z = self.transformed(logits)
            below = z.masked_fill(z >= statistics.target_logit.unsqueeze(1), -torch.inf)
            largest, column = below.max(1)
            none = (largest == -torch.inf) | (target == self.ignore_index)
        x = logits.gather(1, column.unsqueeze(1)).squeeze(1).to(z.dtype)
        # Rows without a runner-up are masked before the exponential too: what they hold reaches no gradient.
        z_j, _ = label_chain(torch.where(none, torch.zeros_like(x), x), column, self._terms())
        log_p_j = z_j - torch.where(none, torch.zeros_like(z_j), statistics.log_sum_exp)
        p_j = torch.where(none, torch.zeros_like(z_j), log_p_j.exp())
        return (p_j - torch.expm1(-cross_entropy)) ** self.gamma * cross_entropy


class ECPLoss(RowLoss):
    """Entropy penalty (confidence penalty): ``-log p_y - strength * H(p)`` with ``H(p) = -sum_k p_k log p_k``.

    Args:
        strength: at least 0.
        weight, ignore_index, reduction, terms: those of ``RowLoss``; no margins.

    The entropy is taken from the logits in plain PyTorch.

    Source: Pereyra et al. 2017, arXiv:1701.06548.

    Example:
        >>> import torch, fusedloss
        >>> fusedloss.ECPLoss(strength=0.1)(torch.zeros(1, 2), torch.tensor([0]))  # 0.9 log 2
        tensor(0.6238)
    """

    def __init__(
        self,
        strength: float = 0.1,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        *,
        terms: Sequence[Term] | Term = (),
    ) -> None:
        super().__init__(weight, ignore_index, reduction, terms=terms)
        self.strength = check_number("strength", strength, at_least=0.0)

    def row(self, cross_entropy: Tensor, statistics: RowStatistics, logits: Tensor, target: Tensor) -> Tensor:
        log_p = _without_ignored(self.transformed(logits), target, self.ignore_index).log_softmax(1)
        # A class that is masked out, p = 0, adds no entropy and gets no gradient.
        entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(1)
        return cross_entropy - self.strength * entropy


class ACLSLoss(RowLoss):
    """Adaptive and conditional label smoothing: cross-entropy plus squared penalties beyond a margin.

    ``l = -log p_y + strength * (positive * relu(z_max - margin)**2
    + negative / (K - 1) * sum_k relu(z_max - z_k - margin)**2)``, the sum over k below the maximum, whose gradient
    passes through z_k alone. The first penalty takes the largest logit as it is: a common offset changes the loss.

    Args:
        strength, positive, negative: at least 0. margin: at least 0 (10; 6 for CIFAR in the paper).
        weight, ignore_index, reduction, terms: those of ``RowLoss``; no margins.

    The penalties are taken from the logits in plain PyTorch.

    Source: Park et al. 2023, arXiv:2308.11911; github.com/cvlab-yonsei/ACLS.

    Example:
        >>> import torch, fusedloss
        >>> fusedloss.ACLSLoss(strength=0.1, margin=10.0)(torch.tensor([[12.0, 0.0]]), torch.tensor([0]))
        tensor(0.4400)
    """

    def __init__(
        self,
        strength: float = 0.1,
        margin: float = 10.0,
        positive: float = 1.0,
        negative: float = 0.1,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        *,
        terms: Sequence[Term] | Term = (),
    ) -> None:
        super().__init__(weight, ignore_index, reduction, terms=terms)
        self.strength = check_number("strength", strength, at_least=0.0)
        self.margin = check_number("margin", margin, at_least=0.0)
        self.positive = check_number("positive", positive, at_least=0.0)
        self.negative = check_number("negative", negative, at_least=0.0)

    def row(self, cross_entropy: Tensor, statistics: RowStatistics, logits: Tensor, target: Tensor) -> Tensor:
        z = _without_ignored(self.transformed(logits), target, self.ignore_index)
        largest = z.max(1).values
        tied = z == largest.unsqueeze(1)
        above = tied.sum(1) * (largest - self.margin).relu().square()
        gaps = (largest.detach().unsqueeze(1) - z - self.margin).relu().square().masked_fill(tied, 0.0)
        below = gaps.sum(1) / max(z.shape[1] - 1, 1)
        return cross_entropy + self.strength * (self.positive * above + self.negative * below)


def _without_ignored(z: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Zeros in the rows that are ignored: whatever they hold, NaN too, reaches no gradient."""
    return z.masked_fill((target == ignore_index).unsqueeze(1), 0.0)
