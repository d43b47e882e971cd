"""Losses with a name of their own: each a few words over CrossEntropyLoss."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from typing_extensions import Unpack

from fusedloss.core.checks import check_choice, check_focal_gamma, check_number
from fusedloss.core.row_loss import MarginPenalty
from fusedloss.longtail import ldam_margins, log_prior, trained_prior
from fusedloss.losses.cross_entropy import CrossEntropyKeywords, CrossEntropyLoss
from fusedloss.losses.keywords import forwards_keywords
from fusedloss.losses.registered_terms import current, sequence_of
from fusedloss.terms import AdditiveMargin, Prior, Scale


class FocalLoss(CrossEntropyLoss):
    """Focal loss of a softmax: ``-(1 - p_y) ** gamma * log p_y``, with the gradient through both factors.

    Args:
        gamma: 0, or at least 0.5.
        keywords: those of ``CrossEntropyLoss``; label smoothing is multiplied too.

    Source: Lin et al. 2017, arXiv:1708.02002, for several classes; docs/losses.md lists incompatible variants.

    Example:
        >>> import torch, fusedloss
        >>> fusedloss.FocalLoss(gamma=2.0)(torch.zeros(1, 2), torch.tensor([0]))  # 0.25 log 2
        tensor(0.1733)
    """

    @forwards_keywords(CrossEntropyLoss, without=["focal_gamma"])
    def __init__(self, gamma: float = 2.0, **keywords: Unpack[CrossEntropyKeywords]) -> None:
        keywords["focal_gamma"] = check_focal_gamma(gamma, "gamma")
        super().__init__(**keywords)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"gamma": self.focal_gamma}


class BalancedSoftmaxLoss(CrossEntropyLoss):
    """Cross-entropy with the log prior added to the logits while training: ``z = x + strength * log pi``.

    The model predicts with its raw logits; ``longtail.adjust_logits`` afterwards would apply the prior twice.

    Args:
        class_counts: samples per class ``(K,)`` of the training set.
        strength: 1 is Balanced Softmax; another value is logit adjustment with that tau.
        floor: least count assumed of a class. 0 gives a class without samples probability 0 while training, as the
            reference code does; its logits are then never learned, and label smoothing becomes infinite.
        keywords: those of ``CrossEntropyLoss``; its `terms` come before the prior and hold no other Prior.

    Raises:
        ValueError: a Prior among `terms`; a negative strength, whose sign belongs to ``adjust_logits``.

    Source: Ren et al. 2020, arXiv:2007.10740; Menon et al. 2021, arXiv:2007.07314.

    Example:
        >>> import torch, fusedloss
        >>> loss = fusedloss.BalancedSoftmaxLoss(class_counts=torch.tensor([90, 10]))
        >>> loss(torch.zeros(1, 2), torch.tensor([1]))  # -log 0.1
        tensor(2.3026)
    """

    @forwards_keywords(CrossEntropyLoss)
    def __init__(
        self,
        class_counts: Tensor,
        strength: float = 1.0,
        *,
        floor: float = 1.0,
        **keywords: Unpack[CrossEntropyKeywords],
    ) -> None:
        terms = sequence_of(keywords.get("terms", ()))
        if any(isinstance(term, Prior) for term in terms):
            raise ValueError(
                "terms must hold no Prior, for BalancedSoftmaxLoss adds the prior of class_counts already and a second "
                f"one would apply it twice; got a Prior of strength {trained_prior(terms):g}"
            )
        if check_number("strength", strength) < 0:
            raise ValueError(
                f"strength must be at least 0; got {strength}: training adds the log prior, and the minus sign belongs "
                "to longtail.adjust_logits, after a training without it"
            )
        keywords["terms"] = (*terms, Prior(log_prior(class_counts, floor), strength))
        super().__init__(**keywords)
        self.strength, self.floor = strength, floor

    def settings(self) -> dict[str, Any]:
        *terms, prior = current(self.terms)
        assert isinstance(prior, Prior)
        return {"terms": tuple(terms), "class_counts": prior.log_prior}


class LDAMLoss(CrossEntropyLoss):
    """Label-distribution-aware margins: ``z = scale * (x - m_y 1[j = y])`` with ``m_c ~ n_c ** -1/4``, x cosines.

    Args:
        class_counts: samples per class ``(K,)`` of the training set; a class without samples counts as having one.
        max_margin: margin of the rarest class, in cosine.
        scale: what the cosines are multiplied with.
        keywords: those of ``CrossEntropyLoss``; its `terms` follow the scale, and `weight` takes
            ``longtail.DeferredReweighting`` (LDAM-DRW).

    Shape:
        input: cosines ``(B, K)`` of normalised features and normalised class weights.

    Source: Cao et al. 2019, arXiv:1906.07413.

    Example:
        >>> import torch, fusedloss
        >>> loss = fusedloss.LDAMLoss(class_counts=torch.tensor([1000, 10]))
        >>> cosines = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        >>> bool(loss(cosines, torch.tensor([0, 1])) > fusedloss.cross_entropy(30 * cosines, torch.tensor([0, 1])))
        True
    """

    @forwards_keywords(CrossEntropyLoss)
    def __init__(
        self,
        class_counts: Tensor,
        max_margin: float = 0.5,
        scale: float = 30.0,
        **keywords: Unpack[CrossEntropyKeywords],
    ) -> None:
        check_number("scale", scale, above=0.0)
        margin = AdditiveMargin(ldam_margins(class_counts, max_margin))
        keywords["terms"] = (margin, Scale(scale), *sequence_of(keywords.get("terms", ())))
        super().__init__(**keywords)
        self.max_margin, self.scale = max_margin, scale

    def settings(self) -> dict[str, Any]:
        margin, _, *terms = current(self.terms)
        assert isinstance(margin, AdditiveMargin)
        return {"terms": tuple(terms), "class_counts": margin.margin}


class MbLSLoss(CrossEntropyLoss):
    """Margin-based label smoothing: ``CE + strength * 1/K sum_k relu(max z - z_k - margin)``.

    Args:
        margin: gaps below the largest logit that cost nothing; at least 0.
        strength: weight of the penalty.
        over: ``"mean"`` over the classes, as the reference code, or ``"sum"``, as its paper writes.
        keywords: those of ``CrossEntropyLoss``.

    Source: Liu et al. 2022, arXiv:2111.15430; github.com/by-liu/MbLS.

    Example:
        >>> import torch, fusedloss
        >>> loss = fusedloss.MbLSLoss(margin=10.0, strength=0.1)
        >>> loss(torch.tensor([[20.0, 0.0]]), torch.tensor([0]))  # 0.1 * 10 / 2
        tensor(0.5000)
    """

    @forwards_keywords(CrossEntropyLoss, without=["margin_penalty"])
    def __init__(
        self,
        margin: float = 10.0,
        strength: float = 0.1,
        *,
        over: Literal["mean", "sum"] = "mean",
        **keywords: Unpack[CrossEntropyKeywords],
    ) -> None:
        check_number("margin", margin, at_least=0.0)
        check_number("strength", strength, at_least=0.0)
        check_choice("over", over, ("mean", "sum"))
        keywords["margin_penalty"] = MarginPenalty(margin, strength, over)
        super().__init__(**keywords)

    def settings(self) -> dict[str, Any]:
        penalty = self.margin_penalty
        assert penalty is not None
        own = {"margin": penalty.margin, "strength": penalty.strength, "over": penalty.over}
        return super().settings() | own


class PolyLoss(CrossEntropyLoss):
    """PolyLoss (Poly-1): ``CE + epsilon * (1 - p_y)``, the first coefficient of cross-entropy's expansion changed.

    Args:
        epsilon: finite; 1 as the paper starts from, and above -1 for a loss that falls with p_y everywhere.
        keywords: those of ``CrossEntropyLoss``; with `focal_gamma`, the paper's Poly-1 focal loss. Class weights leave
            the added part alone.

    Source: Leng et al. 2022, arXiv:2204.12511.

    Example:
        >>> import torch, fusedloss
        >>> fusedloss.PolyLoss(epsilon=1.0)(torch.zeros(1, 2), torch.tensor([0]))  # log 2 + 0.5
        tensor(1.1931)
    """

    @forwards_keywords(CrossEntropyLoss, without=["poly_epsilon"])
    def __init__(self, epsilon: float = 1.0, **keywords: Unpack[CrossEntropyKeywords]) -> None:
        keywords["poly_epsilon"] = check_number("epsilon", epsilon)
        super().__init__(**keywords)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"epsilon": self.poly_epsilon}
