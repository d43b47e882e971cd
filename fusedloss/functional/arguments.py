"""The arguments of a loss on logits, checked once and brought into the form that the operations take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedloss.backends import CHECK_VALUES
from fusedloss.backends.reference.softmax_ce import terms_applied
from fusedloss.core.checks import check_choice, check_ignore_index, check_label_shape, check_labels, check_per_row
from fusedloss.core.dtypes import FLOATING, LABELS, compute_dtype
from fusedloss.core.operands import LogitInputs, RowInputs
from fusedloss.core.reduce import mean_denominator
from fusedloss.core.row_loss import RowOptions, RowSettings
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

REDUCTIONS = ("mean", "sum", "none")
_NO_OPTIONS, _NO_ROWS = RowOptions(), RowInputs()


# Not frozen: that takes a microsecond of a small loss.
@dataclass(slots=True)
class LossArguments:
    """Checked arguments in the form that the operations take: ``(B, K)`` or ``(B, K, d)`` logits."""

    logits: Tensor
    target: Tensor
    terms: tuple[Term, ...]
    class_weight: Tensor | None
    ignore_index: int
    options: RowOptions
    rows: RowInputs
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
        return compute_dtype(self.logits.dtype)

    @property
    def has_margin(self) -> bool:
        """Whether a term changes the labelled class alone."""
        return any(isinstance(term, MarginTerm) for term in self.terms)

    def inputs(self) -> LogitInputs:
        """What the operations read: affine terms folded, a soft cap as a number, the label's logit after margins.

        Whatever comes before the last soft cap is applied here, in a pass of its own.
        """
        if not self.terms:
            return LogitInputs(self.logits, self.target, class_weight=self.class_weight, ignore_index=self.ignore_index)
        logits, terms, soft_cap = self._capped()
        affine = [term for term in terms if isinstance(term, AffineTerm)]
        scale, bias = fold_affine(affine, self.num_classes, self.dtype, logits.device)
        override = override_grad = None
        if len(affine) < len(terms):
            column = self.label_columns()
            x = logits.detach().gather(1, column.unsqueeze(1)).squeeze(1).to(self.dtype)
            cap = (SoftCap(soft_cap),) if soft_cap else ()
            value, grad = label_chain(x, column, (*cap, *terms))
            override, override_grad = value.contiguous(), grad.contiguous()
        # Not _replace(), here and below: torch.compile of torch 2.8 can't trace it.
        return LogitInputs(
            logits,
            self.target,
            scale,
            bias,
            self.class_weight,
            override,
            override_grad,
            soft_cap,
            self.ignore_index,
        )

    def label_columns(self) -> Tensor:
        """The class of each row, 0 where it has none."""
        return torch.where(self.target != self.ignore_index, self.target, 0).clamp(0, self.num_classes - 1)

    def _capped(self) -> tuple[Tensor, tuple[Term, ...], float]:
        """Logits after all that precedes the last soft cap, the terms that follow it, and the cap (0 without one)."""
        caps = [i for i, term in enumerate(self.terms) if isinstance(term, SoftCap)]
        if not caps:
            return self.logits, self.terms, 0.0
        last = caps[-1]
        cap = self.terms[last].cap  # type: ignore[attr-defined]
        eager = self.terms[: last + 1] if isinstance(cap, Tensor) else self.terms[:last]
        logits = terms_applied(self.logits, eager, self.dtype, self.margin_target()) if eager else self.logits
        return logits, self.terms[last + 1 :], 0.0 if isinstance(cap, Tensor) else float(cap)

    def margin_target(self) -> Tensor | None:
        """The labels as margins take them: -1 where there is none; None for probabilities."""
        return None if self.soft else torch.where(self.target != self.ignore_index, self.target, -1)

    def denominator(self) -> Tensor:
        """What the mean divides by: class weight of the label times sample weight, over the kept rows."""
        weights = (self.class_weight, self.ignore_index, self.rows.sample_weight)
        return mean_denominator(self.target, *weights, self.dtype)


def checked(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    terms: Sequence[Term],
    settings: RowSettings,
    sample_weight: Tensor | None,
    *,
    labels_may_be_remote: bool = False,
) -> LossArguments:
    """The arguments of cross_entropy; see there for what is raised.

    With `labels_may_be_remote`, labels may name classes of which the logits hold nothing, and are not checked.
    """
    logits = _check_logits(input)
    target, shape = _check_target(input, logits, target)
    if CHECK_VALUES and not torch.compiler.is_compiling():
        if target.is_floating_point():
            _check_probabilities(target)
        elif not labels_may_be_remote:
            check_labels(target, logits.shape[1], ignore_index, "target")
    if reduction not in REDUCTIONS:
        check_choice("reduction", reduction, REDUCTIONS)
    # What is plainly right is not looked at twice: each look takes a part of a small loss.
    plain = settings.is_default()
    if not plain:
        settings.check()
    if type(ignore_index) is not int or ignore_index != -100:
        ignore_index = check_ignore_index(ignore_index)
    if ignore_index >= 0 and target.is_floating_point():
        raise ValueError(
            f"ignore_index must be negative: it is not supported for floating point target; got {ignore_index}"
        )
    if weight is not None:
        weight = _check_class_weight(weight, logits)
        _check_range("weight", weight, 0.0)
    return LossArguments(
        logits,
        target,
        () if type(terms) is tuple and not terms else check_terms(terms, logits, target),
        weight,
        ignore_index,
        _NO_OPTIONS if plain else settings.options(logits.shape[1]),
        _NO_ROWS if plain and sample_weight is None else _row_inputs(settings, sample_weight, logits, shape),
        shape,
    )


def _row_inputs(settings: RowSettings, sample_weight: Tensor | None, logits: Tensor, shape: torch.Size) -> RowInputs:
    """The options that are tensors, one value per row."""
    penalty = settings.margin_penalty
    smoothing = strength = None
    if sample_weight is not None:
        sample_weight = _per_row("sample_weight", sample_weight, logits, shape)
        _check_range("sample_weight", sample_weight, 0.0)
    if isinstance(settings.label_smoothing, Tensor):
        smoothing = _per_row("label_smoothing", settings.label_smoothing, logits, shape)
        _check_range("label_smoothing", smoothing, 0.0, 1.0)
    if penalty is not None and isinstance(penalty.strength, Tensor):
        strength = _per_row("MarginPenalty: strength", penalty.strength, logits, shape)
        _check_range("MarginPenalty: strength", strength, 0.0, 1.0 if penalty.mix else math.inf)
    return RowInputs(smoothing, sample_weight, strength)


def _check_logits(input: Tensor) -> Tensor:
    """The logits as ``(B, K)`` or ``(B, K, d)``, without a copy where strides allow."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor of logits; got {type(input).__name__}")
    if input.dtype not in FLOATING:
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
                f"target must have input's shape {tuple(input.shape)} where it holds probabilities ({target.dtype}; "
                f"labels are int64); got {tuple(target.shape)}"
            )
        return target.reshape(logits.shape), shape
    if target.dtype not in LABELS:
        raise TypeError(f"target must be int64, int32 or uint8 labels, or probabilities; got {target.dtype}")
    check_label_shape("target", target, shape, input.shape)
    if target.dtype != torch.int64:
        target = target.to(torch.int64)
    if logits is not input:
        target = target.reshape(logits.shape[:1] + logits.shape[2:])
    return target, shape


def _check_range(name: str, value: Tensor, low: float, high: float = math.inf) -> None:
    """Under FUSEDLOSS_CHECK=1 alone, since it waits for the device."""
    if not CHECK_VALUES or torch.compiler.is_compiling():
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
        raise ValueError(f"target must hold probabilities that sum to 1; got {float(sums[index])} at row {index}")


def _per_row(name: str, value: Tensor, logits: Tensor, shape: torch.Size) -> Tensor:
    """One value per row, in the compute dtype and the rows' shape: ``(B,)`` is broadcast over d1, ...."""
    value = check_per_row(name, value, shape, logits).to(compute_dtype(logits.dtype))
    return value.expand(shape).reshape(logits.shape[:1] + logits.shape[2:]).contiguous()


def _check_class_weight(weight: Tensor, logits: Tensor) -> Tensor:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a floating-point tensor; got {got}")
    if tuple(weight.shape) != (logits.shape[1],):
        raise ValueError(f"weight must have shape ({logits.shape[1]},), one value per class; got {tuple(weight.shape)}")
    if weight.device != logits.device:
        raise ValueError(f"weight must be on the device of input, {logits.device}; got {weight.device}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight must not require a gradient (detach it, or pass what is learned as sample_weight or in a term); "
            "got requires_grad=True"
        )
    return weight.to(compute_dtype(logits.dtype)).contiguous()


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
                f"target must hold labels with {type(term).__name__}, which changes the labelled class (for mixup, mix "
                "the losses of both labels); got probabilities"
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
