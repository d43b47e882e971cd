"""Affine terms baked into a linear layer."""

from __future__ import annotations

import torch
from torch import nn

from fusedloss.terms import AffineTerm, fold_affine


def check_linear(name: str, linear: nn.Module) -> None:
    """Raises ``TypeError`` unless `linear` is an ``nn.Linear``."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{name}: linear must be an nn.Linear; got {type(linear).__name__}")


def folded(linear: nn.Linear, terms: tuple[AffineTerm, ...]) -> nn.Linear:
    """A new layer whose outputs are `terms` applied to those of `linear`."""
    weight = linear.weight.detach()
    bias = weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
    scale, offset = fold_affine(terms, linear.out_features, torch.float64, weight.device)
    new_weight, new_bias = weight.double(), bias.double()
    with torch.no_grad():
        if scale is not None:
            new_weight, new_bias = new_weight * scale.unsqueeze(1), new_bias * scale
        if offset is not None:
            new_bias = new_bias + offset
    layer = nn.Linear(linear.in_features, linear.out_features, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(new_weight)
        layer.bias.copy_(new_bias)
    return layer
