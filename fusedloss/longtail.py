"""Priors and class weights for long-tailed data, each computed in float64 and returned in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def class_counts(labels: Tensor, num_classes: int) -> Tensor:
    """Number of samples of each class, ``n_c = sum_i 1[y_i = c]``.

    Args:
        labels: int64 labels of any shape, in ``[0, num_classes)``.
        num_classes: number of classes K.

    Returns:
        int64 tensor ``(K,)``; a class without samples has 0.

    Raises:
        TypeError: labels that are not integers.
        ValueError: ``num_classes`` below 1.
        IndexError: a label outside ``[0, num_classes)``.

    Example:
        >>> class_counts(torch.tensor([0, 2, 2]), 3)
        tensor([1, 0, 2])
    """
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    flat = labels.reshape(-1).to(torch.int64)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= num_classes):
        raise IndexError(f"labels must lie in [0, {num_classes}), got {int(flat.min())} to {int(flat.max())}")
    return torch.bincount(flat, minlength=num_classes)


def effective_number_weights(counts: Tensor, beta: float = 0.9999) -> Tensor:
    """Class-balanced weights ``w_c ∝ (1 - beta) / (1 - beta**n_c)`` (Cui et al., CVPR 2019).

    The weights sum to the number of classes present; a class without samples has weight 0.

    Args:
        counts: samples per class ``(K,)``, over the whole data set.
        beta: in ``[0, 1)``; 0 weighs all classes equally, towards 1 it becomes the inverse frequency.

    Returns:
        float32 tensor ``(K,)``.

    Raises:
        ValueError: ``beta`` outside ``[0, 1)``, negative or non-finite counts, or no sample at all.

    Example:
        >>> effective_number_weights(torch.tensor([100, 0, 100]))
        tensor([1., 0., 1.])
    """
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"beta must lie in [0, 1), got {beta}")
    counts = _checked_counts(counts)
    # 1 - beta**n loses all its digits as beta approaches 1; expm1 keeps them
    effective = torch.ones_like(counts) if beta == 0.0 else -torch.expm1(counts * math.log(beta))
    return _normalized(1.0 / effective, counts)


def inverse_frequency_weights(counts: Tensor, power: float = 1.0) -> Tensor:
    """Weights ``w_c ∝ n_c**-power``, with mean 1 over the classes present; 0 for a class without samples.

    Args:
        counts: samples per class ``(K,)``.
        power: 1 is the inverse frequency, 0.5 its square root, 0 no weighting.

    Returns:
        float32 tensor ``(K,)``.

    Raises:
        ValueError: a negative or non-finite ``power``, negative or non-finite counts, or no sample at all.

    Example:
        >>> inverse_frequency_weights(torch.tensor([30, 10]))
        tensor([0.5000, 1.5000])
    """
    if not (math.isfinite(power) and power >= 0.0):
        raise ValueError(f"power must be finite and at least 0, got {power}")
    counts = _checked_counts(counts)
    return _normalized(counts.pow(-power), counts)


def log_prior(counts: Tensor, floor: float = 0.0) -> Tensor:
    """Log class prior ``log(max(n_c, floor) / sum_k n_k)``, to be added to the logits while training.

    Args:
        counts: samples per class ``(K,)``.
        floor: least count assumed of a class; with 0 a class without samples has ``-inf``
            (its probability and gradient are then 0).

    Returns:
        float32 tensor ``(K,)``.

    Raises:
        ValueError: a negative ``floor``, negative or non-finite counts, or no sample at all.

    Example:
        >>> log_prior(torch.tensor([1, 1])).exp()
        tensor([0.5000, 0.5000])
    """
    if not (math.isfinite(floor) and floor >= 0.0):
        raise ValueError(f"floor must be finite and at least 0, got {floor}")
    counts = _checked_counts(counts)
    return (counts.clamp(min=floor) / counts.sum()).log().to(torch.float32)


def _checked_counts(counts: Tensor) -> Tensor:
    counts = torch.as_tensor(counts)
    if counts.ndim != 1 or counts.numel() == 0:
        raise ValueError(f"counts must have shape (num_classes,), got {tuple(counts.shape)}")
    counts = counts.to(torch.float64)
    if not bool(torch.isfinite(counts).all()) or bool((counts < 0).any()):
        raise ValueError("counts must be finite and at least 0")
    if not bool((counts > 0).any()):
        raise ValueError("counts must name at least one sample, got zeros only")
    return counts


def _normalized(weights: Tensor, counts: Tensor) -> Tensor:
    present = counts > 0
    weights = torch.where(present, weights, torch.zeros_like(weights))
    return (weights * (present.sum() / weights.sum())).to(torch.float32)
