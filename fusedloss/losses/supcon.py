"""Supervised contrastive loss as a module: its settings kept, rows given at each call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusedloss import functional
from fusedloss.core.checks import check_bool, check_number
from fusedloss.functional.supcon_checks import SupConOptions, checked_class_weight
from fusedloss.losses.registered_terms import StepWatch
from fusedloss.losses.settings_repr import SettingsRepr


class SupConLoss(SettingsRepr):
    """Supervised contrastive loss (Khosla et al. 2020, L_out) without N x N similarities: ``fusedloss.supcon`` kept.

    The call of the SupContrast repository's ``SupConLoss`` works: the same three arguments first, ``(B, V, D)``
    features, labels or mask or neither. With `base_temperature` its values are this loss's times
    ``temperature / base_temperature``; docs/supcon.md lists where its mean, and pytorch-metric-learning's, differ.

    Args:
        temperature: T, a positive number.
        contrast_mode: ``"all"`` views are anchors, or ``"one"``: the first.
        base_temperature: multiplies the loss by ``temperature / base_temperature``; None leaves it as it is.
        normalize: scale each row to length 1 first.
        reduction, class_weight, class_balance, ignore_index, prototype_weight, focal_gamma: as in
            ``fusedloss.supcon``.
        learn_temperature: T starts at `temperature` and is a parameter, by its logarithm, as in CLIP.

    Shape:
        features ``(B, D)`` or ``(B, V, D)``; labels ``(B,)``; mask ``(B, B)``; prototypes ``(P, D)``; contrast
        ``(Q, D)``. Returns a scalar, or ``(V * B,)`` with ``reduction="none"``.

    Example:
        >>> import torch, fusedloss
        >>> criterion = fusedloss.SupConLoss(temperature=0.07)
        >>> features = torch.nn.functional.normalize(torch.ones(4, 2, 8), dim=2)
        >>> criterion(features, torch.tensor([0, 1, 0, 1]))
        tensor(1.9459)
    """

    class_weight: Tensor | None

    def __init__(
        self,
        temperature: float = 0.1,
        contrast_mode: str = "all",
        base_temperature: float | None = None,
        normalize: bool = True,
        *,
        reduction: str = "mean",
        class_weight: Tensor | None = None,
        class_balance: bool = False,
        ignore_index: int = -100,
        prototype_weight: float = 1.0,
        focal_gamma: float = 0.0,
        learn_temperature: bool = False,
    ) -> None:
        super().__init__()
        SupConOptions(
            normalize, reduction, class_balance, ignore_index, contrast_mode, prototype_weight, focal_gamma
        ).check()
        self.learn_temperature = check_bool("learn_temperature", learn_temperature)
        self.fixed_temperature = check_number("temperature", temperature, above=0.0)
        self.log_temperature = nn.Parameter(torch.tensor(float(temperature)).log()) if learn_temperature else None
        if base_temperature is not None:
            check_number("base_temperature", base_temperature, above=0.0)
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature
        self.normalize = normalize
        self.reduction = reduction
        self.register_buffer("class_weight", None if class_weight is None else checked_class_weight(class_weight))
        self.class_balance = class_balance
        self.ignore_index = ignore_index
        self.prototype_weight = prototype_weight
        self.focal_gamma = focal_gamma
        self._step_watch = StepWatch()

    @property
    def temperature(self) -> float | Tensor:
        """T as it is now."""
        return self.fixed_temperature if self.log_temperature is None else self.log_temperature.exp()

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        prototypes: Tensor | None = None,
        prototype_labels: Tensor | None = None,
        prototype_bias: Tensor | None = None,
        contrast: Tensor | None = None,
        contrast_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of `features`; see the class for shapes and ``fusedloss.supcon`` for meanings."""
        if not torch.compiler.is_compiling():
            self._step_watch.look(self)
        temperature = self.temperature
        loss = functional.supcon(
            features,
            labels,
            mask=mask,
            temperature=temperature,
            normalize=self.normalize,
            reduction=self.reduction,
            class_weight=self.class_weight,
            prototypes=prototypes,
            prototype_labels=prototype_labels,
            class_balance=self.class_balance,
            ignore_index=self.ignore_index,
            contrast=contrast,
            contrast_labels=contrast_labels,
            contrast_mode=self.contrast_mode,
            prototype_weight=self.prototype_weight,
            prototype_bias=prototype_bias,
            focal_gamma=self.focal_gamma,
        )
        return loss if self.base_temperature is None else loss * (temperature / self.base_temperature)

    def settings(self) -> dict[str, Any]:
        """T as it was given."""
        return {"temperature": self.fixed_temperature}
