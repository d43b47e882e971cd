"""What changes the logit: small frozen objects, applied in order, each with its eager formula.

Affine terms fold into two ``(K,)`` vectors, a margin is a function of the labelled class's logit alone: neither costs a
pass over the logits. Tensors in a term get gradients when they require them.
"""

from fusedloss.terms.affine import AffineTerm, ClassTemperature, Prior, Scale, fold_affine
from fusedloss.terms.margins import AdditiveMargin, AngularMargin, CombinedMargin
from fusedloss.terms.soft_cap import SoftCap
from fusedloss.terms.term import MarginTerm, Term, label_chain, per_class, per_row, tensors_of, widened

__all__ = [
    "AdditiveMargin",
    "AffineTerm",
    "AngularMargin",
    "ClassTemperature",
    "CombinedMargin",
    "MarginTerm",
    "Prior",
    "Scale",
    "SoftCap",
    "Term",
    "fold_affine",
    "label_chain",
    "per_class",
    "per_row",
    "tensors_of",
    "widened",
]
