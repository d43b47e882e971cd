"""What changes the logit: small frozen objects, applied in order, each with its eager formula.

An affine term ``z = a * x + b`` is one class with ``coefficients``; the loss folds a sequence of them into two ``(K,)``
vectors, so a new one touches no kernel. Tensors in a term get gradients when they require them.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Term:
    """A change of the logits. Subclasses are frozen dataclasses whose tensor fields a module may register."""

    def apply(self, logits: Tensor) -> Tensor:
        """The eager formula on logits ``(B, K)`` or ``(B, K, d)``."""
        raise TypeError(f"{type(self).__name__} does not define apply(logits)")

    def check(self, num_classes: int) -> None:
        """Raises ``ValueError`` where the term does not fit `num_classes` classes."""


@dataclass(frozen=True, eq=False)
class AffineTerm(Term):
    """A term ``z = a * x + b`` with coefficients per class."""

    def coefficients(self) -> tuple[Tensor | float | None, Tensor | float | None]:
        """``(a, b)``: each a float, a ``(K,)`` tensor, or None for 1 and 0."""
        raise TypeError(f"{type(self).__name__} does not define coefficients()")

    def apply(self, logits: Tensor) -> Tensor:
        scale, bias = self.coefficients()
        if scale is not None:
            logits = logits * per_class(scale, logits)
        return logits if bias is None else logits + per_class(bias, logits)


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
        _check_number("ClassTemperature: tau", self.tau, minimum_exclusive=0.0)
        self.check_values()

    def coefficients(self) -> tuple[Tensor | float | None, Tensor | float | None]:
        return (self.tau.reciprocal() if isinstance(self.tau, Tensor) else 1.0 / self.tau), None

    def apply(self, logits: Tensor) -> Tensor:
        return logits / per_class(self.tau, logits)

    def check(self, num_classes: int) -> None:
        _check_width("ClassTemperature: tau", self.tau, num_classes)

    def check_values(self) -> None:
        """Raises ``ValueError`` unless every temperature on the CPU is positive and finite."""
        if not _readable(self.tau):
            return
        bad = ~((self.tau > 0) & torch.isfinite(self.tau))
        if bool(bad.any()):
            index = int(bad.flatten().nonzero()[0])
            raise ValueError(
                f"ClassTemperature: tau must be positive and finite; got {float(self.tau.detach().flatten()[index])} "
                f"for class {index}"
            )


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
        _check_number("Scale: scale", self.scale)
        if _readable(self.scale) and not bool(torch.isfinite(self.scale).all()):
            raise ValueError("Scale: scale must be finite; got NaN or an infinity")

    def coefficients(self) -> tuple[Tensor | float | None, Tensor | float | None]:
        return self.scale, None

    def check(self, num_classes: int) -> None:
        _check_width("Scale: scale", self.scale, num_classes)


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
        _check_number("Prior: log_prior", self.log_prior)
        if isinstance(self.strength, Tensor):
            raise TypeError("Prior: strength must be a float; got a tensor")
        _check_number("Prior: strength", self.strength)
        if _readable(self.log_prior) and bool((~(self.log_prior < math.inf)).any()):
            raise ValueError("Prior: log_prior must be below +inf; got NaN or +inf (use log class frequencies)")

    def coefficients(self) -> tuple[Tensor | float | None, Tensor | float | None]:
        if self.strength == 0:
            return None, None
        return None, (self.log_prior if self.strength == 1.0 else self.strength * self.log_prior)

    def check(self, num_classes: int) -> None:
        _check_width("Prior: log_prior", self.log_prior, num_classes)
        if self.log_prior.dim() != 1:
            raise ValueError(f"Prior: log_prior must have shape ({num_classes},); got {tuple(self.log_prior.shape)}")


def fold_affine(
    terms: tuple[AffineTerm, ...], num_classes: int, dtype: torch.dtype, device: torch.device
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


def widened(term: AffineTerm, dtype: torch.dtype) -> AffineTerm:
    """The term with its tensors in `dtype`, so that nothing is rounded to theirs on the way to the coefficients."""
    tensors = {name: value for name, value in vars(term).items() if isinstance(value, Tensor) and value.dtype != dtype}
    if not tensors:
        return term
    term = copy.copy(term)
    for name, value in tensors.items():
        object.__setattr__(term, name, value.to(dtype))
    return term


def per_class(value: Tensor | float, logits: Tensor) -> Tensor | float:
    """A float, or a tensor shaped to broadcast over ``(B, K)`` or ``(B, K, d)`` logits."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value.reshape(-1, *[1] * (logits.dim() - 2))


def _readable(value: object) -> TypeGuard[Tensor]:
    """Whether values may be looked at: on the CPU, and not while a graph is traced."""
    return isinstance(value, Tensor) and value.device.type == "cpu" and not torch.compiler.is_compiling()


def _as_vector(
    value: Tensor | float | None, num_classes: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return torch.full((num_classes,), value, dtype=dtype, device=device)
    return value.to(dtype=dtype).expand(num_classes).contiguous()


def _check_number(name: str, value: Tensor | float, minimum_exclusive: float = -math.inf) -> None:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a float or a floating-point tensor; got dtype {value.dtype}")
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a float or a tensor; got {type(value).__name__}")
    if not math.isfinite(value) or value <= minimum_exclusive:
        allowed = "finite" if minimum_exclusive == -math.inf else f"finite and above {minimum_exclusive:g}"
        raise ValueError(f"{name} must be {allowed}; got {value}")


def _check_width(name: str, value: Tensor | float, num_classes: int) -> None:
    if isinstance(value, Tensor) and value.dim() > 0 and tuple(value.shape) != (num_classes,):
        raise ValueError(f"{name} must have shape ({num_classes},), one value per class; got {tuple(value.shape)}")
