"""Softmax cross-entropy of a linear layer: the logits are formed, used and forgotten chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fusedloss import ops
from fusedloss.core.row_loss import MarginPenalty
from fusedloss.functional.arguments import Problem, checked
from fusedloss.functional.cross_entropy import (
    RowStatistics,
    backend_of,
    finished,
    loss_of,
    read_statistics,
    statistics_options,
    sweep_options,
)
from fusedloss.functional.linear_head import LinearHead, checked_head
from fusedloss.functional.partial_fc import sampled
from fusedloss.terms import AffineTerm, SoftCap, Term, fold_affine, label_chain


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    normalize: bool = False,
    sample_rate: float | None = None,
    group: object = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float | Tensor = 0.0,
    terms: Sequence[Term] = (),
    focal_gamma: float = 0.0,
    z_loss: float = 0.0,
    margin_penalty: MarginPenalty | None = None,
    sample_weight: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, RowStatistics]:
    """Softmax cross-entropy of a linear layer's logits, ``x . w_k + b_k``, which are never stored whole.

    Equals ``fusedloss.cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)``; with `normalize` rows
    of `input` and of `linear_weight` are divided by their lengths first, so that logits are cosines (ArcFace: add
    ``terms=[AngularMargin(0.5), Scale(30.0)]``). Memory beyond gradients is a chunk of logits, some 60 MB at most.

    Args:
        input: features ``(B, D)`` or ``(D,)``; float32, float64, bfloat16 or float16.
        linear_weight: ``(K, D)``. Products are formed in the wider type of the two, under autocast in its type.
        target: labels ``(B,)`` or ``()``, or probabilities ``(B, K)`` or ``(K,)``.
        linear_bias: ``(K,)``.
        normalize: cosine logits; a row of zeros has cosine 0 with everything, and gradient 0.
        sample_rate: the share of classes kept in the softmax, drawn at each call: the batch's own always are, and no
            fewer than there are rows (PartialFC). Rows of other classes get gradient 0.
        group: a ``torch.distributed`` process group over whose ranks the classes are spread: `linear_weight`, `weight`
            and terms are those of this rank's contiguous share, `input` and `target` the same on all ranks, labels
            global. Value and gradients are those of one process; without smoothing, penalty, sampling and statistics.
        weight, ignore_index, reduction, label_smoothing, terms, focal_gamma, z_loss, margin_penalty, sample_weight,
            return_stats: as in ``fusedloss.cross_entropy``.

    With ``reduction="none"``, `return_stats` or float16 the logits are formed once more in the backward. A soft cap
    that follows another term, a bias or a normalisation has the logits stored.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that don't fit; the message names the argument.
        IndexError: a label outside ``[0, K)`` on the CPU (a device assertion on a GPU).

    >>> import torch, fusedloss
    >>> features, classes = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    >>> fusedloss.linear_cross_entropy(features, classes, torch.tensor([0, 1]))
    tensor(0.0725)
    >>> fusedloss.linear_cross_entropy(features, classes, torch.tensor([0, 1]), normalize=True)
    tensor(0.3133)
    """
    head = checked_head(input, linear_weight, linear_bias, normalize)
    problem = checked(
        head.stand_in(),
        target,
        weight,
        ignore_index,
        reduction,
        label_smoothing,
        terms,
        focal_gamma,
        z_loss,
        margin_penalty,
        sample_weight,
        elsewhere=group is not None,
    )
    if group is not None:
        return _sharded(problem, head, reduction, group, sample_rate is not None or return_stats)
    kept = None
    if sample_rate is not None:
        problem, head, kept = sampled(problem, head, sample_rate)
    found = _loss(problem, head, reduction, return_stats)
    if kept is None or not isinstance(found, tuple):
        return found
    loss, statistics = found
    return loss, statistics._replace(prediction=kept[statistics.prediction])


def _sharded(problem: Problem, head: LinearHead, reduction: str, group: object, more: bool) -> Tensor:
    from fusedloss.functional import sharded_classes

    if more:
        raise ValueError("group: sample_rate and return_stats are not supported for sharded classes")
    if backend_of(problem, False) == "reference":
        raise ValueError("group: sharded classes need the cpp or triton backend")
    local, head, shard = sharded_classes.localized(problem, head, group)
    if not _capped_first(local, head):
        raise ValueError("group: a soft cap must be the first term, without bias and normalisation")
    found = ops.linear_stats(_inputs(local, head), statistics_options(local, False))
    row_loss, weight = sharded_classes.joined(found, problem, local, shard)
    return sharded_classes.reduced(row_loss, weight, problem, reduction)


def _loss(
    problem: Problem, head: LinearHead, reduction: str, return_stats: bool
) -> Tensor | tuple[Tensor, RowStatistics]:
    backend = backend_of(problem, return_stats)
    if backend == "reference" or not _capped_first(problem, head):
        return loss_of(replace(problem, logits=head.logits()), reduction, return_stats)
    inputs = _inputs(problem, head)
    learned = torch.is_grad_enabled() and (head.input.requires_grad or head.weight.requires_grad)
    # A float16 gradient made before the gradient scaler's factor arrives would underflow: sweep in the backward.
    whole = reduction != "none" and not return_stats and not (head.input.dtype == torch.float16 and learned)
    if whole and (problem.sample_weight is None or len(head.input)):
        return ops.linear_ce(inputs, *sweep_options(problem, reduction == "mean"))
    found = ops.linear_stats(inputs, statistics_options(problem, return_stats))
    return finished(problem, *read_statistics(found, return_stats), reduction)


def _capped_first(problem: Problem, head: LinearHead) -> bool:
    """Whether a soft cap, if there is one, sees the products themselves."""
    caps = [index for index, term in enumerate(problem.terms) if isinstance(term, SoftCap)]
    if not caps:
        return True
    cap = problem.terms[0]
    return caps == [0] and not isinstance(cap.cap, Tensor) and head.bias is None and not head.normalize  # type: ignore[attr-defined]


def _inputs(problem: Problem, head: LinearHead) -> ops.LinearInputs:
    """What the operations read: norms, terms folded, the label's logit after margins."""
    input_norm = ops.row_norms(head.input) if head.normalize else None
    class_norm = ops.row_norms(head.weight) if head.normalize else None
    terms, soft_cap = problem.terms, 0.0
    affine = [term for term in terms if isinstance(term, AffineTerm)]
    if terms and isinstance(terms[0], SoftCap):
        soft_cap = float(terms[0].cap)
    scale, bias = fold_affine(affine, problem.num_classes, problem.dtype, head.input.device)
    if head.bias is not None:
        offset = head.bias.to(problem.dtype)
        offset = offset if scale is None else offset * scale
        bias = offset if bias is None else bias + offset
    inputs = ops.LinearInputs(
        head.input,
        head.weight,
        problem.target,
        input_norm,
        class_norm,
        scale,
        bias,
        problem.class_weight,
        soft_cap=soft_cap,
    )
    return _with_label(inputs, problem, head) if problem.margins else inputs


def _with_label(inputs: ops.LinearInputs, problem: Problem, head: LinearHead) -> ops.LinearInputs:
    """The label's logit through all terms, in double: an angular margin is steep where rows are nearly parallel."""
    target = problem.target
    norms = (inputs.input_norm, inputs.class_norm)
    product = ops.target_products(head.input, head.weight, target, *norms, problem.ignore_index)
    classes = torch.where(target != problem.ignore_index, target, 0).clamp(0, problem.num_classes - 1)
    z = product if head.bias is None else product + head.bias.double()[classes]
    value, slope = label_chain(z, classes, problem.terms)
    return inputs._replace(
        target_override=value.to(problem.dtype).contiguous(),
        target_override_grad=slope.contiguous(),
        target_product=product,
    )
