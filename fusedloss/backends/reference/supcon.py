"""Supervised contrast in plain PyTorch, similarities stored. Autograd derives every gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedloss.core.operands import AnchorSums, SupConInputs, SupConMask

IGNORED, NEGATIVE = -1, -2


def supcon_stats(inputs: SupConInputs) -> AnchorSums:
    """The loss of each anchor, its largest exponent and its sum of exponentials."""
    with torch.no_grad():
        return anchor_sums(inputs)


def supcon_backward(inputs: SupConInputs, saved: AnchorSums, grad_loss: Tensor, mask: SupConMask) -> list[Tensor]:
    """The gradients that `mask` names, from those of the losses, which are computed again."""
    features = inputs.features.detach().requires_grad_(mask.features)
    temperature = inputs.temperature.detach().requires_grad_(mask.temperature)
    leaves = [leaf for leaf, needed in zip((features, temperature), mask, strict=True) if needed]
    with torch.enable_grad():
        loss = anchor_sums(inputs._replace(features=features, temperature=temperature)).loss
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    grads = torch.autograd.grad(loss, leaves, grad_loss, allow_unused=True, materialize_grads=True)
    return list(grads)


def anchor_sums(inputs: SupConInputs) -> AnchorSums:
    """The contrast of each anchor with every other row, ``(A,)``; 0 where an anchor has no positive.

    Formula: ``s_ij = <x_i, x_j> / T``, ``P_i`` the positives of i, ``A_i`` all rows but i and the ignored ones,
    ``l_i = log sum_{j in A_i} w_ij exp(s_ij) - sum_{j in P_i} q_j s_ij / sum_{j in P_i} q_j``
    where w, v and q are the rows of ``inputs.weights`` and ``w_ij = v_j`` if j is a positive of i, else ``w_j``.
    """
    features, codes, weights, anchors = inputs.features, inputs.codes, inputs.weights, inputs.num_anchors
    rows = features.shape[0]
    # Not detach(): what autograd is to see is features itself, up to the rows without gradient.
    features = torch.cat([features[: inputs.num_grad_rows], features[inputs.num_grad_rows :].detach()])
    similarity = features[:anchors] @ features.t() / inputs.temperature
    own = torch.arange(anchors, device=features.device).unsqueeze(1) == torch.arange(rows, device=features.device)
    positive = _positives(inputs) & ~own
    excluded = own | (codes == IGNORED)
    exponents, share = similarity, positive.to(similarity.dtype)
    if weights is not None:
        exponents = similarity + torch.where(positive, weights[1], weights[0]).log()
        share = share * weights[2]
    has_positive = inputs.per_positive > 0
    # An anchor without contrasts would have a sum of 0 and NaN gradients.
    exponents = exponents.masked_fill(excluded, -torch.inf).masked_fill(~has_positive.unsqueeze(1), 0.0)
    largest = exponents.detach().amax(1, keepdim=True) if rows else exponents.sum(1, keepdim=True)
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    total = (exponents - largest).exp().sum(1)
    relative = (similarity - largest).masked_fill(~positive, 0.0)
    loss = total.log() - (share * relative).sum(1) * inputs.per_positive
    loss = torch.where(has_positive, loss, torch.zeros_like(loss))
    return AnchorSums(loss, largest.squeeze(1), total.detach())


def _positives(inputs: SupConInputs) -> Tensor:
    """Whether row j is a positive of anchor i, ``(A, M)``; the diagonal is not cleared."""
    codes, mask, anchors = inputs.codes, inputs.mask, inputs.num_anchors
    if mask is None:
        return (codes[:anchors].unsqueeze(1) == codes) & (codes >= 0)
    samples = mask.shape[0]
    return mask.repeat(anchors // samples, codes.shape[0] // samples) if samples else mask
