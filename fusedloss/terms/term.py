"""What a term is, and how its tensors spread over logits and rows."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor

from fusedloss.core.checks import check_number


@dataclass(frozen=True, eq=False)
class Term:
    """A change of the logits. Subclasses are frozen dataclasses whose tensor fields a module may register."""

    def apply(self, logits: Tensor, target: Tensor | None = None) -> Tensor:
        """The eager formula on logits ``(B, K)`` or ``(B, K, d)``; `target` matters to margins alone."""
        raise TypeError(f"{type(self).__name__} does not define apply(logits)")

    def label(self, z: Tensor, classes: Tensor) -> tuple[Tensor, Tensor | float]:
        """``(value, derivative)``: the labelled class's logit `z` after this term, and its derivative in `z`.

        `z` and `classes` have the rows' shape, ``(B,)`` or ``(B, d)``; gradients of the term's tensors flow through
        the value.
        """
        raise TypeError(f"{type(self).__name__} does not define label(z, classes)")

    def check(self, num_classes: int) -> None:
        """Raises ``ValueError`` where the term does not fit `num_classes` classes."""


AnyTerm = TypeVar("AnyTerm", bound=Term)


@dataclass(frozen=True, eq=False)
class MarginTerm(Term):
    """A term that changes the labelled class's logit alone: a new one defines ``label`` and nothing else."""

    @property
    def straight_through(self) -> bool:
        """Whether the gradient passes as if the term were not there."""
        return False

    def apply(self, logits: Tensor, target: Tensor | None = None) -> Tensor:
        """The eager formula; rows whose target names no class (an ignored one) stay as they are."""
        if target is None:
            return logits
        named = (target >= 0) & (target < logits.shape[1])
        column = torch.where(named, target, 0).unsqueeze(1)
        z = logits.gather(1, column).squeeze(1)
        if self.straight_through:
            value = self.label(z.detach(), column.squeeze(1))[0] + (z - z.detach())
        else:
            value = self.label(z, column.squeeze(1))[0]
        return logits.scatter(1, column, torch.where(named, value, z).unsqueeze(1))


def label_chain(z: Tensor, classes: Tensor, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """The labelled class's logit `z` after all `terms`, and its derivative in `z`, detached; see ``Term.label``."""
    derivative: Tensor | float = 1.0
    value = z
    for term in terms:
        before, straight = value, isinstance(term, MarginTerm) and term.straight_through
        value, factor = widened(term, z.dtype).label(before.detach() if straight else before, classes)
        if straight:
            value = value + (before - before.detach())
        derivative = derivative * (factor.detach() if isinstance(factor, Tensor) else factor)
    if isinstance(derivative, Tensor):
        return value, derivative.to(z.dtype).expand(z.shape)
    return value, torch.full_like(z, derivative)


def tensors_of(term: Term) -> dict[str, Tensor]:
    """The fields that hold tensors, by name."""
    # Not vars(): torch.compile of torch 2.8 cannot trace it.
    fields = {name: getattr(term, name) for name in type(term).__dataclass_fields__}
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


def widened(term: AnyTerm, dtype: torch.dtype) -> AnyTerm:
    """The term with its tensors in `dtype`, so that nothing is rounded to theirs on the way to the coefficients."""
    tensors = {name: value for name, value in tensors_of(term).items() if value.dtype != dtype}
    if not tensors:
        return term
    # Not copy.copy(), which torch.compile of torch 2.8 can't trace.
    wide: AnyTerm = object.__new__(type(term))
    for name in type(term).__dataclass_fields__:
        object.__setattr__(wide, name, tensors[name].to(dtype) if name in tensors else getattr(term, name))
    return wide


def per_class(value: Tensor | float, logits: Tensor) -> Tensor | float:
    """A float, or a tensor shaped to broadcast over ``(B, K)`` or ``(B, K, d)`` logits."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value.reshape(-1, *[1] * (logits.dim() - 2))


def readable(value: object) -> TypeGuard[Tensor]:
    """Whether values may be looked at: on the CPU, and not while a graph is traced or under torch.func."""
    return (
        isinstance(value, Tensor)
        and not torch.compiler.is_compiling()
        and type(value) in _PLAIN
        and value.device.type == "cpu"
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
        and torch._C._len_torch_dispatch_stack() == 0
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def per_row(value: Tensor | float, classes: Tensor) -> Tensor | float:
    """A float, a ``(K,)`` tensor's value for each row's class, or a ``(B, 1)`` tensor's for each row."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if value.dim() == 1:
        return value[classes]
    return value.reshape(-1, *[1] * (classes.dim() - 1))


def check_value(term: Term, field: str, *, above: float = -math.inf) -> None:
    """A field that holds a finite number above `above`, or a floating-point tensor of such; see ``readable``."""
    name, value = f"{type(term).__name__}: {field}", getattr(term, field)
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a float or a tensor; got {type(value).__name__}")
        number = check_number(name, value, above=above)
        if not isinstance(value, (float, int)):  # one of numpy's
            object.__setattr__(term, field, number)
        return
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a float or a floating-point tensor; got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {value.layout}")
    if not readable(value) or value.numel() == 0:
        return
    # One pass: a NaN comes out of both.
    low, high = (bound.item() for bound in torch.aminmax(value.detach() if value.requires_grad else value))
    if not (above < low and -math.inf < low and high < math.inf):
        values = value.detach().flatten()
        index = int((~((values > above) & torch.isfinite(values))).nonzero()[0])
        allowed = (
            "positive and finite" if above == 0 else "finite" if above == -math.inf else f"finite, above {above:g}"
        )
        place = f" for class {index}" if value.dim() == 1 else f" at {index}" if value.dim() else ""
        raise ValueError(f"{name} must be {allowed}; got {float(values[index])}{place}")


def check_width(name: str, value: Tensor | float, num_classes: int) -> None:
    """Raises ``ValueError`` unless `value` is a number, a 0-dim or a ``(K,)`` tensor."""
    if isinstance(value, Tensor) and value.dim() > 0 and tuple(value.shape) != (num_classes,):
        raise ValueError(f"{name} must have shape ({num_classes},), one value per class; got {tuple(value.shape)}")
