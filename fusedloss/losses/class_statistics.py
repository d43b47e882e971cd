"""Running statistics of the features of each class: state that moves in place, without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedloss import ops
from fusedloss.backends import CHECK_VALUES
from fusedloss.core.checks import (
    check_bool,
    check_ignore_index,
    check_integer,
    check_labels,
    check_number,
)
from fusedloss.core.dtypes import compute_dtype
from fusedloss.distributed import reduced_moments
from fusedloss.losses.row_checks import check_feature_rows, check_row_labels
from fusedloss.losses.running_state import add_skipped, register_skipped
from fusedloss.losses.settings_repr import SettingsRepr
from fusedloss.terms.term import readable

# With this many classes to a row of the batch, most classes are absent from it.
_SPARSE_CLASSES = 3


class ClassStatistics(SettingsRepr):
    """Running mean and scatter of the features of each class, in one pass over each batch.

    ``mean_c = 1/n_c Σ f`` and ``scatter_c = 1/n_c Σ |f - mean_c|²`` (population; summed over features), over
    the rows labelled c. A batch that holds the share w of a class's rows (with `momentum`: w = momentum once
    the class has been seen) moves them by
    ``d = mean_batch - mean; mean += w d; scatter = (1 - w) scatter + w scatter_batch + w (1 - w) |d|²``,
    so that classes with one row per batch keep their scatter. A class absent
    from a batch keeps its state; the first batch that holds a class starts it. Rows with a value that is not finite (or
    beyond 2^50) are left out and counted in ``skipped``; on a CPU a warning says so once.

    Args:
        in_features: width D of the features.
        num_classes: number of classes K.
        momentum: weight of the new batch in [0, 1]; None accumulates every row equally and exactly.
        per_feature: also keep ``variance``, the population variance of each feature.
        ignore_index: rows with this label are left out.

    Attributes:
        count: int64 ``(K,)``, rows seen; a class never seen has 0, mean 0 and scatter 0.
        mean: ``(K, D)``, float32 (float64 after ``.double()``; never less, whatever ``.half()`` does).
        scatter: float64 ``(K,)``.
        variance: ``(K, D)`` in the dtype of `mean`, or None.
        skipped: int64 ``()``, rows left out as not finite since this object was built; not in the state dict.

    Raises:
        TypeError, ValueError: sizes below 1, a momentum outside [0, 1].

    Source: Chan, Golub and LeVeque 1983, The American Statistician 37(3).

    Example:
        >>> statistics = ClassStatistics(in_features=2, num_classes=3)
        >>> statistics.update(torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 5.0]]), torch.tensor([1, 1, 2]))
        >>> statistics.mean[1], statistics.scatter
        (tensor([1., 0.]), tensor([0., 1., 0.], dtype=torch.float64))
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor
    variance: Tensor | None
    skipped: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        momentum: float | None = None,
        per_feature: bool = False,
        *,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.in_features = check_integer("in_features", in_features, at_least=1)
        self.num_classes = check_integer("num_classes", num_classes, at_least=1)
        self.momentum = check_momentum(momentum)
        self.per_feature = check_bool("per_feature", per_feature)
        self.ignore_index = check_ignore_index(ignore_index)
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(num_classes, in_features, dtype=torch.float32))
        self.register_buffer("scatter", torch.zeros(num_classes, dtype=torch.float64))
        self.register_buffer("variance", torch.zeros_like(self.mean) if per_feature else None)
        register_skipped(self)

    def update(self, features: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None) -> None:
        """Takes one batch in; with `group`, the batches of all its ranks as one, and all get the same state.

        Args:
            features: ``(B, D)``, float32, float64, bfloat16 or float16; B may be 0. No gradient flows.
            labels: ``(B,)``, int64, int32 or uint8, in [0, K) or `ignore_index`.
            group: a process group whose ranks all call this, each with its share of the batch.

        Raises:
            TypeError, ValueError: dtypes, shapes or devices that do not fit.
            IndexError: a label outside [0, K), on the CPU (on a GPU a device assertion); nothing has changed.

        Example:
            >>> statistics = ClassStatistics(1, 2, momentum=0.5)
            >>> for value in (0.0, 4.0):
            ...     statistics.update(torch.tensor([[value]]), torch.tensor([0]))
            >>> statistics.mean[0].item(), statistics.scatter[0].item()
            (2.0, 4.0)
        """
        self._check(features, labels)
        features, labels = features.detach(), labels.to(torch.int64)
        skipped: Tensor | int
        if group is not None:
            skipped = self._update_all(features, labels, group)
        elif readable(labels) and self.num_classes >= _SPARSE_CLASSES * len(labels):
            skipped = self._update_present(features, labels)
        else:
            skipped = self._take_rows(self._state(), features, labels, self.ignore_index)
        add_skipped(self, skipped)

    def _take_rows(self, state: ops.ClassState, features: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        """Moves a state, this one or a part of it, by rows; returns how many were left out."""
        return ops.update_from_rows(state, self._as_wide(features), labels, ignore_index, self.momentum)

    def _as_wide(self, features: Tensor) -> Tensor:
        """In float64 where the mean is."""
        return features.to(torch.float64) if self.mean.dtype == torch.float64 else features

    def _update_all(self, features: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Takes in the rows of all ranks; returns how many of this rank's were left out."""
        features = self._as_wide(features)
        shift = self.mean.to(compute_dtype(features.dtype))
        batch = ops.class_stats(features, labels, shift, self.count, self.ignore_index, self.per_feature)
        rows = batch.count.clamp(min=1)
        deviation = batch.sum.div_(rows.unsqueeze(1)).double()
        square = batch.square.div_(rows.unsqueeze(1) if self.per_feature else rows).double()
        distance = deviation.square()
        spread = square - (distance if self.per_feature else distance.sum(1))
        self._take_in(*reduced_moments(batch.count, shift.double() + deviation, spread.clamp_(min=0), group))
        return batch.skipped

    def _update_present(self, features: Tensor, labels: Tensor) -> Tensor | int:
        """The same for few rows of many classes: only the classes that the batch holds are read and written."""
        check_labels(labels, self.num_classes, self.ignore_index, "labels")
        kept = labels != self.ignore_index
        if not bool(kept.all()):
            features, labels = features[kept], labels[kept]
        present, labels = labels.unique(return_inverse=True)
        if len(present) == 0:
            return 0
        whole = self._state()
        part = ops.ClassState(*(None if state is None else state[present] for state in whole))  # type: ignore[arg-type]
        skipped = self._take_rows(part, features, labels, -1)
        for state, moved in zip(whole, part, strict=True):
            if state is not None and moved is not None:
                state.index_copy_(0, present, moved)
        return skipped

    @torch.no_grad()
    def merge(self, other: ClassStatistics) -> None:
        """Takes in all rows that `other` has seen, as if they had been seen here; `other` is unchanged.

        Raises:
            TypeError: `other` is no ClassStatistics.
            ValueError: other sizes, or a momentum: a moving average does not say how many rows it stands for.

        Example:
            >>> ours, theirs = ClassStatistics(1, 1), ClassStatistics(1, 1)
            >>> ours.update(torch.tensor([[0.0]]), torch.tensor([0]))
            >>> theirs.update(torch.tensor([[2.0]]), torch.tensor([0]))
            >>> ours.merge(theirs)
            >>> ours.count.item(), ours.mean.item(), ours.scatter.item()
            (2, 1.0, 1.0)
        """
        if not isinstance(other, ClassStatistics):
            raise TypeError(f"other must be a ClassStatistics; got {type(other).__name__}")
        self._check_exact("merge")
        other._check_exact("merge")
        ours, theirs = ((each.num_classes, each.in_features, each.per_feature) for each in (self, other))
        if ours != theirs:
            raise ValueError(f"other must have (num_classes, in_features, per_feature) = {ours}, as here; got {theirs}")
        self._take_in(*(moment.to(self.mean.device, copy=True) for moment in other._moments()))

    @torch.no_grad()
    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Gives every rank of `group` (None: all) the statistics of the rows that any of them has seen.

        For ranks that have each gone through their own share of the data: call it once, at the end. A moving
        average is kept equal over ranks by ``update(..., group=group)`` instead.

        Raises:
            ValueError: a momentum.

        Example:
            ``statistics.all_reduce()`` after the last ``update`` on every rank.
        """
        self._check_exact("all_reduce")
        count, mean, spread = reduced_moments(*self._moments(), group)
        self.reset()
        self._take_in(count, mean, spread)

    @torch.no_grad()
    def reset(self) -> None:
        """Forgets every row.

        Example:
            >>> statistics = ClassStatistics(1, 1)
            >>> statistics.update(torch.ones(3, 1), torch.zeros(3, dtype=torch.int64))
            >>> statistics.reset()
            >>> statistics.count.item()
            0
        """
        for buffer in self.buffers():
            buffer.zero_()

    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        spread = self.scatter if self.variance is None else self.variance
        return self.count, self.mean.double(), spread.double()

    def _take_in(self, count: Tensor, mean: Tensor, spread: Tensor) -> None:
        """Rows given by their own mean and mean squared distance to it, in float64."""
        new = ((self.count == 0) & (count > 0)).unsqueeze(1)
        shift = torch.where(new, mean.to(self.mean.dtype), self.mean)
        deviation = torch.where((count > 0).unsqueeze(1), mean - shift, 0.0)
        distance = deviation.square()
        square = spread + (distance if self.per_feature else distance.sum(1))
        column = count.unsqueeze(1)
        sums, squares = deviation * column, square * (column if self.per_feature else count)
        batch = ops.ClassTensors(count, sums, squares, torch.zeros_like(self.skipped))
        ops.update_class_stats(self._state(), batch, shift.double(), self.momentum)

    def _state(self) -> ops.ClassState:
        return ops.ClassState(self.count, self.mean, self.scatter, self.variance)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClassStatistics:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, moved in list(self.named_buffers(recurse=False)):
            if name in ("count", "skipped"):
                dtype = torch.int64
            elif name == "scatter" or moved.dtype == torch.float64:
                dtype = torch.float64
            else:
                dtype = torch.float32
            if moved.dtype != dtype:
                self._buffers[name] = before[name].to(moved.device, dtype)
        return self

    def _check(self, features: Tensor, labels: Tensor) -> None:
        check_feature_rows(features, self.in_features, self.mean)
        check_row_labels(labels, features)
        if CHECK_VALUES:
            check_labels(labels, self.num_classes, self.ignore_index)

    def _check_exact(self, method: str) -> None:
        if self.momentum is not None:
            raise ValueError(
                f"momentum must be None for {method}(), for a moving average does not say how many rows it stands for "
                f"(update(..., group=...) keeps one equal over ranks); got {self.momentum}"
            )


def check_momentum(momentum: Any) -> float | None:
    """The weight of a new batch, or None for equal weights of all rows."""
    return None if momentum is None else float(check_number("momentum", momentum, at_least=0.0, at_most=1.0))
