"""Priors, margins and class weights for long-tailed data, each computed in float64 and returned in float32."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusedloss.core.checks import as_labels, as_tensor, check_integer, check_number, check_tensor
from fusedloss.terms import Prior, Term


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
    num_classes = check_integer("num_classes", num_classes, at_least=1)
    labels = as_labels("labels", labels, None, num_classes)
    return torch.bincount(labels.reshape(-1), minlength=num_classes)


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
    beta = check_number("beta", beta, at_least=0.0, below=1.0)
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
    power = check_number("power", power, at_least=0.0)
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
    floor = check_number("floor", floor, at_least=0.0)
    counts = _checked_counts(counts)
    return (counts.clamp(min=floor) / counts.sum()).log().to(torch.float32)


def adjust_logits(
    logits: Tensor,
    log_prior: Tensor,
    strength: float = 1.0,
    target_log_prior: Tensor | None = None,
    *,
    trained_with: nn.Module | Sequence[Term] | Mapping[str, Any] | None = None,
) -> Tensor:
    """Logits of a model trained *without* a prior, adjusted afterwards: ``z - strength * log_prior`` (a minus sign).

    With `target_log_prior`, ``z - strength * log_prior + target_log_prior``: the classes as they are where the model
    is deployed. A model trained with ``terms.Prior`` needs neither: its raw logits already treat the classes alike, and
    ``z + target_log_prior`` (here: ``strength=0``) brings them to another prior.

    Args:
        logits: ``(B, K)`` or ``(B, K, d1, ...)``.
        log_prior: ``(K,)``, of the training data; -inf (a class without samples, never learned) rules the
            class out.
        strength: finite, at least 0 (Menon's tau); a negative one would be the training sign.
        target_log_prior: ``(K,)``, of the deployment; -inf rules a class out.
        trained_with: the loss, its terms, or a run's prior record (``Predictor.prior``): what the model was trained
            with, so that a prior is not applied twice.

    Returns:
        Adjusted logits in the dtype of `logits`.

    Raises:
        ValueError: a prior subtracted from the logits of a model trained with one; shapes that do not fit; NaN or +inf
            in a prior; a strength that is negative or not finite.
        TypeError: what is no floating-point tensor or no number, or `trained_with` of another kind.

    Source: Menon et al. 2021, arXiv:2007.07314, section 4.1; to another prior: Hong et al. 2021, arXiv:2012.00321.

    Example:
        >>> adjust_logits(torch.zeros(1, 2), log_prior(torch.tensor([9, 1]))).softmax(1)
        tensor([[0.1000, 0.9000]])
    """
    check_tensor("logits", logits)
    if logits.dim() < 2:
        raise ValueError(f"logits must have shape (B, K) or (B, K, d1, ...); got {tuple(logits.shape)}")
    if check_number("strength", strength) < 0:
        raise ValueError(
            f"strength must be at least 0; got {strength}: the minus sign of a post-hoc adjustment is built in, and "
            "the plus sign belongs to training (terms.Prior)"
        )
    trained = trained_prior(trained_with)
    if trained != 0 and strength != 0:
        raise ValueError(
            "strength must be 0 (with target_log_prior for another deployment) for a model that was trained with "
            f"{trained:g} * log_prior added, or the prior is applied twice: its raw logits are adjusted already; got "
            f"{strength}"
        )
    shift = torch.zeros(logits.shape[1], dtype=torch.float64, device=logits.device)
    if strength != 0:
        prior = _checked_log_prior("log_prior", log_prior, logits)
        shift = shift - strength * prior.masked_fill(prior == -math.inf, math.inf)
    if target_log_prior is not None:
        shift = shift + _checked_log_prior("target_log_prior", target_log_prior, logits)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    column = shift.to(dtype).reshape(-1, *[1] * (logits.dim() - 2))
    return (logits.to(dtype) + column).to(logits.dtype)


def trained_prior(trained_with: nn.Module | Sequence[Term] | Mapping[str, Any] | None) -> float:
    """Strength of the log prior that a model was trained with, 0 for none.

    Args:
        trained_with: a loss that has ``terms``, a sequence of terms, a record ``{"applied": ..., "strength": ...}`` as
            ``Predictor.prior``, or None for not known (0).

    Raises:
        TypeError: anything else.

    Example:
        >>> trained_prior([Prior(torch.tensor([0.9, 0.1]).log(), 0.5)])
        0.5
    """
    if trained_with is None:
        return 0.0
    if isinstance(trained_with, Mapping):
        if not {"applied", "strength"} <= trained_with.keys():
            raise ValueError(
                f"trained_with must be a record with 'applied' and 'strength'; got the keys {sorted(trained_with)}"
            )
        return float(trained_with["strength"]) if trained_with["applied"] == "training" else 0.0
    registered = getattr(trained_with, "terms", None)
    if isinstance(trained_with, nn.Module) and isinstance(registered, nn.ModuleList):
        terms: list[Any] = [term.current() for term in registered]  # type: ignore[operator]
    elif isinstance(trained_with, Sequence) and all(isinstance(term, Term) for term in trained_with):
        terms = list(trained_with)
    else:
        raise TypeError(
            "trained_with must be a loss with terms, a sequence of terms, or a run's prior record; got "
            f"{type(trained_with).__name__}"
        )
    return float(sum(term.strength for term in terms if isinstance(term, Prior)))


def ldam_margins(counts: Tensor, max_margin: float = 0.5) -> Tensor:
    """Label-distribution-aware margins ``m_c = max_margin * n_c**-1/4 / max_k n_k**-1/4`` (Cao et al., NeurIPS 2019).

    The rarest class has `max_margin`; a class without samples counts as having one.

    Args:
        counts: samples per class ``(K,)``.
        max_margin: positive and finite, in units of the logit that the margin is subtracted from (a cosine).

    Returns:
        float32 tensor ``(K,)``, for ``terms.AdditiveMargin``.

    Raises:
        ValueError: a margin that is not positive and finite, negative or non-finite counts, or no sample at all.

    Source: arXiv:1906.07413; github.com/kaidic/LDAM-DRW.

    Example:
        >>> ldam_margins(torch.tensor([1000, 500, 100, 20, 5]))
        tensor([0.1330, 0.1581, 0.2364, 0.3536, 0.5000])
    """
    max_margin = check_number("max_margin", max_margin, above=0.0)
    root = _checked_counts(counts).clamp(min=1.0).pow(-0.25)
    return (max_margin * root / root.max()).to(torch.float32)


class DeferredReweighting:
    """Class weights that start late: ones until `start_epoch`, then those of the counts (DRW; Cao et al. 2019).

    ``w(epoch) = (1 - t) + t * w_final``, with ``t = 0`` before `start_epoch`; from there on t is 1, or grows by
    ``1 / ramp_epochs`` with each epoch up to 1 (gradual re-weighting). A function of the epoch alone: a resumed run
    has nothing to restore. Every weight is 1 before the start; after it, a class without samples has 0.

    Args:
        counts: samples per class ``(K,)``, over the whole data set.
        start_epoch: first epoch (from 0) with other weights; LDAM-DRW: 160 of 200.
        ramp_epochs: epochs over which they grow; 0 for at once.
        beta: of ``effective_number_weights``.
        power: of ``inverse_frequency_weights``, which replaces the effective numbers where given.

    Raises:
        ValueError: a negative epoch, or what the weights' functions refuse.
        TypeError: an epoch that is not an integer.

    Source: arXiv:1906.07413, section 3.3.

    Example:
        >>> schedule = DeferredReweighting(torch.tensor([300, 100]), start_epoch=2, ramp_epochs=2, power=1.0)
        >>> [schedule(epoch).tolist() for epoch in (0, 1, 2, 3)]
        [[1.0, 1.0], [1.0, 1.0], [0.75, 1.25], [0.5, 1.5]]
        >>> loss = schedule.apply_to(CrossEntropyLoss(), epoch=3)
        >>> loss.weight
        tensor([0.5000, 1.5000])
    """

    def __init__(
        self,
        counts: Tensor,
        start_epoch: int,
        *,
        ramp_epochs: int = 0,
        beta: float = 0.9999,
        power: float | None = None,
    ) -> None:
        self.start_epoch = check_integer("start_epoch", start_epoch, at_least=0)
        self.ramp_epochs = check_integer("ramp_epochs", ramp_epochs, at_least=0)
        self.final = (
            effective_number_weights(counts, beta) if power is None else inverse_frequency_weights(counts, power)
        )

    def __call__(self, epoch: int) -> Tensor:
        """The weights ``(K,)`` of an epoch, float32, counted from 0."""
        done = check_integer("epoch", epoch, at_least=0) - self.start_epoch + 1
        share = min(max(done, 0) / (self.ramp_epochs or 1), 1.0)
        return torch.ones_like(self.final).lerp(self.final, share)

    def apply_to(self, loss: nn.Module, epoch: int) -> nn.Module:
        """Puts the weights of an epoch into ``loss.weight``, in place where it has one; returns the loss.

        Raises:
            TypeError: a loss without a buffer ``weight``. ValueError: one of another width.
        """
        if "weight" not in getattr(loss, "_buffers", {}):
            raise TypeError(f"loss must have a buffer 'weight' (torch's or ours do); got {type(loss).__name__}")
        weights, present = self(epoch), loss._buffers["weight"]
        if present is None:
            owned = next(loss.buffers(), None)
            loss.weight = weights if owned is None else weights.to(owned.device)
            return loss
        if present.shape != weights.shape:
            raise ValueError(
                f"loss must have weights of the counts' shape {tuple(weights.shape)}; got {tuple(present.shape)}"
            )
        with torch.no_grad():
            present.copy_(weights)
        return loss


def _checked_log_prior(name: str, prior: Any, logits: Tensor) -> Tensor:
    prior = check_tensor(name, prior)
    if tuple(prior.shape) != (logits.shape[1],):
        raise ValueError(f"{name} must have shape ({logits.shape[1]},), one value per class; got {tuple(prior.shape)}")
    if prior.device.type != "meta" and bool((~(prior < math.inf)).any()):
        raise ValueError(f"{name} must be below +inf (use log class frequencies); got NaN or +inf")
    moved: Tensor = prior.to(device=logits.device, dtype=torch.float64)
    return moved


def _checked_counts(counts: Any) -> Tensor:
    values = as_tensor("counts", counts)
    if values.dim() != 1 or values.numel() == 0:
        raise ValueError(f"counts must have shape (K,), one value per class; got {tuple(values.shape)}")
    values = values.to(torch.float64)
    bad = ~(torch.isfinite(values) & (values >= 0))
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise ValueError(f"counts must be finite and at least 0; got {float(values[index])} for class {index}")
    if not bool((values > 0).any()):
        raise ValueError("counts must name at least one sample; got zeros only")
    return values


def _normalized(weights: Tensor, counts: Tensor) -> Tensor:
    present = counts > 0
    weights = torch.where(present, weights, torch.zeros_like(weights))
    return (weights * (present.sum() / weights.sum())).to(torch.float32)
