"""Linear classifiers in closed form: class means, and Gaussians that share a covariance (GDA, also known as LDA)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fusedloss.core.checks import check_choice, check_integer, check_number
from fusedloss.core.normalize import unit_rows
from fusedloss.train.solvers.rows import RowSource, check_labels

# How far the bias of a class without rows lies below the others'.
_ABSENT = 1e4
# Eigenvalues of a covariance below this share of the largest are taken for 0.
_SINGULAR = 1e-10


class LinearFit(NamedTuple):
    """Logits ``x @ weight.T + bias``: float32 ``(K, D)`` and ``(K,)``; `unit_rows` says that x must have length 1."""

    weight: Tensor
    bias: Tensor
    unit_rows: bool = False

    def logits(self, features: Tensor) -> Tensor:
        """``(B, K)`` of features ``(B, D)``, which are brought to length 1 here where that is needed."""
        features = features.to(self.weight.dtype)
        if self.unit_rows:
            features = unit_rows(features)
        return torch.addmm(self.bias, features, self.weight.t())


def fit_class_means(
    rows: RowSource, num_classes: int, metric: Literal["euclidean", "cosine"] = "euclidean", scale: float = 1.0
) -> LinearFit:
    """The nearest class mean: ``-scale * |x - m_k|^2 / 2`` but for what all classes share, or ``scale * cos(x, m_k)``.

    For cosines, means are those of rows of length 1. A class without rows has weight 0 and a bias far below others.

    Args:
        rows: features and labels in ``[0, K)``.
        num_classes: K.
        metric: ``"euclidean"`` or ``"cosine"``.
        scale: positive; changes probabilities, not predictions.

    Raises:
        ValueError, TypeError: arguments out of range, labels that are no class, no row.

    Source: Mensink et al. 2013 (nearest class mean); ``sklearn.neighbors.NearestCentroid``.

    >>> import torch
    >>> from fusedloss.train.solvers.rows import TensorRows
    >>> rows = TensorRows(torch.tensor([[0.0], [2.0], [6.0]]), torch.tensor([0, 0, 1]))
    >>> fit_class_means(rows, 2).logits(torch.tensor([[3.0], [4.0]])).argmax(1)
    tensor([0, 1])
    """
    check_choice("metric", metric, ("euclidean", "cosine"))
    check_number("scale", scale, above=0.0)
    means, counts = _class_means(rows, num_classes, metric == "cosine")
    if metric == "cosine":
        return _linear(scale * unit_rows(means), torch.zeros_like(counts), counts, unit=True)
    return _linear(scale * means, -0.5 * scale * means.square().sum(1), counts)


def fit_gda(
    rows: RowSource,
    num_classes: int,
    shrinkage: float | Literal["auto"] = "auto",
    prior: Tensor | None = None,
) -> LinearFit:
    """Gaussian discriminant analysis with one covariance: ``w_k = S^-1 m_k``, ``b_k = log prior_k - m_k . w_k / 2``.

    S is the covariance about the class means, ``(1 - shrinkage) S + shrinkage * tr(S) / D * I``. Two passes.

    Args:
        rows: features and labels in ``[0, K)``.
        num_classes: K.
        shrinkage: in [0, 1], or ``"auto"``: Ledoit and Wolf's of the rows about their class means. Without shrinkage
            a singular covariance has its pseudo-inverse.
        prior: ``(K,)`` positive, None for the classes' shares; equal ones predict for balanced classes.

    Raises:
        ValueError, TypeError: arguments out of range, labels that are no class, no row.

    Source: ``sklearn.discriminant_analysis.LinearDiscriminantAnalysis(solver="lsqr")``, whose ``shrinkage="auto"`` is
    found class by class instead; Ledoit & Wolf 2004.

    >>> import torch
    >>> from fusedloss.train.solvers.rows import TensorRows
    >>> rows = TensorRows(torch.tensor([[0.0], [2.0], [5.0], [7.0]]), torch.tensor([0, 0, 1, 1]))
    >>> fit_gda(rows, 2, shrinkage=0.0)
    LinearFit(weight=tensor([[1.],
            [6.]]), bias=tensor([ -1.1931, -18.6931]), unit_rows=False)
    """
    if shrinkage != "auto":
        check_number("shrinkage", shrinkage, at_least=0.0, at_most=1.0)
    means, counts = _class_means(rows, num_classes, False)
    log_prior = _log_prior(prior, counts)
    covariance, fourth = _scatter(rows, means)
    width, total = rows.width, float(counts.sum())
    if shrinkage == "auto":
        shrinkage = _ledoit_wolf(covariance, fourth, total)
    variance = float(covariance.diagonal().mean())
    covariance.mul_(1 - float(shrinkage)).diagonal().add_(float(shrinkage) * variance)
    weight = _solved(covariance, means) if variance > 0 else means.new_zeros(num_classes, width)
    return _linear(weight, log_prior - 0.5 * (means * weight).sum(1), counts)


def _class_means(rows: RowSource, num_classes: int, unit: bool) -> tuple[Tensor, Tensor]:
    """Float64 means ``(K, D)``, 0 for a class without rows, and how many rows each class has ``(K,)``."""
    check_integer("num_classes", num_classes, at_least=1)
    sums = counts = None
    for features, labels in rows:
        if sums is None or counts is None:
            sums = torch.zeros(num_classes, rows.width, dtype=torch.float64, device=features.device)
            counts = torch.zeros(num_classes, dtype=torch.float64, device=features.device)
        check_labels(labels, num_classes)
        wide = features.double()
        sums.index_add_(0, labels, unit_rows(wide) if unit else wide)
        counts += torch.bincount(labels, minlength=num_classes)
    if sums is None or counts is None or not float(counts.sum()):
        raise ValueError("rows must number at least 1; got 0")
    if not bool(torch.isfinite(sums).all()):
        raise ValueError("features must be finite; got NaN or infinity")
    return sums / counts.clamp(min=1)[:, None], counts


def _linear(weight: Tensor, bias: Tensor, counts: Tensor, unit: bool = False) -> LinearFit:
    absent = counts == 0
    lowest = float(bias[~absent].min())
    weight = weight.masked_fill(absent[:, None], 0)
    return LinearFit(weight.float(), bias.masked_fill(absent, lowest - _ABSENT).float(), unit)


def _log_prior(prior: Tensor | None, counts: Tensor) -> Tensor:
    if prior is None:
        return (counts / counts.sum()).log()
    if not isinstance(prior, Tensor) or prior.shape != counts.shape:
        raise ValueError(
            f"prior must be a tensor ({len(counts)},); got {getattr(prior, 'shape', type(prior).__name__)}"
        )
    if not bool(((prior > 0) & torch.isfinite(prior)).all()):
        raise ValueError(f"prior must be positive and finite; got {float(prior.min())} at least")
    wide = prior.to(counts)
    return (wide / wide.sum()).log()


def _scatter(rows: RowSource, means: Tensor) -> tuple[Tensor, float]:
    """Covariance about the class means, and the mean of the fourth powers of the distances to them."""
    covariance = torch.zeros(rows.width, rows.width, dtype=torch.float64, device=means.device)
    fourth, count = 0.0, 0
    for features, labels in rows:
        apart = features.double() - means[labels]
        covariance.addmm_(apart.t(), apart)
        fourth += float(apart.square().sum(1).square().sum())
        count += len(labels)
    return covariance / count, fourth / count


def _ledoit_wolf(covariance: Tensor, fourth: float, count: float) -> float:
    """The share of ``tr(S) / D * I`` that brings S nearest to the covariance it estimates."""
    square, width = float(covariance.square().sum()), len(covariance)
    apart = square - float(covariance.trace()) ** 2 / width
    noise = (fourth - square) / count
    return min(1.0, max(0.0, noise / apart)) if apart > 0 else 0.0


def _solved(covariance: Tensor, means: Tensor) -> Tensor:
    """Rows ``S^-1 m_k``, by the pseudo-inverse where S is singular."""
    factor, info = torch.linalg.cholesky_ex(covariance)
    smallest, largest = factor.diagonal().square().aminmax()
    if int(info) == 0 and float(smallest) > _SINGULAR * float(largest):
        solved: Tensor = torch.cholesky_solve(means.t(), factor).t()
        return solved
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > _SINGULAR * values[-1]
    inverse = torch.where(kept, values, 1).reciprocal() * kept
    result: Tensor = (means @ vectors * inverse) @ vectors.t()
    return result
