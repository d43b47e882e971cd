"""Softmax cross-entropy of logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from fusedloss.core.row_loss import MarginPenalty, RowSettings
from fusedloss.functional.arguments import checked
from fusedloss.functional.engine import RowStatistics, loss_of
from fusedloss.terms import Term


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float | Tensor = 0.0,
    *,
    terms: Sequence[Term] = (),
    focal_gamma: float = 0.0,
    poly_epsilon: float = 0.0,
    z_loss: float = 0.0,
    margin_penalty: MarginPenalty | None = None,
    sample_weight: Tensor | None = None,
    return_stats: Literal[False] = False,
) -> Tensor: ...


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float | Tensor = 0.0,
    *,
    terms: Sequence[Term] = (),
    focal_gamma: float = 0.0,
    poly_epsilon: float = 0.0,
    z_loss: float = 0.0,
    margin_penalty: MarginPenalty | None = None,
    sample_weight: Tensor | None = None,
    return_stats: Literal[True],
) -> tuple[Tensor, RowStatistics]: ...


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float | Tensor = 0.0,
    *,
    terms: Sequence[Term] = (),
    focal_gamma: float = 0.0,
    poly_epsilon: float = 0.0,
    z_loss: float = 0.0,
    margin_penalty: MarginPenalty | None = None,
    sample_weight: Tensor | None = None,
    return_stats: bool,
) -> Tensor | tuple[Tensor, RowStatistics]: ...


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float | Tensor = 0.0,
    *,
    terms: Sequence[Term] = (),
    focal_gamma: float = 0.0,
    poly_epsilon: float = 0.0,
    z_loss: float = 0.0,
    margin_penalty: MarginPenalty | None = None,
    sample_weight: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, RowStatistics]:
    """Softmax cross-entropy of terms applied to the logits: ``l_i = lse_i - z_iy`` with ``z = terms(x)``.

    With the first six arguments alone it is ``torch.nn.functional.cross_entropy`` in value, gradient and edge cases.

    Args:
        input: logits ``(K,)``, ``(B, K)`` or ``(B, K, d1, ...)``; float32, float64, bfloat16 or float16.
        target: labels ``()``, ``(B,)`` or ``(B, d1, ...)`` (int64, int32, uint8), or probabilities of input's shape.
        weight: ``(K,)`` class weights.
        ignore_index: rows with this label have loss and gradient 0 and leave the mean's denominator.
        reduction: ``"mean"`` (over the kept rows' target weights, as torch), ``"sum"`` or ``"none"``.
        label_smoothing: in [0, 1]; a tensor holds one value per row: the target's shape, or ``(B,)``.
        terms: what changes the logit, applied in order (``fusedloss.terms``); margins need labels.
        focal_gamma: multiplies a row's loss by ``(1 - p_y) ** focal_gamma``; 0, or at least 0.5. With probability
            targets each class's share has its own factor, ``sum_j w_j q_j (1 - p_j) ** focal_gamma (-log p_j)``, in
            plain PyTorch.
        poly_epsilon: adds ``poly_epsilon * (1 - p_y)`` to each row (PolyLoss, Leng et al. 2022), without class weight
            and focal factor; ``sum_j q_j (1 - p_j)`` with probability targets, in plain PyTorch.
        z_loss: adds ``z_loss * lse ** 2`` to each row, without class weight.
        margin_penalty: holds logits within a margin of the largest (``fusedloss.MarginPenalty``).
        sample_weight: multiplies each row's loss and its share of the mean's denominator; the target's shape or
            ``(B,)``.
        return_stats: also return ``RowStatistics``.

    Returns:
        The loss in float32 (float64 for float64 input); with `return_stats`, ``(loss, RowStatistics)``.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that don't fit; the message names the argument.
        IndexError: a label outside ``[0, K)`` on the CPU (a device assertion on a GPU).

    >>> import torch, fusedloss
    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
    >>> fusedloss.cross_entropy(logits, torch.tensor([0, 1]), terms=[fusedloss.ClassTemperature(2.0)])
    tensor(0.3937, grad_fn=<...>)
    """
    settings = RowSettings(label_smoothing, focal_gamma, poly_epsilon, z_loss, margin_penalty)
    arguments = checked(input, target, weight, ignore_index, reduction, terms, settings, sample_weight)
    return loss_of(arguments, reduction, return_stats)
