"""One direction per class, owned by a module, and what is done with it beside training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusedloss import functional
from fusedloss.backends.reference.linear_ce import unit_rows
from fusedloss.losses.class_statistics import ClassStatistics
from fusedloss.losses.folding import check_linear
from fusedloss.losses.registered_terms import StepWatch


class CosineWeight(nn.Module):
    """``weight`` ``(K * sub_centers, D)``, of which only directions count; subclasses have ``scale``."""

    @property
    def scale(self) -> Tensor | float:
        """What multiplies the cosines."""
        raise NotImplementedError(f"{type(self).__name__} has no scale")

    def __init__(self, in_features: int, num_classes: int, sub_centers: int = 1) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("num_classes", num_classes), ("sub_centers", sub_centers)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer; got {value!r}")
        self.in_features, self.num_classes, self.sub_centers = in_features, num_classes, sub_centers
        self.weight = nn.Parameter(torch.empty(num_classes * sub_centers, in_features))
        nn.init.xavier_uniform_(self.weight)
        self._step_watch = StepWatch()

    def logits(self, input: Tensor, temperature: float = 1.0) -> Tensor:
        """Scaled cosines ``(B, K)`` over `temperature`, without margin: the scores at inference."""
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0; got {temperature}")
        scale = self.scale / temperature
        return functional.margin_logits(input, self.weight, scale=scale, sub_centers=self.sub_centers)

    @torch.no_grad()
    def export_into(self, linear: nn.Linear) -> nn.Linear:
        """Writes ``scale * w_k / |w_k|`` into a layer (``model.get_classifier()``), and 0 into its bias.

        Its outputs are ``logits`` of unit features; other features have them times their length: the same order.
        """
        check_linear("export_into", linear)
        if self.sub_centers > 1:
            raise ValueError(f"export_into: a layer has one row per class; got sub_centers={self.sub_centers}")
        if tuple(linear.weight.shape) != tuple(self.weight.shape):
            raise ValueError(
                f"linear must have a weight of shape {tuple(self.weight.shape)}; got {tuple(linear.weight.shape)}"
            )
        linear.weight.copy_(unit_rows(self.weight) * self.scale)
        if linear.bias is not None:
            linear.bias.zero_()
        return linear

    @torch.no_grad()
    def init_from(self, statistics: ClassStatistics) -> None:
        """Starts each class seen by `statistics` in the direction of its mean; others stay. In place."""
        mean = statistics.mean
        if tuple(mean.shape) != (self.num_classes, self.in_features):
            raise ValueError(
                f"statistics must be of {self.num_classes} classes and {self.in_features} features; got means of shape "
                f"{tuple(mean.shape)}"
            )
        length = torch.linalg.vector_norm(self.weight, dim=1).mean()
        rows = (unit_rows(mean.to(self.weight)) * length).repeat_interleave(self.sub_centers, 0)
        if self.sub_centers > 1:
            rows += 0.1 * length * unit_rows(torch.randn_like(rows))
        seen = (statistics.count > 0).to(self.weight.device).repeat_interleave(self.sub_centers)
        self.weight.copy_(torch.where(seen.unsqueeze(1), rows, self.weight))

    @torch.no_grad()
    def add_classes(self, count: int, means: Tensor | None = None) -> None:
        """Appends `count` classes after the present ones, in the directions of `means` ``(count, D)`` if given.

        ``weight`` becomes a new parameter: give it to the optimizer again.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"count must be a positive integer; got {count!r}")
        if means is not None and tuple(means.shape) != (count, self.in_features):
            raise ValueError(f"means must have shape ({count}, {self.in_features}); got {tuple(means.shape)}")
        rows = self.weight.new_empty(count * self.sub_centers, self.in_features)
        nn.init.xavier_uniform_(rows)
        if means is not None:
            length = torch.linalg.vector_norm(self.weight, dim=1).mean()
            rows.copy_((unit_rows(means.to(rows)) * length).repeat_interleave(self.sub_centers, 0))
        self.weight = nn.Parameter(torch.cat([self.weight, rows]), self.weight.requires_grad)
        self.num_classes += count

    def extra_repr(self) -> str:
        centers = "" if self.sub_centers == 1 else f", sub_centers={self.sub_centers}"
        return f"in_features={self.in_features}, num_classes={self.num_classes}{centers}"
