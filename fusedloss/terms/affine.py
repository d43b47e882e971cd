"""Affine terms ``z = a * x + b``: a new one is one class with ``coefficients`` and touches no kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedloss.core.checks import check_tensor
from fusedloss.terms.term import Term, check_value, check_width, per_class, per_row, readable, widened


@dataclass(frozen=True, eq=False)
class AffineTerm(Term):
    """A term ``z = a * x + b`` with coefficients per class."""

    def coefficients(self) -> tuple[Tensor | float | None, Tensor | float | None]:
        """``(a, b)``: each a float, a ``(K,)`` tensor, or None for 1 and 0."""
        raise TypeError(f"{type(self).__name__} does not define coefficients()")

    def apply(self, logits: Tensor, target: Tensor | None = None) -> Tensor:
        scale, bias = self.coefficients()
        if scale is not None:
            logits = logits * per_class(scale, logits)
        return logits if bias is None else logits + per_class(bias, logits)

    def label(self, z: Tensor, classes: Tensor) -> tuple[Tensor, Tensor | float]:
        scale, bias = self.coefficients()
        factor = 1.0 if scale is None else per_row(scale, classes)
        z = z * factor
        return (z if bias is None else z + per_row(bias, classes)), factor


@dataclass(frozen=True, eq=False)
class ClassTemperature(AffineTerm):
    """Divides the logit of each class by its temperature: ``z_j = x_j / tau_j``.

    Args:
        tau: positive; a float or a ``(K,)`` tensor.

    Raises:
        ValueError: a temperature that is not positive and finite.

    Source: formulas A0 of this project; scalar temperature: Guo et al. 2017, arXiv:1706.04599.

    >>> import torch
    >>> from fusedloss.terms import ClassTemperature
    >>> ClassTemperature(torch.tensor([1.0, 2.0])).apply(torch.tensor([[3.0, 3.0]]))
    tensor([[3.0000, 1.5000]])
    """

    tau: Tensor | float

    def __post_init__(self) -> None:
        self.check_values()

    def coefficients(self) -> tuple[Tensor | float | None, Tensor | float | None]:
        return (self.tau.reciprocal() if isinstance(self.tau, Tensor) else 1.0 / self.tau), None

    def apply(self, logits: Tensor, target: Tensor | None = None) -> Tensor:
        return logits / per_class(self.tau, logits)

    def check(self, num_classes: int) -> None:
        check_width("ClassTemperature: tau", self.tau, num_classes)

    def check_values(self) -> None:
        """Raises ``ValueError`` unless every temperature on the CPU is positive and finite."""
        check_value(self, "tau", above=0.0)


@dataclass(frozen=True, eq=False)
class Scale(AffineTerm):
    """Multiplies every logit: ``z_j = scale * x_j`` (the s of cosine heads).

    Args:
        scale: finite; a float, a 0-dim tensor or a ``(K,)`` tensor.

    >>> import torch
    >>> from fusedloss.terms import Scale
    >>> Scale(30.0).apply(torch.tensor([[0.5, -0.1]]))
    tensor([[15., -3.]])
    """

    scale: Tensor | float

    def __post_init__(self) -> None:
        check_value(self, "scale")

    def coefficients(self) -> tuple[Tensor | float | None, Tensor | float | None]:
        return self.scale, None

    def check(self, num_classes: int) -> None:
        check_width("Scale: scale", self.scale, num_classes)


@dataclass(frozen=True, eq=False)
class Prior(AffineTerm):
    """Logit adjustment while training: ``z_j = x_j + strength * log_prior_j`` (a plus sign).

    A model trained with it predicts with its raw logits. A class of prior zero (-inf) gets probability 0.

    Args:
        log_prior: ``(K,)`` tensor of log class frequencies.
        strength: finite float (Menon's tau); 1 is Balanced Softmax.

    Source: Menon et al. 2021, arXiv:2007.07314; Ren et al. 2020, arXiv:2007.10740.

    >>> import torch
    >>> from fusedloss.terms import Prior
    >>> Prior(torch.tensor([0.9, 0.1]).log()).apply(torch.zeros(1, 2)).softmax(1)
    tensor([[0.9000, 0.1000]])
    """

    log_prior: Tensor
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.log_prior, Tensor):
            raise TypeError(f"Prior: log_prior must be a (K,) tensor; got {type(self.log_prior).__name__}")
        check_tensor("Prior: log_prior", self.log_prior)
        if isinstance(self.strength, Tensor):
            raise TypeError("Prior: strength must be a float; got a tensor")
        check_value(self, "strength")
        if readable(self.log_prior) and bool((~(self.log_prior < math.inf)).any()):
            raise ValueError("Prior: log_prior must be below +inf; got NaN or +inf (use log class frequencies)")

    def coefficients(self) -> tuple[Tensor | float | None, Tensor | float | None]:
        if self.strength == 0:
            return None, None
        return None, (self.log_prior if self.strength == 1.0 else self.strength * self.log_prior)

    def check(self, num_classes: int) -> None:
        check_width("Prior: log_prior", self.log_prior, num_classes)
        if self.log_prior.dim() != 1:
            raise ValueError(f"Prior: log_prior must have shape ({num_classes},); got {tuple(self.log_prior.shape)}")


def fold_affine(
    terms: Sequence[AffineTerm], num_classes: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """One pair ``(scale, bias)`` of contiguous ``(K,)`` tensors in `dtype`, or None, equal to `terms` in order."""
    scale: Tensor | float | None = None
    bias: Tensor | float | None = None
    for term in terms:
        a, b = widened(term, dtype).coefficients()
        if a is not None:
            scale = a if scale is None else scale * a
            bias = None if bias is None else bias * a
        if b is not None:
            bias = b if bias is None else bias + b
    return _as_vector(scale, num_classes, dtype, device), _as_vector(bias, num_classes, dtype, device)


def _as_vector(
    value: Tensor | float | None, num_classes: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return torch.full((num_classes,), value, dtype=dtype, device=device)
    if value.dtype == dtype and value.dim() == 1 and value.shape[0] == num_classes and value.is_contiguous():
        return value
    return value.to(dtype=dtype).expand(num_classes).contiguous()
