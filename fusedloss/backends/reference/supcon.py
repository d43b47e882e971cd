"""Supervised contrast in plain PyTorch: the loss of each anchor. Autograd derives every gradient."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED, NEGATIVE = -1, -2


def row_loss(
    features: Tensor,
    codes: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    per_positive: Tensor,
    temperature: Tensor,
    anchors: int,
) -> Tensor:
    """The contrast of each anchor with every other row, ``(A,)``; 0 where an anchor has no positive.

    Formula: ``s_ij = <x_i, x_j> / T``, ``P_i`` the positives of i, ``A_i`` all rows but i and the ignored ones,
    ``l_i = log sum_{j in A_i} w_ij exp(s_ij) - sum_{j in P_i} q_j s_ij / sum_{j in P_i} q_j``
    with ``w_ij = v_j`` where j is a positive of i and ``w_j`` elsewhere.

    Args:
        features: ``(M, D)`` in the computing dtype; the first A rows are the anchors, all are contrasts.
        codes: int32 ``(M,)``: equal and not negative means positive; ``IGNORED`` rows are no contrasts, ``NEGATIVE``
            ones are nobody's positives.
        mask: bool ``(B, B)`` in place of codes; ``M = V * B`` rows, view-major: row i is sample ``i % B``.
        weights: ``(3, M)``: w, v and q; None for ones.
        per_positive: ``(A,)``: ``1 / sum_{j in P_i} q_j``, 0 where there is no positive or the anchor is ignored.
        temperature: T, 0-dim.
        anchors: A.
    """
    similarity = features[:anchors] @ features.t() / temperature
    own = torch.eye(anchors, len(features), dtype=torch.bool, device=features.device)
    positive = positives(codes, mask, anchors, len(features)) & ~own
    absent = own | (codes == IGNORED)
    exponents, share = similarity, positive.to(similarity.dtype)
    if weights is not None:
        exponents = similarity + torch.where(positive, weights[1], weights[0]).log()
        share = share * weights[2]
    has_positive = per_positive > 0
    # An anchor without contrasts would have lse = -inf and slopes NaN.
    exponents = exponents.masked_fill(absent, -torch.inf).masked_fill(~has_positive.unsqueeze(1), 0.0)
    largest = exponents.detach().amax(1, keepdim=True) if len(features) else exponents.sum(1, keepdim=True)
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    log_sum = (exponents - largest).logsumexp(1)
    relative = (similarity - largest).masked_fill(~positive, 0.0)
    loss = log_sum - (share * relative).sum(1) * per_positive
    return torch.where(has_positive, loss, torch.zeros_like(loss))


def positives(codes: Tensor, mask: Tensor | None, anchors: int, rows: int) -> Tensor:
    """Whether row j is a positive of anchor i, ``(A, M)``; the diagonal is not cleared."""
    if mask is None:
        return (codes[:anchors].unsqueeze(1) == codes) & (codes >= 0)
    views = rows // len(mask)
    return mask.repeat(anchors // len(mask), views)
