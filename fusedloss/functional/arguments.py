"""The arguments of a loss on logits, checked once and brought into the form that the operations take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusedloss import ops
from fusedloss.backends import CHECK_VALUES
from fusedloss.backends.reference.class_stats import check_labels
from fusedloss.backends.reference.softmax_ce import terms_applied
from fusedloss.core.row_loss import MarginPenalty, Row
from fusedloss.terms import (
    AffineTerm,
    ClassTemperature,
    MarginTerm,
    SoftCap,
    Term,
    fold_affine,
    label_chain,
    tensors_of,
)

_LOGIT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LABEL_DTYPES = (torch.int64, torch.int32, torch.uint8)


@dataclass(frozen=True)
class Problem:
    """Checked arguments in the form that the operations take: ``(B, K)`` or ``(B, K, d)`` logits."""

    logits: Tensor
    target: Tensor
    terms: tuple[Term, ...]
    class_weight: Tensor | None
    ignore_index: int
    row: Row
    sample_weight: Tensor | None
    shape: torch.Size  # of the rows as the caller gave them

    @property
    def num_classes(self) -> int:
        """K."""
        return self.logits.shape[1]

    @property
    def soft(self) -> bool:
        """Whether the target holds probabilities."""
        return self.target.is_floating_point()

    @property
    def dtype(self) -> torch.dtype:
        """What the loss is computed in."""
        return ops.compute_dtype(self.logits.dtype)

    @property
    def margins(self) -> bool:
        """Whether a term changes the labelled class alone."""
        return any(isinstance(term, MarginTerm) for term in self.terms)

    def inputs(self) -> ops.LogitInputs:
        """What the operations read: affine terms folded, a soft cap as a number, the label's logit after margins.

        Whatever comes before the last soft cap is applied here, in a pass of its own.
        """
        if not self.terms:
            return ops.LogitInputs(self.logits, self.target, class_weight=self.class_weight)
        logits, terms, soft_cap = self._capped()
        affine = [term for term in terms if isinstance(term, AffineTerm)]
        scale, bias = fold_affine(affine, self.num_classes, self.dtype, logits.device)
        target_override = target_override_grad = None
        if len(affine) < len(terms):
            column = torch.where(self.target != self.ignore_index, self.target, 0).clamp(0, self.num_classes - 1)
            x = logits.detach().gather(1, column.unsqueeze(1)).squeeze(1).to(self.dtype)
            cap = (SoftCap(soft_cap),) if soft_cap else ()
            target_override, target_override_grad = label_chain(x, column, (*cap, *terms))
            target_override, target_override_grad = target_override.contiguous(), target_override_grad.contiguous()
        return ops.LogitInputs(
            logits, self.target, scale, bias, self.class_weight, target_override, target_override_grad, soft_cap
        )

    def _capped(self) -> tuple[Tensor, tuple[Term, ...], float]:
        """Logits after all that precedes the last soft cap, the terms that follow it, and the cap (0 without one)."""
        caps = [i for i, term in enumerate(self.terms) if isinstance(term, SoftCap)]
        if not caps:
            return self.logits, self.terms, 0.0
        last = caps[-1]
        cap = self.terms[last].cap  # type: ignore[attr-defined]
        eager = self.terms[: last + 1] if isinstance(cap, Tensor) else self.terms[:last]
        logits = self.logits
        if eager:
            target = None if self.soft else torch.where(self.target != self.ignore_index, self.target, -1)
            logits = terms_applied(logits, eager, self.dtype, target)
        return logits, self.terms[last + 1 :], 0.0 if isinstance(cap, Tensor) else float(cap)

    def denominator(self) -> Tensor:
        """What the mean divides by: class weight of the label times sample weight, over the kept rows."""
        if self.soft:
            rows = self.logits.shape[0] * (self.logits.shape[2] if self.logits.dim() == 3 else 1)
            each = self.logits.new_tensor(float(rows), dtype=self.dtype)
            return each if self.sample_weight is None else self.sample_weight.sum()
        kept = self.target != self.ignore_index
        if self.class_weight is None and self.sample_weight is None:
            return kept.sum().to(self.dtype)
        each = kept.to(self.dtype)
        if self.class_weight is not None:
            each = each * self.class_weight[self.target.clamp(0, self.num_classes - 1)]
        total = (each if self.sample_weight is None else each * self.sample_weight).sum()
        # With no weight at all torch's mean is 0 / 0, whatever label smoothing adds to the sum.
        return torch.where(total == 0, torch.full_like(total, math.nan), total)


def checked(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float | Tensor,
    terms: Sequence[Term],
    focal_gamma: float,
    z_loss: float,
    margin_penalty: MarginPenalty | None,
    sample_weight: Tensor | None,
    elsewhere: bool = False,
) -> Problem:
    """The arguments of cross_entropy as a Problem; see there for what is raised.

    With `elsewhere`, labels may name classes of which the logits hold nothing, and are not checked.
    """
    logits = _check_logits(input)
    target, shape = _check_target(input, logits, target)
    if CHECK_VALUES and not torch.compiler.is_compiling():
        if target.is_floating_point():
            _check_probabilities(target)
        elif not elsewhere:
            check_labels(target, logits.shape[1], ignore_index, "target")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: got {reduction!r}; allowed are 'mean', 'sum' and 'none'")
    # What is plainly right is not looked at twice: each call takes a microsecond of a small loss.
    if type(focal_gamma) is not float or focal_gamma != 0.0:
        _check_focal(focal_gamma)
    if type(z_loss) is not float or z_loss != 0.0:
        _check_z_loss(z_loss)
    if type(ignore_index) is not int or ignore_index != -100:
        _check_ignore_index(ignore_index)
    if ignore_index >= 0 and target.is_floating_point():
        raise ValueError(f"ignore_index is not supported for floating point target; got {ignore_index}")
    if sample_weight is not None:
        sample_weight = _check_per_row("sample_weight", sample_weight, logits, shape)
        if CHECK_VALUES:
            _check_range("sample_weight", sample_weight, 0.0)
    smoothing = label_smoothing
    if type(smoothing) is not float or smoothing != 0.0:
        smoothing = _check_smoothing(smoothing, logits, shape)
    if margin_penalty is not None:
        margin_penalty = _check_penalty(margin_penalty, logits, shape)
    if weight is not None:
        weight = _check_class_weight(weight, logits)
        if CHECK_VALUES:
            _check_range("weight", weight, 0.0)
    return Problem(
        logits,
        target,
        check_terms(terms, logits, target) if terms else (),
        weight,
        ignore_index,
        Row(smoothing, focal_gamma, z_loss, margin_penalty),
        sample_weight,
        shape,
    )


def _check_logits(input: Tensor) -> Tensor:
    """The logits as ``(B, K)`` or ``(B, K, d)``, without a copy where strides allow."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor of logits; got {type(input).__name__}")
    if input.dtype not in _LOGIT_DTYPES:
        raise TypeError(f"input must be float32, float64, bfloat16 or float16; got {input.dtype}")
    if input.layout != torch.strided:
        raise TypeError(f"input must be a dense tensor; got layout {input.layout}")
    if input.dim() == 2:
        logits = input
    elif input.dim() == 1:
        logits = input.unsqueeze(0)
    elif input.dim() == 0:
        raise ValueError("input must have a class dimension: (K,), (B, K) or (B, K, d1, ...); got a 0-dim tensor")
    else:
        logits = input if input.dim() == 3 else input.flatten(2)
    if logits.shape[1] == 0:
        raise ValueError(f"input must have at least one class; got shape {tuple(input.shape)}")
    return logits


def _check_target(input: Tensor, logits: Tensor, target: Tensor) -> tuple[Tensor, torch.Size]:
    """The target in the shape of the rows (labels, int64) or of the logits (probabilities), and the rows' shape."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor of labels or probabilities; got {type(target).__name__}")
    if target.device != input.device:
        raise ValueError(f"target must be on the device of input, {input.device}; got {target.device}")
    if target.layout != torch.strided:
        raise TypeError(f"target must be a dense tensor; got layout {target.layout}")
    shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]
    if target.is_floating_point():
        if target.shape != input.shape:
            raise ValueError(
                f"target holds probabilities ({target.dtype}) and must have input's shape {tuple(input.shape)}; "
                f"got {tuple(target.shape)}; labels must be int64"
            )
        return target.reshape(logits.shape), shape
    if target.dtype not in _LABEL_DTYPES:
        raise TypeError(f"target must be int64, int32 or uint8 labels, or probabilities; got {target.dtype}")
    if target.shape != shape:
        raise ValueError(
            f"target must have shape {tuple(shape)} for input of shape {tuple(input.shape)}; got {tuple(target.shape)}"
        )
    if target.dtype != torch.int64:
        target = target.to(torch.int64)
    if logits is not input:
        target = target.reshape(logits.shape[:1] + logits.shape[2:])
    return target, shape


def _check_number(name: str, value: float) -> None:
    if type(value) is float or type(value) is int:
        return
    if isinstance(value, Tensor) or not (torch.compiler.is_compiling() or hasattr(value, "__float__")):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")


def _check_ignore_index(ignore_index: int) -> None:
    if type(ignore_index) is not int and (
        isinstance(ignore_index, Tensor) or not (torch.compiler.is_compiling() or hasattr(ignore_index, "__index__"))
    ):
        raise TypeError(f"ignore_index must be an integer; got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit in 64 bits; got {ignore_index}")


def _check_penalty(penalty: MarginPenalty, logits: Tensor, shape: torch.Size) -> MarginPenalty:
    if not isinstance(penalty, MarginPenalty):
        raise TypeError(f"margin_penalty must be a fusedloss.MarginPenalty; got {type(penalty).__name__}")
    if not isinstance(penalty.strength, Tensor):
        return penalty
    strength = _check_per_row("MarginPenalty: strength", penalty.strength, logits, shape)
    if CHECK_VALUES:
        _check_range("MarginPenalty: strength", strength, 0.0, 1.0 if penalty.mix else math.inf)
    return replace(penalty, strength=strength)


def _check_z_loss(z_loss: float) -> None:
    _check_number("z_loss", z_loss)
    if not -math.inf < z_loss < math.inf:
        raise ValueError(f"z_loss must be finite; got {z_loss}")


def _check_focal(focal_gamma: float) -> None:
    _check_number("focal_gamma", focal_gamma)
    if focal_gamma == 0:
        return
    if not 0.5 <= focal_gamma < math.inf:
        raise ValueError(
            "focal_gamma must be 0, or finite and at least 0.5 (below, the slope is infinite at p = 1); "
            f"got {focal_gamma}"
        )


def _check_smoothing(smoothing: float | Tensor, logits: Tensor, shape: torch.Size) -> float | Tensor:
    if isinstance(smoothing, Tensor):
        smoothing = _check_per_row("label_smoothing", smoothing, logits, shape)
        if CHECK_VALUES:
            _check_range("label_smoothing", smoothing, 0.0, 1.0)
        return smoothing
    _check_number("label_smoothing", smoothing)
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0.0 and 1.0; got {smoothing}")
    return smoothing


def _check_range(name: str, value: Tensor, low: float, high: float = math.inf) -> None:
    """Waits for the device: only under FUSEDLOSS_CHECK=1."""
    if torch.compiler.is_compiling():
        return
    bad = ~((value >= low) & (value <= high) & torch.isfinite(value))
    if bool(bad.any()):
        index = tuple(int(i) for i in bad.nonzero()[0])
        allowed = f"finite and at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be {allowed}; got {float(value[index].detach())} at {index}")


def _check_probabilities(target: Tensor) -> None:
    _check_range("target", target, 0.0)
    sums = target.sum(1)
    off = (sums - 1).abs() > 0.01
    if bool(off.any()):
        index = tuple(int(i) for i in off.nonzero()[0])
        raise ValueError(f"target: probabilities must sum to 1 over classes; got {float(sums[index])} at row {index}")


def _check_per_row(name: str, value: Tensor, logits: Tensor, shape: torch.Size) -> Tensor:
    """One value per row, in the compute dtype and the rows' shape: ``(B,)`` is broadcast over d1, ...."""
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.dtype in _LABEL_DTYPES):
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating-point tensor with one value per row; got {got}")
    if value.device != logits.device:
        raise ValueError(f"{name} must be on the device of input, {logits.device}; got {value.device}")
    rows = logits.shape[:1] + logits.shape[2:]
    value = value.to(ops.compute_dtype(logits.dtype))
    if value.shape == shape:
        return value.reshape(rows).contiguous()
    if len(shape) > 1 and value.shape == shape[:1]:
        return value.unsqueeze(1).expand(rows).contiguous()
    allowed = f"{tuple(shape)}" + (f" or {tuple(shape[:1])}" if len(shape) > 1 else "")
    raise ValueError(f"{name} must have shape {allowed}; got {tuple(value.shape)}")


def _check_class_weight(weight: Tensor, logits: Tensor) -> Tensor:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a floating-point tensor; got {got}")
    if tuple(weight.shape) != (logits.shape[1],):
        raise ValueError(f"weight must have shape ({logits.shape[1]},), one value per class; got {tuple(weight.shape)}")
    if weight.device != logits.device:
        raise ValueError(f"weight must be on the device of input, {logits.device}; got {weight.device}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight gets no gradient; detach it, or pass what is learned as sample_weight or in a term")
    return weight.to(ops.compute_dtype(logits.dtype)).contiguous()


def check_terms(terms: Sequence[Term], logits: Tensor, target: Tensor) -> tuple[Term, ...]:
    """The terms as a tuple; ValueError or TypeError where one does not fit logits and target."""
    if not isinstance(terms, (Sequence, Term)):
        raise TypeError(f"terms must be a sequence of fusedloss.terms; got {type(terms).__name__}")
    checked_terms: list[Term] = []
    for term in (terms,) if isinstance(terms, Term) else terms:
        if not isinstance(term, (AffineTerm, MarginTerm, SoftCap)):
            got = getattr(term, "__name__", type(term).__name__)
            raise TypeError(f"terms must hold objects of fusedloss.terms; got {got}")
        term.check(logits.shape[1])
        if isinstance(term, MarginTerm) and target.is_floating_point():
            raise ValueError(
                f"terms: {type(term).__name__} changes the labelled class; got probability targets (for mixup, mix the "
                "losses of both labels)"
            )
        for name, value in tensors_of(term).items():
            if value.device != logits.device:
                raise ValueError(
                    f"{type(term).__name__}: {name} must be on the device of input, {logits.device}; got {value.device}"
                )
            per_row = isinstance(term, MarginTerm) and value.dim() == 2
            if per_row and value.shape[0] != logits.shape[0]:
                raise ValueError(
                    f"{type(term).__name__}: {name} must have shape ({logits.shape[0]}, 1), one value per row; got "
                    f"{tuple(value.shape)}"
                )
        if isinstance(term, ClassTemperature) and not torch.compiler.is_compiling():
            tau = term.tau
            if isinstance(tau, Tensor) and tau.requires_grad:
                term.check_values()
        checked_terms.append(term)
    return tuple(checked_terms)
