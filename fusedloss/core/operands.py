"""What crosses an operation: named tuples that every layer passes on whole, from ``functional`` to a kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedloss.core.dtypes import compute_dtype


class LogitInputs(NamedTuple):
    """What every softmax operation reads: ``z = scale * c(x) + bias`` and the target distribution.

    c is a soft cap, ``soft_cap * tanh(x / soft_cap)``, or nothing (0). ``target_override`` replaces z at the label of
    each row (a margin), and ``target_override_grad`` is its derivative in x.
    """

    logits: Tensor  # (B, K) or (B, K, d)
    target: Tensor  # labels, int64 (B,) or (B, d), or probabilities of the logits' shape
    scale: Tensor | None = None  # (K,)
    bias: Tensor | None = None  # (K,)
    class_weight: Tensor | None = None  # (K,)
    target_override: Tensor | None = None  # rows
    target_override_grad: Tensor | None = None  # rows
    soft_cap: float = 0.0
    ignore_index: int = -100


class LinearInputs(NamedTuple):
    """What every linear operation reads: logits are ``input @ weight.T``, over both norms where these are given."""

    input: Tensor  # (B, D)
    weight: Tensor  # (K, D)
    target: Tensor  # labels, int64 (B,), or probabilities (B, K)
    input_norm: Tensor | None = None  # float64 (B,)
    class_norm: Tensor | None = None  # float64 (K,)
    scale: Tensor | None = None  # (K,)
    bias: Tensor | None = None  # (K,)
    class_weight: Tensor | None = None  # (K,)
    target_override: Tensor | None = None  # (B,)
    target_override_grad: Tensor | None = None  # float64 (B,): its derivative in target_product
    target_product: Tensor | None = None  # float64 (B,): each row's product with the row of its label
    soft_cap: float = 0.0
    ignore_index: int = -100

    @property
    def dtype(self) -> torch.dtype:
        """What products are formed in; the caller has seen to it that input and weight agree on it, or cast."""
        return self.input.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """What sums, losses and accumulated gradients are kept in."""
        return compute_dtype(self.dtype)


class RowInputs(NamedTuple):
    """Tensors with one value per row; the first and the last replace the number of the same name in RowOptions."""

    label_smoothing: Tensor | None = None
    sample_weight: Tensor | None = None
    penalty_strength: Tensor | None = None


class StatisticsOptions(NamedTuple):
    """Which statistics beyond the first five ``softmax_stats`` computes."""

    penalty_margin: float = 0.0
    smooth_loss: bool = False
    hinge: bool = False
    prediction: bool = False


class SoftmaxStatistics(NamedTuple):
    """What ``softmax_stats`` returns, one value per row; what was not asked for is empty.

    ``row_max`` and ``row_sum`` are kept for the backward; ``row_loss.Statistics`` says what the differentiable six
    are; ``prediction`` and ``confidence`` leave label-dependent terms out.
    """

    row_max: Tensor
    row_sum: Tensor
    log_sum_exp: Tensor
    target_logit: Tensor
    cross_entropy: Tensor
    smooth_loss: Tensor
    one_minus_pt: Tensor
    hinge: Tensor
    prediction: Tensor  # int64
    confidence: Tensor


class SavedStatistics(NamedTuple):
    """What the backward of the statistics needs of the forward."""

    row_max: Tensor
    row_sum: Tensor
    one_minus_pt: Tensor


class StatisticsGrads(NamedTuple):
    """Gradients of the statistics, one value per row; None for 0."""

    log_sum_exp: Tensor | None = None
    target_logit: Tensor | None = None
    cross_entropy: Tensor | None = None
    smooth_loss: Tensor | None = None
    one_minus_pt: Tensor | None = None
    hinge: Tensor | None = None


class SoftmaxMask(NamedTuple):
    """Which gradients a softmax operation returns, in this order; those of scale and bias come together, as two."""

    logits: bool = False
    affine: bool = False
    target_override: bool = False
    label_smoothing: bool = False
    penalty_strength: bool = False


class LinearMask(NamedTuple):
    """Which gradients a linear operation returns, in this order."""

    input: bool = False
    weight: bool = False
    scale: bool = False
    bias: bool = False
    target_override: bool = False
    label_smoothing: bool = False
    penalty_strength: bool = False


class SupConInputs(NamedTuple):
    """What every contrastive operation reads: M rows, of which the first A are the anchors and all are contrasts.

    ``codes`` are equal and not negative for positives; rows of code ``IGNORED`` are neither anchors nor contrasts,
    those of code ``NEGATIVE`` are nobody's positives. A mask replaces codes: ``M = V * B`` rows, view-major: row i is
    sample ``i % B``.
    """

    features: Tensor  # (M, D) in the compute dtype, or of 16 bits with norms
    codes: Tensor  # int32 (M,)
    mask: Tensor | None  # bool (B, B)
    weights: Tensor | None  # (3, M): weight in the sums of exp as a negative, as a positive, and in the mean; None: 1
    per_positive: Tensor  # (A,): 1 over the sum of the positives' weights in the mean, 0 without a positive
    temperature: Tensor  # ()
    num_grad_rows: int  # rows from here on get no gradient
    normalized: bool  # whether no row is longer than 1
    norms: Tensor | None = None  # float64 (M,): lengths of 16-bit features (inf for zeros), whose directions are meant

    @property
    def num_anchors(self) -> int:
        """A."""
        return self.per_positive.shape[0]


class AnchorSums(NamedTuple):
    """What ``supcon_stats`` returns, ``(A,)`` each: the loss, and ``sum_j w_ij exp(s_ij - shift_i)`` with its shift."""

    loss: Tensor
    shift: Tensor
    sum: Tensor


class SavedAnchors(NamedTuple):
    """What the backward of a contrast needs of the forward, ``(A,)`` each."""

    shift: Tensor
    sum: Tensor


class SupConMask(NamedTuple):
    """Which gradients ``supcon_backward`` returns, in this order."""

    features: bool = False
    temperature: bool = False
