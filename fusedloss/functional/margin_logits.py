"""Scaled cosine logits with a margin at the label, for trainers that keep their own cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedloss.core.checks import (
    check_ignore_index,
    check_integer,
    check_integer_tensor,
    check_label_shape,
    check_labels,
)
from fusedloss.core.dtypes import compute_dtype
from fusedloss.core.normalize import unit_rows
from fusedloss.functional.arguments import check_terms
from fusedloss.functional.linear_head import LinearHead, checked_head
from fusedloss.terms import AngularMargin, MarginTerm, Scale, widened
from fusedloss.terms.term import readable

_DEFAULT_MARGIN = AngularMargin(0.5)


def margin_logits(
    input: Tensor,
    linear_weight: Tensor,
    labels: Tensor | None = None,
    *,
    margin: MarginTerm = _DEFAULT_MARGIN,
    scale: float | Tensor = 30.0,
    ignore_index: int = -100,
    sub_centers: int = 1,
) -> Tensor:
    """Scaled cosines ``scale * cos(x, w_k)``, with `margin` applied to the labelled class.

    Equal rows, opposite rows and rows of any length have finite gradients: the label's cosine is computed in float64.

    Args:
        input: features ``(B, D)``; float32, float64, bfloat16 or float16.
        linear_weight: ``(K, D)``, one row per class.
        labels: int64 ``(B,)``; None (inference) applies no margin, nor does `ignore_index`.
        margin: a ``MarginTerm``: ``AngularMargin`` (ArcFace), ``AdditiveMargin`` (CosFace), ``CombinedMargin``.
        scale: a float or a tensor, which gets a gradient when it requires one.
        sub_centers: rows of `linear_weight` per class, one after another; a class's cosine is that of its nearest
            (Deng et al. 2020, Sub-center ArcFace).

    Returns:
        ``(B, K)`` in float32 (float64 for float64 input).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that don't fit; the message names the argument.
        IndexError: a label outside ``[0, K)`` on the CPU.

    >>> import torch, fusedloss
    >>> features, classes = torch.tensor([[3.0, 0.0]]), torch.eye(2)
    >>> fusedloss.margin_logits(features, classes, torch.tensor([0]), scale=10.0)
    tensor([[8.7758, 0.0000]])
    """
    head = checked_head(input, linear_weight, None, True)
    if not isinstance(margin, MarginTerm):
        raise TypeError(f"margin must be a margin of fusedloss.terms; got {type(margin).__name__}")
    _check_sub_centers(sub_centers, head.weight.shape[0])
    check_ignore_index(ignore_index)
    dtype = compute_dtype(head.input.dtype)
    x, w = unit_rows(head.input.to(dtype)), unit_rows(head.weight.to(dtype))
    with torch.autocast(input.device.type, enabled=False):
        cosine = torch.mm(x.to(head.input.dtype), w.to(head.input.dtype).t()).to(dtype)
    nearest = None
    if sub_centers > 1:
        cosine, nearest = cosine.unflatten(1, (-1, sub_centers)).max(2)
    if labels is not None:
        labels = _checked_labels(labels, cosine, ignore_index)
        check_terms((margin, Scale(scale)), cosine, labels)
        named = labels != ignore_index
        classes = torch.where(named, labels, 0)
        value = _label_value(head, classes, nearest, margin).to(dtype)
        column = classes.unsqueeze(1)
        value = torch.where(named, value, cosine.gather(1, column).squeeze(1))
        cosine = cosine.scatter(1, column, value.unsqueeze(1))
    cosine = cosine * scale
    return cosine.squeeze(0) if head.one_row else cosine


def _check_sub_centers(sub_centers: int, rows: int) -> None:
    check_integer("sub_centers", sub_centers, at_least=1)
    if rows % sub_centers:
        raise ValueError(f"linear_weight must have a multiple of sub_centers={sub_centers} rows; got {rows}")


def _checked_labels(labels: Tensor, cosine: Tensor, ignore_index: int) -> Tensor:
    check_integer_tensor("labels", labels)
    labels = labels.reshape(1) if labels.dim() == 0 else labels
    check_label_shape("labels", labels, cosine.shape[:1], cosine.shape)
    if labels.device != cosine.device:
        raise ValueError(f"labels must be on the device of input, {cosine.device}; got {labels.device}")
    labels = labels.to(torch.int64)
    if readable(labels):
        check_labels(labels, cosine.shape[1], ignore_index, "labels")
    return labels


def _label_value(head: LinearHead, classes: Tensor, nearest: Tensor | None, margin: MarginTerm) -> Tensor:
    """The margin of each row's label, on the cosine in double: an angular margin is steep where rows are parallel."""
    rows = classes
    if nearest is not None:
        rows = classes * (len(head.weight) // nearest.shape[1]) + nearest.gather(1, classes.unsqueeze(1)).squeeze(1)
    cosine = (unit_rows(head.input.double()) * unit_rows(head.weight[rows].double())).sum(1)
    margin = widened(margin, cosine.dtype)
    at = cosine.detach()
    value, grad = margin.label(at, classes)
    if not isinstance(grad, Tensor):
        return value + grad * (cosine - at)
    # The mean of the derivative here and there is right to the second order; at nearly parallel rows, where the
    # second derivative of the formula is infinite, the first one alone.
    inside = at.abs() < 1 - 1e-12
    there = torch.where(inside, margin.label(torch.where(inside, cosine, torch.zeros_like(at)), classes)[1], grad)
    return value + 0.5 * (grad + there) * (cosine - at)
