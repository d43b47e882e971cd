"""Supervised contrast in plain PyTorch, similarities stored. Autograd derives every gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedloss.core.normalize import unit_rows
from fusedloss.core.operands import AnchorSums, SavedAnchors, SupConInputs, SupConMask

IGNORED, NEGATIVE = -1, -2


def supcon_stats(inputs: SupConInputs) -> AnchorSums:
    """The loss of each anchor, its largest exponent and its sum of exponentials."""
    with torch.no_grad():
        return anchor_sums(inputs)


def supcon_backward(inputs: SupConInputs, saved: SavedAnchors, grad_loss: Tensor, mask: SupConMask) -> list[Tensor]:
    """The gradients that `mask` names, from those of the losses, which are computed again."""
    features = inputs.features.detach().requires_grad_(mask.features)
    temperature = inputs.temperature.detach().requires_grad_(mask.temperature)
    leaves = [leaf for leaf, needed in zip((features, temperature), mask, strict=True) if needed]
    with torch.enable_grad():
        loss = anchor_sums(inputs._replace(features=features, temperature=temperature)).loss
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    grads = torch.autograd.grad(loss, leaves, grad_loss, allow_unused=True, materialize_grads=True)
    if mask.features:
        grads[0][inputs.num_grad_rows :] = 0
    return list(grads)


def anchor_sums(inputs: SupConInputs) -> AnchorSums:
    """The contrast of each anchor with every other row, ``(A,)``; 0 where an anchor has no positive.

    Formula: ``s_ij = <x_i, x_j> / T``, ``P_i`` the positives of i, ``A_i`` all rows but i and the ignored ones,
    ``l_i = log sum_{j in A_i} w_ij exp(s_ij) - sum_{j in P_i} q_j s_ij / sum_{j in P_i} q_j``
    where w, v and q are the rows of ``inputs.weights`` and ``w_ij = v_j`` if j is a positive of i, else ``w_j``.
    The shift is an anchor's largest s_ij of a weight above 0.
    """
    features, codes, weights, anchors = wide_rows(inputs), inputs.codes, inputs.weights, inputs.num_anchors
    rows = features.shape[0]
    with torch.autocast(features.device.type, enabled=False):
        similarity = features[:anchors] @ features.t() / inputs.temperature
    places = torch.arange(rows, device=features.device)
    own = places[:anchors].unsqueeze(1) == places
    positive = _positives(inputs) & ~own
    contrasted = ~own if inputs.mask is not None else ~own & (codes != IGNORED)
    has_positive = inputs.per_positive > 0
    share, weight = positive.to(similarity.dtype), None
    if weights is not None:
        weight = torch.where(positive, weights[1], weights[0])
        contrasted = contrasted & (weight > 0)
        share = share * weights[2]
    # An anchor without contrasts would have a sum of 0 and NaN gradients.
    candidates = similarity.masked_fill(~contrasted, -torch.inf).masked_fill(~has_positive.unsqueeze(1), 0.0)
    shift = candidates.detach().amax(1, keepdim=True) if rows else candidates.detach().sum(1, keepdim=True)
    shift = shift.masked_fill(shift == -torch.inf, 0.0)
    exponentials = (candidates - shift).exp()
    total = (exponentials if weight is None else exponentials * weight).sum(1)
    relative = (similarity - shift).masked_fill(~positive, 0.0)
    loss = total.log() - (share * relative).sum(1) * inputs.per_positive
    return AnchorSums(torch.where(has_positive, loss, 0.0), shift.squeeze(1), total.detach())


def wide_rows(inputs: SupConInputs) -> Tensor:
    """The features in the compute dtype, differentiable; those of 16 bits over their lengths."""
    if inputs.norms is None:
        return inputs.features
    return unit_rows(inputs.features.to(inputs.per_positive.dtype))


def _positives(inputs: SupConInputs) -> Tensor:
    """Whether row j is a positive of anchor i, ``(A, M)``; the diagonal is not cleared."""
    codes, mask, anchors = inputs.codes, inputs.mask, inputs.num_anchors
    if mask is None:
        return (codes[:anchors].unsqueeze(1) == codes) & (codes >= 0)
    samples = mask.shape[0]
    return mask.repeat(anchors // samples, codes.shape[0] // samples) if samples else mask
