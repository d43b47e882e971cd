"""Margins: scalar functions of the labelled class's logit, computed outside the sweep over the classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fusedloss.core.checks import check_choice
from fusedloss.terms.term import MarginTerm, check_value, check_width, per_row, readable

Fallback = Literal["monotone", "easy", "none"]
GradientKind = Literal["exact", "straight_through"]


@dataclass(frozen=True, eq=False)
class AdditiveMargin(MarginTerm):
    """Subtracts a margin from the labelled class's logit: ``z_y = x_y - margin`` (CosFace; per class: LDAM).

    Args:
        margin: a float, a ``(K,)`` tensor (per class) or a ``(B, 1)`` tensor (per row).

    Source: Wang et al. 2018, arXiv:1801.09414 (CosFace); Cao et al. 2019, arXiv:1906.07413 (LDAM).

    >>> import torch
    >>> from fusedloss.terms import AdditiveMargin
    >>> AdditiveMargin(0.25).apply(torch.tensor([[0.5, 0.5]]), torch.tensor([1]))
    tensor([[0.5000, 0.2500]])
    """

    margin: Tensor | float

    def __post_init__(self) -> None:
        check_value(self, "margin")

    def label(self, z: Tensor, classes: Tensor) -> tuple[Tensor, Tensor | float]:
        return z - per_row(self.margin, classes), 1.0

    def check(self, num_classes: int) -> None:
        _check_margin_shape("AdditiveMargin: margin", self.margin, num_classes)


@dataclass(frozen=True, eq=False)
class AngularMargin(MarginTerm):
    """Adds a margin to the angle of the labelled class's cosine: ``z_y = cos(acos(x_y) + margin)`` (ArcFace).

    Logits must be cosines; a ``Scale`` follows. With theta the angle and m the margin, beyond theta + m = pi:

    * ``fallback="monotone"`` gives ``x_y - m sin m`` (below zero margin: ``x_y + 1 - cos m``), which falls with theta;
    * ``"easy"`` applies the margin where ``x_y > 0`` and leaves the cosine elsewhere;
    * ``"none"`` uses the formula everywhere.

    ``gradient="exact"`` is the derivative sin(theta + m) / sin(theta), cos(margin) where
    theta is too small for the dtype to tell;
    ``"straight_through"`` passes the gradient on unchanged, as insightface does.

    Args:
        margin: radians in [-pi, pi]; a float, a ``(K,)`` tensor (per class) or a ``(B, 1)`` tensor (per row).
        fallback: ``"monotone"``, ``"easy"`` or ``"none"``.
        gradient: ``"exact"`` or ``"straight_through"``.

    Raises:
        ValueError: a margin beyond pi, or, on the CPU, a labelled logit beyond [-1, 1] by more than rounding.

    Source: Deng et al. 2019, arXiv:1801.07698.

    >>> import torch
    >>> from fusedloss.terms import AngularMargin
    >>> AngularMargin(0.5).apply(torch.tensor([[0.8, 0.8]]), torch.tensor([1]))
    tensor([[0.8000, 0.4144]])
    """

    margin: Tensor | float
    fallback: Fallback = "monotone"
    gradient: GradientKind = "exact"

    def __post_init__(self) -> None:
        _check_angle(self, "margin")
        _check_choices(self)

    def label(self, z: Tensor, classes: Tensor) -> tuple[Tensor, Tensor | float]:
        margin = per_row(self.margin, classes)
        value, derivative = angle_added(checked_cosine(type(self).__name__, z), margin, self.fallback)
        return value, (1.0 if self.straight_through else derivative)

    @property
    def straight_through(self) -> bool:
        return self.gradient == "straight_through"

    def check(self, num_classes: int) -> None:
        _check_margin_shape(f"{type(self).__name__}: margin", self.margin, num_classes)


@dataclass(frozen=True, eq=False)
class CombinedMargin(MarginTerm):
    """``z_y = cos(m1 * acos(x_y) + m2) - m3``: ArcFace is (1, m, 0), CosFace (1, 0, m), SphereFace (m, 0, 0).

    Logits must be cosines; a ``Scale`` follows. Where m1 is not 1, ``fallback="monotone"`` continues beyond
    m1 theta + m2 = pi with ``-2 - cos(m1 theta + m2) - m3``; elsewhere fallback and gradient are AngularMargin's.

    Args:
        m1: above 0. m2: radians in [-pi, pi]. m3: finite. Each a float, a ``(K,)`` or a ``(B, 1)`` tensor.
        fallback, gradient: as in ``AngularMargin``.

    Source: Deng et al. 2019, arXiv:1801.07698, equation 4.

    >>> import torch
    >>> from fusedloss.terms import CombinedMargin
    >>> CombinedMargin(1.0, 0.3, 0.2).apply(torch.tensor([[0.8, 0.8]]), torch.tensor([1]))
    tensor([[0.8000, 0.3870]])
    """

    m1: Tensor | float
    m2: Tensor | float
    m3: Tensor | float
    fallback: Fallback = "monotone"
    gradient: GradientKind = "exact"

    def __post_init__(self) -> None:
        check_value(self, "m1", above=0.0)
        _check_angle(self, "m2")
        check_value(self, "m3")
        _check_choices(self)

    def label(self, z: Tensor, classes: Tensor) -> tuple[Tensor, Tensor | float]:
        cosine = checked_cosine("CombinedMargin", z)
        m1, m2, m3 = (per_row(value, classes) for value in (self.m1, self.m2, self.m3))
        if isinstance(m1, (float, int)) and m1 == 1:
            value, derivative = angle_added(cosine, m2, self.fallback)
        else:
            value, derivative = _angle_multiplied(cosine, m1, m2, self.fallback)
        return value - m3, (1.0 if self.straight_through else derivative)

    @property
    def straight_through(self) -> bool:
        return self.gradient == "straight_through"

    def check(self, num_classes: int) -> None:
        for name in ("m1", "m2", "m3"):
            _check_margin_shape(f"CombinedMargin: {name}", getattr(self, name), num_classes)


def angle_added(cosine: Tensor, margin: Tensor | float, fallback: Fallback) -> tuple[Tensor, Tensor]:
    """cos(theta + margin) with its fallback, and its derivative in the cosine."""
    cos_m, sin_m = _cos(margin), _sin(margin)
    sine, tiny = _sine(cosine)
    value = cosine * cos_m - sine * sin_m
    derivative = cos_m + torch.where(tiny, 0.0, sin_m * cosine / sine)
    if fallback == "none":
        return value, derivative
    one = torch.ones_like(derivative)
    if fallback == "easy":
        inside = cosine > 0
        return torch.where(inside, value, cosine), torch.where(inside, derivative, one)
    negative = margin < 0
    if isinstance(negative, bool):
        inside = cosine < cos_m if negative else cosine > -cos_m
        beyond = cosine + (1 - cos_m) if negative else cosine - margin * sin_m
    else:
        inside = torch.where(negative, cosine < cos_m, cosine > -cos_m)
        beyond = cosine + torch.where(negative, 1 - cos_m, -margin * sin_m)
    return torch.where(inside, value, beyond), torch.where(inside, derivative, one)


def _angle_multiplied(
    cosine: Tensor, m1: Tensor | float, m2: Tensor | float, fallback: Fallback
) -> tuple[Tensor, Tensor]:
    sine, tiny = _sine(cosine)
    angle = m1 * torch.atan2(sine, cosine) + m2
    value, derivative = angle.cos(), m1 * angle.sin() * torch.where(tiny, sine, 1 / sine)
    if fallback == "none":
        return value, derivative
    inside = cosine > 0 if fallback == "easy" else angle <= math.pi
    beyond = cosine if fallback == "easy" else -2 - value
    beyond_derivative = torch.ones_like(derivative) if fallback == "easy" else -derivative
    return torch.where(inside, value, beyond), torch.where(inside, derivative, beyond_derivative)


def checked_cosine(name: str, z: Tensor) -> Tensor:
    """`z` clamped to [-1, 1]; on the CPU, ``ValueError`` where it lies beyond by more than rounding."""
    if z.numel() > 0 and readable(z):
        low, high = torch.aminmax(z.detach())
        worst = high.item() if high.item() > -low.item() else low.item()
        if abs(worst) > 1.0 + _ROUNDING:
            raise ValueError(f"{name}: input must hold cosines, between -1 and 1; got {worst:g} at a label")
    return z.clamp(-1.0, 1.0)


# Cosines computed in bfloat16 are off by up to this.
_ROUNDING = 0.01


def _sine(cosine: Tensor) -> tuple[Tensor, Tensor]:
    """The sine, and where it is too small for a derivative: there the derivative of the sine counts as 0."""
    square = (1 - cosine) * (1 + cosine)
    tiny = square <= torch.finfo(cosine.dtype).eps
    sine = torch.where(tiny, square.detach().clamp_min(0).sqrt(), torch.where(tiny, 1.0, square).sqrt())
    return sine, tiny


def _cos(angle: Tensor | float) -> Tensor | float:
    return angle.cos() if isinstance(angle, Tensor) else math.cos(angle)


def _sin(angle: Tensor | float) -> Tensor | float:
    return angle.sin() if isinstance(angle, Tensor) else math.sin(angle)


def _check_angle(term: MarginTerm, field: str) -> None:
    check_value(term, field)
    value = getattr(term, field)
    if isinstance(value, Tensor):
        if not readable(value) or value.numel() == 0:
            return
        largest = float(value.detach().abs().max())
    else:
        largest = abs(value)
    if largest > math.pi:
        name = f"{type(term).__name__}: {field}"
        raise ValueError(f"{name} must be an angle in radians, at most pi; got {largest:g} (degrees? use math.radians)")


def _check_choices(term: AngularMargin | CombinedMargin) -> None:
    name = type(term).__name__
    check_choice(f"{name}: fallback", term.fallback, ("monotone", "easy", "none"))
    check_choice(f"{name}: gradient", term.gradient, ("exact", "straight_through"))


def _check_margin_shape(name: str, value: Tensor | float, num_classes: int) -> None:
    if isinstance(value, Tensor) and value.dim() == 2:
        if value.shape[1] != 1:
            raise ValueError(f"{name} must have shape ({num_classes},) or (B, 1); got {tuple(value.shape)}")
        return
    check_width(name, value, num_classes)
