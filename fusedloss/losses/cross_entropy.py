"""Cross-entropy as a module: it keeps class weights and the tensors of its terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from fusedloss import functional
from fusedloss.core.checks import check_bool, check_choice, check_class_weight, check_ignore_index
from fusedloss.core.row_loss import MarginPenalty, RowSettings
from fusedloss.functional import RowStatistics
from fusedloss.losses.folding import check_linear, folded
from fusedloss.losses.registered_terms import StepWatch, current, registered
from fusedloss.losses.settings_repr import SettingsRepr
from fusedloss.terms import AffineTerm, Prior, Term


class CrossEntropyKeywords(TypedDict, total=False):
    """Options of ``CrossEntropyLoss`` that presets and heads hand on to it; each is kept under its name."""

    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    terms: Sequence[Term] | Term
    focal_gamma: float
    poly_epsilon: float
    z_loss: float
    margin_penalty: MarginPenalty | None
    return_stats: bool


REDUCTIONS = ("mean", "sum", "none")
# What is kept as it was given: a new option is a line above, a parameter and an attribute below.
_KEPT = tuple(name for name in CrossEntropyKeywords.__annotations__ if name != "terms")


class CrossEntropyLoss(SettingsRepr):
    """``torch.nn.CrossEntropyLoss`` with terms, focal, z-loss and sample weights: ``fusedloss.cross_entropy`` kept.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as in ``torch.nn.CrossEntropyLoss``;
            `size_average` and `reduce` were retired there and must stay None.
        terms: what changes the logit (``fusedloss.terms``). Their tensors are registered here: a Parameter as a
            parameter, another tensor as a buffer, under ``terms.0.log_prior``.
        focal_gamma, poly_epsilon, z_loss, margin_penalty, return_stats: as in ``fusedloss.cross_entropy``.

    Shape:
        input ``(K,)``, ``(B, K)`` or ``(B, K, d1, ...)``; target as in ``fusedloss.cross_entropy``; sample_weight the
        target's shape or ``(B,)``. Returns a scalar, or the target's shape with ``reduction="none"``.

    Example:
        >>> import torch, fusedloss
        >>> loss = fusedloss.CrossEntropyLoss(terms=[fusedloss.Prior(torch.tensor([0.9, 0.1]).log())])
        >>> loss(torch.zeros(1, 2), torch.tensor([0]))
        tensor(0.1054)
        >>> list(loss.state_dict())
        ['terms.0.log_prior']
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: None = None,
        ignore_index: int = -100,
        reduce: None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        terms: Sequence[Term] | Term = (),
        focal_gamma: float = 0.0,
        poly_epsilon: float = 0.0,
        z_loss: float = 0.0,
        margin_penalty: MarginPenalty | None = None,
        return_stats: bool = False,
    ) -> None:
        super().__init__()
        if size_average is not None or reduce is not None:
            raise ValueError(
                "size_average and reduce must be None, retired by torch for reduction='mean', 'sum' or 'none'; "
                f"got {size_average} and {reduce}"
            )
        check_choice("reduction", reduction, REDUCTIONS)
        RowSettings(label_smoothing, focal_gamma, poly_epsilon, z_loss, margin_penalty).check()
        self.register_buffer("weight", check_class_weight("weight", weight))
        self.ignore_index = check_ignore_index(ignore_index)
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.focal_gamma = focal_gamma
        self.poly_epsilon = poly_epsilon
        self.z_loss = z_loss
        self.margin_penalty = margin_penalty
        self.return_stats = check_bool("return_stats", return_stats)
        self.terms = registered(terms)
        self._step_watch = StepWatch()

    def forward(
        self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """The loss of logits `input` against `target`; see the class for shapes."""
        if not torch.compiler.is_compiling():
            self._step_watch.look(self)
        loss: Tensor | tuple[Tensor, RowStatistics] = functional.cross_entropy(
            input, target, **self._options(sample_weight)
        )
        return loss

    def fold_into(self, linear: nn.Linear, *, prior: bool = True) -> nn.Linear:
        """A new ``nn.Linear`` whose outputs are this loss's logits, terms included: inference needs no fusedloss.

        Args:
            linear: the classification layer, ``(in_features, K)``; unchanged.
            prior: False leaves ``Prior`` terms out. A model trained with one predicts the training frequencies with
                it, and treats the classes alike without it.

        Raises:
            TypeError: `linear` is no ``nn.Linear``, or a term is not affine.

        Example:
            >>> import torch, fusedloss
            >>> loss = fusedloss.CrossEntropyLoss(terms=[fusedloss.Scale(2.0)])
            >>> layer = torch.nn.Linear(3, 4)
            >>> x = torch.ones(1, 3)
            >>> torch.allclose(loss.fold_into(layer)(x), 2 * layer(x))
            True
        """
        check_linear("fold_into", linear)
        check_bool("prior", prior)
        terms = []
        for term in self._terms():
            if not isinstance(term, AffineTerm):
                raise TypeError(f"fold_into: terms must be affine to be folded into a layer; got {type(term).__name__}")
            term.check(linear.out_features)
            if prior or not isinstance(term, Prior):
                terms.append(term)
        return folded(linear, tuple(terms))

    def settings(self) -> dict[str, Any]:
        return {"terms": current(self.terms)}

    def _terms(self) -> tuple[Term, ...]:
        return current(self.terms)

    def _options(self, sample_weight: Tensor | None) -> dict[str, Any]:
        """The arguments of ``fusedloss.cross_entropy`` but input and target."""
        return {name: getattr(self, name) for name in _KEPT} | {"terms": self._terms(), "sample_weight": sample_weight}
