"""Row statistics of softmax cross-entropy in plain PyTorch. Autograd derives every gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedloss.rows import Statistics
from fusedloss.terms import AffineTerm, per_class, widened


def row_statistics(
    logits: Tensor,
    target: Tensor,
    terms: Sequence[AffineTerm],
    class_weight: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
) -> Statistics:
    """Statistics of ``(B, K)`` or ``(B, K, d)`` logits after `terms`, computed in `dtype`; see ``rows.Statistics``.

    Formula: z = terms(x), lse = log sum_j exp z_j, log p_j = z_j - lse.
    """
    z = terms_applied(logits, terms, dtype)
    log_p = z.log_softmax(1)
    log_sum_exp = z.logsumexp(1)
    weight = None if class_weight is None else per_class(class_weight, z)
    uniform = -_weighted(log_p, weight).sum(1)
    if target.is_floating_point():
        q = target.to(dtype) if weight is None else target.to(dtype) * weight
        cross_entropy = -_weighted(log_p, q).sum(1)
        target_logit = _weighted(z, q).sum(1)
        return Statistics(log_sum_exp, target_logit, cross_entropy, uniform, torch.zeros_like(log_sum_exp))
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
    )


def terms_applied(logits: Tensor, terms: Sequence[AffineTerm], dtype: torch.dtype) -> Tensor:
    """The logits in `dtype` after every term, in order."""
    z = logits.to(dtype)
    for term in terms:
        z = widened(term, dtype).apply(z).to(dtype)
    return z


def _weighted(values: Tensor, weight: Tensor | float | None) -> Tensor:
    """weight * values, where a weight of 0 gives 0 even at an infinite value; differentiable in both."""
    if weight is None:
        return values
    return weight * values.masked_fill((weight == 0) & torch.isinf(values), 0.0)
