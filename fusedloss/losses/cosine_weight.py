"""One direction per class, owned by a module, and what is done with it apart from training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusedloss import functional
from fusedloss.core.checks import check_integer, check_number, check_tensor
from fusedloss.core.normalize import unit_rows
from fusedloss.losses.class_statistics import ClassStatistics
from fusedloss.losses.folding import check_linear
from fusedloss.losses.registered_terms import StepWatch
from fusedloss.losses.settings_repr import SettingsRepr
from fusedloss.terms.term import readable


class CosineWeight(SettingsRepr):
    """``weight`` ``(K * sub_centers, D)``, of which only directions count; subclasses have ``scale``."""

    @property
    def scale(self) -> Tensor | float:
        """What multiplies the cosines."""
        raise NotImplementedError(f"{type(self).__name__} has no scale")

    def __init__(self, in_features: int, num_classes: int, sub_centers: int = 1) -> None:
        super().__init__()
        self.in_features = check_integer("in_features", in_features, at_least=1)
        self.num_classes = check_integer("num_classes", num_classes, at_least=1)
        self.sub_centers = check_integer("sub_centers", sub_centers, at_least=1)
        self.weight = nn.Parameter(torch.empty(self.num_classes * self.sub_centers, self.in_features))
        nn.init.xavier_uniform_(self.weight)
        self._step_watch = StepWatch()

    def logits(self, input: Tensor, temperature: float = 1.0) -> Tensor:
        """Scaled cosines ``(B, K)`` over `temperature`, without margin: the scores at inference."""
        check_number("temperature", temperature, above=0.0)
        scale = self.scale / temperature
        return functional.margin_logits(input, self.weight, scale=scale, sub_centers=self.sub_centers)

    @torch.no_grad()
    def export_into(self, linear: nn.Linear) -> nn.Linear:
        """Writes ``scale * w_k / |w_k|`` into a layer (``model.get_classifier()``), and 0 into its bias.

        Its outputs are ``logits`` of unit features; other features have them times their length: the same order.
        """
        check_linear("export_into", linear)
        if self.sub_centers > 1:
            raise ValueError(
                f"sub_centers must be 1 for export_into(): a layer has one row per class; got {self.sub_centers}"
            )
        if tuple(linear.weight.shape) != tuple(self.weight.shape):
            raise ValueError(
                f"linear must have a weight of shape {tuple(self.weight.shape)}; got {tuple(linear.weight.shape)}"
            )
        # In float64: the layer may hold more digits than this weight does.
        linear.weight.copy_(unit_rows(self.weight.double()) * self.scale)
        if linear.bias is not None:
            linear.bias.zero_()
        return linear

    @torch.no_grad()
    def init_from(self, statistics: ClassStatistics) -> None:
        """Starts each class seen by `statistics` in the direction of its mean; others stay. In place."""
        if not isinstance(statistics, ClassStatistics):
            raise TypeError(f"statistics must be a ClassStatistics; got {type(statistics).__name__}")
        mean = statistics.mean
        if tuple(mean.shape) != (self.num_classes, self.in_features):
            raise ValueError(
                f"statistics must be of {self.num_classes} classes and {self.in_features} features; got means of shape "
                f"{tuple(mean.shape)}"
            )
        rows = self._rows_towards(mean)
        if self.sub_centers > 1:
            rows += 0.1 * self._length() * unit_rows(torch.randn_like(rows))
        seen = (statistics.count > 0).to(self.weight.device).repeat_interleave(self.sub_centers)
        self.weight.copy_(torch.where(seen.unsqueeze(1), rows, self.weight))

    @torch.no_grad()
    def add_classes(self, count: int, means: Tensor | None = None) -> None:
        """Appends `count` classes after the present ones, in the directions of `means` ``(count, D)`` if given.

        ``weight`` becomes a new parameter: give it to the optimizer again.
        """
        count = check_integer("count", count, at_least=1)
        if means is not None:
            check_tensor("means", means, (count, self.in_features))
        rows = self.weight.new_empty(count * self.sub_centers, self.in_features)
        nn.init.xavier_uniform_(rows)
        if means is not None:
            rows.copy_(self._rows_towards(means))
        self.weight = nn.Parameter(torch.cat([self.weight, rows]), self.weight.requires_grad)
        self.num_classes += count

    def _length(self) -> Tensor:
        """The mean length of a row."""
        lengths: Tensor = torch.linalg.vector_norm(self.weight, dim=1, dtype=torch.float64)
        return lengths.mean()

    def _rows_towards(self, means: Tensor) -> Tensor:
        """Rows of the weight's mean length, `sub_centers` for each row of `means`, in float64."""
        directions = unit_rows(means.to(self.weight.device, torch.float64))
        return (directions * self._length()).repeat_interleave(self.sub_centers, 0)


def check_scale(scale: Tensor | float) -> None:
    """Raises unless what multiplies cosines is above 0; a tensor's values are read on the CPU alone."""
    if not isinstance(scale, Tensor):
        check_number("scale", scale, above=0.0)
    elif readable(scale) and not bool((scale.detach() > 0).all()):
        raise ValueError("scale must be above 0; got a tensor with a value that is not")
