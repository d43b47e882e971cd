"""Row statistics of softmax cross-entropy in plain PyTorch. Autograd derives every gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedloss.core.row_loss import Statistics
from fusedloss.terms import MarginTerm, Term, per_class, widened


def row_statistics(
    logits: Tensor,
    target: Tensor,
    terms: Sequence[Term],
    class_weight: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
    penalty_margin: float | None = None,
) -> Statistics:
    """Statistics of ``(B, K)`` or ``(B, K, d)`` logits after `terms`, computed in `dtype`; see ``rows.Statistics``.

    Formula: z = terms(x), lse = log sum_j exp z_j, log p_j = z_j - lse.
    """
    soft = target.is_floating_point()
    z = terms_applied(logits, terms, dtype, None if soft else torch.where(target != ignore_index, target, -1))
    hinge = None if penalty_margin is None else (z.max(1, keepdim=True).values - z - penalty_margin).relu().sum(1)
    log_p = z.log_softmax(1)
    log_sum_exp = z.logsumexp(1)
    weight = None if class_weight is None else per_class(class_weight, z)
    uniform = -_weighted(log_p, weight).sum(1)
    if soft:
        q = target.to(dtype) if weight is None else target.to(dtype) * weight
        cross_entropy = -_weighted(log_p, q).sum(1)
        target_logit = _weighted(z, q).sum(1)
        return Statistics(log_sum_exp, target_logit, cross_entropy, uniform, torch.zeros_like(log_sum_exp), hinge)
    kept = target != ignore_index
    label = torch.where(kept, target, 0).unsqueeze(1)
    cross_entropy = -log_p.gather(1, label).squeeze(1)
    if class_weight is not None:
        cross_entropy = class_weight[label.squeeze(1)] * cross_entropy
    rest = log_p.exp().scatter(1, label, 0.0).sum(1)
    zero = torch.zeros((), dtype=dtype, device=z.device)
    return Statistics(
        log_sum_exp,
        torch.where(kept, z.gather(1, label).squeeze(1), zero),
        torch.where(kept, cross_entropy, zero),
        torch.where(kept, uniform, zero),
        torch.where(kept, rest, zero),
        None if hinge is None else torch.where(kept, hinge, zero),
    )


def soft_focal_loss(
    logits: Tensor,
    target: Tensor,
    terms: Sequence[Term],
    class_weight: Tensor | None,
    smoothing: Tensor | float,
    gamma: float,
    dtype: torch.dtype,
) -> Tensor:
    """Each row's sum_j w_j q_j (1 - p_j)^gamma (-log p_j), with q the smoothed probabilities of `target`."""
    log_p = terms_applied(logits, terms, dtype).log_softmax(1)
    if isinstance(smoothing, Tensor):
        smoothing = smoothing.unsqueeze(1)
    q = (1 - smoothing) * target.to(dtype) + smoothing / logits.shape[1]
    if class_weight is not None:
        q = q * per_class(class_weight, log_p)
    # A class of probability 1 has focal factor 0, and its slope is 0 too.
    certain = log_p == 0
    focus = -torch.expm1(torch.where(certain, torch.full_like(log_p, -1.0), log_p))
    focus = torch.where(certain, torch.zeros_like(focus), focus**gamma)
    return -_weighted(log_p, q * focus).sum(1)


def terms_applied(logits: Tensor, terms: Sequence[Term], dtype: torch.dtype, target: Tensor | None = None) -> Tensor:
    """The logits in `dtype` after every term, in order; without `target` margins change nothing."""
    z = logits.to(dtype)
    for term in terms:
        term = widened(term, dtype)
        z = (term.apply(z, target) if isinstance(term, MarginTerm) else term.apply(z)).to(dtype)
    return z


def _weighted(values: Tensor, weight: Tensor | float | None) -> Tensor:
    """weight * values, where a weight of 0 gives 0 even at an infinite value; differentiable in both."""
    if weight is None:
        return values
    return weight * values.masked_fill((weight == 0) & torch.isinf(values), 0.0)
