"""Centre loss: every row is pulled to the prototype of its class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedloss.core.checks import check_choice, check_ignore_index, check_integer, check_labels, check_number
from fusedloss.core.dtypes import compute_dtype
from fusedloss.core.normalize import unit_rows
from fusedloss.functional.supcon_checks import check_features, checked_labels
from fusedloss.losses.registered_terms import StepWatch
from fusedloss.losses.settings_repr import SettingsRepr
from fusedloss.terms.term import readable

_DISTANCES = ("l2", "cosine")
_REDUCTIONS = ("mean", "sum", "none")
_UPDATES = ("gradient", "delta")


class PrototypeLoss(SettingsRepr):
    """Distance of each row to its class's prototype, a parameter: ``|x_i - c_y|^2``, or ``1 - cos(x_i, c_y)``.

    The prototypes of the batch's labels are gathered: O(B * D), where the usual code masks a (B, K) matrix. The loss
    has no factor 1/2, as that code and unlike the paper (Wen et al., "A Discriminative Feature Learning Approach for
    Deep Face Recognition", 2016).

    Args:
        in_features: D.
        num_classes: K.
        distance: ``"l2"`` (squared) or ``"cosine"``.
        separation: adds ``separation * mean_{a != b} relu(cos(c_a, c_b) - separation_margin)`` over pairs of classes,
            O(K * K).
        separation_margin: cosine up to which prototypes may be alike.
        center_update: ``"gradient"``: prototypes get the loss's gradient; ``"delta"``: the paper's
            ``sum_{y_i = j} (c_j - x_i) / (1 + n_j)``, for an optimizer of their own (plain SGD at the paper's alpha).
        reduction: ``"mean"`` over the rows kept (0 with none), ``"sum"``, or ``"none"`` ``(B,)``, which leaves the
            separation out.
        ignore_index: rows with this label have loss and gradient 0.

    Shape:
        features ``(B, D)``, target ``(B,)`` in [0, K). The parameter ``weight`` ``(K, D)`` holds the prototypes.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that don't fit.
        IndexError: a label outside [0, K), on the CPU.

    Example:
        >>> import torch, fusedloss
        >>> loss = fusedloss.PrototypeLoss(in_features=2, num_classes=3)
        >>> _ = torch.nn.init.zeros_(loss.weight)
        >>> loss(torch.tensor([[3.0, 4.0]]), torch.tensor([1]))
        tensor(25., grad_fn=<...>)
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        distance: str = "l2",
        *,
        separation: float = 0.0,
        separation_margin: float = 0.0,
        center_update: str = "gradient",
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        check_choice("distance", distance, _DISTANCES)
        check_choice("center_update", center_update, _UPDATES)
        if center_update == "delta" and distance != "l2":
            raise ValueError(f"center_update must be 'gradient' with distance={distance!r}; got {center_update!r}")
        check_choice("reduction", reduction, _REDUCTIONS)
        self.in_features = check_integer("in_features", in_features, at_least=1)
        self.num_classes = check_integer("num_classes", num_classes, at_least=1)
        self.distance, self.center_update, self.reduction = distance, center_update, reduction
        self.separation = check_number("separation", separation, at_least=0.0)
        self.separation_margin = check_number("separation_margin", separation_margin)
        self.ignore_index = check_ignore_index(ignore_index)
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.normal_(self.weight, std=in_features**-0.5)
        self._step_watch = StepWatch()

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        """The loss of `features` against the prototypes of `target`."""
        check_features("features", features)
        if features.dim() != 2 or features.shape[1] != self.in_features:
            raise ValueError(f"features must have shape (B, {self.in_features}); got {tuple(features.shape)}")
        if features.device != self.weight.device:
            raise ValueError(f"features must be on the device of weight, {self.weight.device}; got {features.device}")
        target = checked_labels("target", target, features.shape[0], features)
        if not torch.compiler.is_compiling():
            self._step_watch.look(self)
        if readable(target):
            check_labels(target, self.num_classes, self.ignore_index, "target")
        kept = target != self.ignore_index
        label = torch.where(kept, target, 0)
        # NaN in an ignored row would be NaN in the gradient of the class that stands for none.
        rows = features.to(compute_dtype(features.dtype)).masked_fill(~kept.unsqueeze(1), 0.0)
        prototypes = F.embedding(label, self.weight).to(rows.dtype)
        loss = torch.where(kept, self._distances(rows, prototypes, label, kept), 0.0)
        if self.reduction == "none":
            return loss
        loss = loss.sum() if self.reduction == "sum" else loss.sum() / kept.sum().clamp(min=1)
        return loss + self.separation * self._likeness().to(loss.dtype) if self.separation else loss

    def _distances(self, rows: Tensor, prototypes: Tensor, label: Tensor, kept: Tensor) -> Tensor:
        if self.distance == "cosine":
            return 1 - (unit_rows(rows) * unit_rows(prototypes)).sum(1)
        if self.center_update == "gradient":
            return (rows - prototypes).square().sum(1)
        count = torch.zeros(self.num_classes, dtype=rows.dtype, device=rows.device)
        count = count.index_add(0, label, kept.to(rows.dtype))
        # Its value is 0; its gradient is the paper's update, which no reduction divides.
        step = (rows.detach() - prototypes).square().sum(1) / (2 * (1 + count[label]))
        divisor = kept.sum().clamp(min=1) if self.reduction == "mean" else 1
        return (rows - prototypes.detach()).square().sum(1) + (step - step.detach()) * divisor

    def _likeness(self) -> Tensor:
        if self.num_classes < 2:
            return self.weight.sum() * 0
        unit = unit_rows(self.weight.to(compute_dtype(self.weight.dtype)))
        above = (unit @ unit.t() - self.separation_margin).relu()
        pairs = self.num_classes * (self.num_classes - 1)
        return (above.sum() - above.diagonal().sum()) / pairs
