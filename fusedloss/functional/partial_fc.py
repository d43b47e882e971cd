"""PartialFC: a softmax over the batch's own classes and a random share of the others."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor

from fusedloss.core.checks import check_labels, check_number
from fusedloss.functional.arguments import LossArguments
from fusedloss.functional.linear_head import LinearHead
from fusedloss.terms import Term
from fusedloss.terms.term import readable

_IGNORED = -100


def check_sample_rate(rate: float, num_classes: int, rows: int) -> int:
    """How many classes are kept: the share of all, and no fewer than there are rows, which may all differ."""
    check_number("sample_rate", rate, above=0.0, at_most=1.0)
    count = min(num_classes, max(math.ceil(rate * num_classes), rows))
    if count < 2:
        raise ValueError(f"sample_rate must leave a negative class, at least 2 of {num_classes}; got {rate}")
    return count


def sampled(arguments: LossArguments, head: LinearHead, rate: float) -> tuple[LossArguments, LinearHead, Tensor]:
    """The arguments over the classes kept, the head of these, and which they are, ascending.

    Source: An et al. 2022, arXiv:2203.15565. Random numbers are torch's own: ``torch.manual_seed`` repeats them.
    """
    if arguments.soft:
        raise ValueError("target must hold labels with sample_rate; got probabilities")
    num_classes, target = arguments.num_classes, arguments.target
    count = check_sample_rate(rate, num_classes, head.input.shape[0])
    if readable(target):
        check_labels(target, num_classes, arguments.ignore_index, "target")
    kept_row = target != arguments.ignore_index
    classes = torch.where(kept_row, target, 0).clamp(0, num_classes - 1)
    score = torch.rand(num_classes, device=target.device)
    score = score.scatter_reduce(0, classes, torch.where(kept_row, 2.0, -1.0), "amax")
    kept = score.topk(count).indices.sort().values
    place = torch.zeros_like(score, dtype=torch.int64).scatter(0, kept, torch.arange(count, device=target.device))
    smaller = head.of_classes(kept)
    weight = arguments.class_weight
    return (
        replace(
            arguments,
            logits=arguments.logits[:, :1].expand(-1, count),
            target=torch.where(kept_row, place[classes], _IGNORED),
            terms=tuple(_of_classes(term, kept, num_classes) for term in arguments.terms),
            class_weight=None if weight is None else weight[kept],
            ignore_index=_IGNORED,
        ),
        smaller,
        kept,
    )


def _of_classes(term: Term, kept: Tensor, num_classes: int) -> Term:
    """The term with the classes kept of every tensor that has one value per class."""
    kept_term = copy.copy(term)
    for name, value in vars(term).items():
        if isinstance(value, Tensor) and tuple(value.shape) == (num_classes,):
            object.__setattr__(kept_term, name, value[kept])
    return kept_term
