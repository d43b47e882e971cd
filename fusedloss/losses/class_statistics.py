"""Running statistics of features, by class and of row norms: state that moves in place, without gradients."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusedloss import ops
from fusedloss.backends import CHECK_VALUES
from fusedloss.backends.reference.class_stats import check_labels
from fusedloss.terms.term import readable

_FEATURE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LABEL_DTYPES = (torch.int64, torch.int32, torch.uint8)
# With this many classes to a row of the batch, most classes are absent from it.
_SPARSE_CLASSES = 3
# Elements of a buffer that stays in the second-level cache.


class ClassStatistics(nn.Module):
    """Running mean and scatter of the features of each class, in one pass over each batch.

    ``mean_c = 1/n_c Σ f`` and ``scatter_c = 1/n_c Σ |f - mean_c|²`` (population; summed over features), over
    the rows labelled c. A batch that holds the share w of a class's rows (with `momentum`: w = momentum once
    the class has been seen) moves them by
    ``d = mean_batch - mean; mean += w d; scatter = (1 - w) scatter + w scatter_batch + w (1 - w) |d|²``,
    so that classes with one row per batch keep their scatter (Chan, Golub and LeVeque, 1983). A class absent
    from a batch keeps its state; the first batch that holds a class starts it.

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

    Raises:
        TypeError, ValueError: sizes below 1, a momentum outside [0, 1].

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

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        momentum: float | None = None,
        per_feature: bool = False,
        *,
        ignore_index: int = -100,
    ):
        super().__init__()
        self.in_features = _checked_size("in_features", in_features)
        self.num_classes = _checked_size("num_classes", num_classes)
        self.momentum = _checked_momentum(momentum)
        self.per_feature = per_feature
        self.ignore_index = ignore_index
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(num_classes, in_features, dtype=torch.float32))
        self.register_buffer("scatter", torch.zeros(num_classes, dtype=torch.float64))
        self.register_buffer("variance", torch.zeros_like(self.mean) if per_feature else None)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, momentum={self.momentum}, "
            f"per_feature={self.per_feature}"
        )

    @torch.no_grad()
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
        if group is None and self.num_classes >= _SPARSE_CLASSES * len(labels) and readable(labels):
            self._update_present(features, labels)
            return
        if self.mean.dtype == torch.float64:
            features = features.to(torch.float64)
        shift = self.mean.to(ops.compute_dtype(features.dtype))
        found = ops.class_stats(features, labels, shift, self.count, self.ignore_index, self.per_feature)
        if group is None:
            ops.advance(self._state(), found, shift, self.momentum)
            return
        rows = found.count.clamp(min=1)
        deviation = found.sum.div_(rows.unsqueeze(1)).double()
        square = found.square.div_(rows.unsqueeze(1) if self.per_feature else rows).double()
        distance = deviation.square()
        spread = square - (distance if self.per_feature else distance.sum(1))
        self._take_in(*_all_reduced(found.count, shift.double() + deviation, spread.clamp_(min=0), group))

    def _update_present(self, features: Tensor, labels: Tensor) -> None:
        """The same for few rows of many classes: only the classes that the batch holds are read and written."""
        check_labels(labels, self.num_classes, self.ignore_index, "labels")
        kept = labels != self.ignore_index
        if not bool(kept.all()):
            features, labels = features[kept], labels[kept]
        present, labels = labels.unique(return_inverse=True)
        if len(present) == 0:
            return
        part = ClassStatistics(self.in_features, len(present), self.momentum, self.per_feature)
        for name, state in self.named_buffers():
            setattr(part, name, state[present])
        part.update(features, labels)
        for name, state in self.named_buffers():
            state.index_copy_(0, present, getattr(part, name))

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
            raise TypeError(f"other: got {type(other).__name__}; allowed is ClassStatistics")
        self._check_exact("merge")
        other._check_exact("merge")
        ours, theirs = ((each.num_classes, each.in_features, each.per_feature) for each in (self, other))
        if ours != theirs:
            raise ValueError(
                f"other: got (num_classes, in_features, per_feature) = {theirs}; allowed is {ours}, as here"
            )
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
        count, mean, spread = _all_reduced(*self._moments(), group)
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
        found = ops.ClassTensors(count, deviation * column, square * (column if self.per_feature else count))
        ops.advance(self._state(), found, shift, self.momentum)

    def _state(self) -> ops.ClassState:
        return ops.ClassState(self.count, self.mean, self.scatter, self.variance)

    def _apply(self, fn, recurse=True):
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, moved in list(self.named_buffers(recurse=False)):
            if name == "count":
                dtype = torch.int64
            elif name == "scatter" or moved.dtype == torch.float64:
                dtype = torch.float64
            else:
                dtype = torch.float32
            if moved.dtype != dtype:
                self._buffers[name] = before[name].to(moved.device, dtype)
        return self

    def _check(self, features: Tensor, labels: Tensor) -> None:
        _check_features(features, labels)
        if features.shape[1] != self.in_features:
            raise ValueError(
                f"features: got shape {tuple(features.shape)}; allowed is (B, in_features={self.in_features})"
            )
        if features.device != self.mean.device:
            raise ValueError(f"features: got device {features.device}; allowed is the statistics', {self.mean.device}")
        if CHECK_VALUES:
            check_labels(labels, self.num_classes, self.ignore_index)

    def _check_exact(self, method: str) -> None:
        if self.momentum is not None:
            raise ValueError(
                f"{method}: got momentum={self.momentum}; allowed is None, for a moving average does not say "
                "how many rows it stands for (update(..., group=...) keeps one equal over ranks)"
            )


class NormStatistics(nn.Module):
    """Running mean and population deviation of the norms of feature rows: ``s_i = |f_i|_p``.

    The first batch starts both; later ones move them as in `ClassStatistics`; a batch of one row is fine.

    Args:
        momentum: weight of the new batch in [0, 1]; None accumulates every row equally.
        norm: p, at least 1 or ``math.inf``; 1 is FeDLaS's.
        ignore_index: rows with this label are left out.

    Attributes:
        count, mean, deviation: 0-dim; rows seen (int64), mean (float32) and deviation (float64) of norms.

    Raises:
        TypeError, ValueError: a momentum outside [0, 1], a norm below 1.

    Example:
        >>> statistics = NormStatistics(momentum=0.5)
        >>> statistics.update(torch.tensor([[1.0, -1.0], [3.0, 1.0]]))
        >>> statistics.mean, statistics.deviation
        (tensor(3.), tensor(1., dtype=torch.float64))
    """

    def __init__(self, momentum: float | None = 0.5, *, norm: float = 1.0, ignore_index: int = -100):
        super().__init__()
        if not norm >= 1.0:
            raise ValueError(f"norm: got {norm}; allowed are 1 and above, and math.inf")
        self.norm = float(norm)
        self.ignore_index = ignore_index
        self.statistics = ClassStatistics(1, 1, momentum)

    @property
    def momentum(self) -> float | None:
        return self.statistics.momentum

    @property
    def count(self) -> Tensor:
        return self.statistics.count[0]

    @property
    def mean(self) -> Tensor:
        return self.statistics.mean[0, 0]

    @property
    def deviation(self) -> Tensor:
        return self.statistics.scatter[0].sqrt()

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, norm={self.norm}"

    def row_norms(self, features: Tensor) -> Tensor:
        """The norm of each row, ``(B,)`` in float32 (float64 for float64 features).

        Example:
            >>> NormStatistics().row_norms(torch.tensor([[1.0, -2.0]]))
            tensor([3.])
        """
        dtype = ops.compute_dtype(features.dtype)
        if self.norm == 1 and not (features.requires_grad and torch.is_grad_enabled()):
            return ops.row_magnitudes(features)
        return torch.linalg.vector_norm(features, self.norm, dim=1, dtype=dtype)

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor | None = None, group: dist.ProcessGroup | None = None) -> None:
        """Takes one batch in; rows labelled `ignore_index` are left out, and labels serve nothing else.

        Args:
            features: ``(B, D)``; B may be 0, D may change.
            labels: int64, int32 or uint8 ``(B,)``, or None.
            group: a process group whose ranks all call this, each with its share of the batch.

        Raises:
            TypeError, ValueError: dtypes or shapes that do not fit.

        Example:
            >>> statistics = NormStatistics()
            >>> statistics.update(torch.ones(2, 4), torch.tensor([0, -100]))
            >>> statistics.count.item()
            1
        """
        _check_features(features, labels)
        self.update_values(self.row_norms(features.detach()), labels, group)

    @torch.no_grad()
    def update_values(
        self, values: Tensor, labels: Tensor | None = None, group: dist.ProcessGroup | None = None
    ) -> None:
        """Takes in one number per row, ``(B,)``: norms at hand, or another indicator; otherwise as `update`.

        Example:
            >>> statistics = NormStatistics()
            >>> statistics.update_values(torch.tensor([-1.0, 3.0]))
            >>> statistics.mean
            tensor(1.)
        """
        column = values.unsqueeze(1)
        _check_features(column, labels)
        if group is None and readable(values):
            self._take_in(*ops.moments(values, labels, self.ignore_index).tolist())
            return
        one_class = torch.zeros(len(values), dtype=torch.int64, device=values.device)
        if labels is not None:
            one_class.masked_fill_(labels == self.ignore_index, self.statistics.ignore_index)
        self.statistics.update(column, one_class, group)

    def reset(self) -> None:
        """Forgets every row.

        Example:
            >>> NormStatistics().reset()
        """
        self.statistics.reset()

    def numbers(self) -> tuple[int, float, float]:
        """Count, mean and deviation as plain numbers; waits for the device.

        Example:
            >>> NormStatistics().numbers()
            (0, 0.0, 0.0)
        """
        state = self.statistics
        return int(state.count.item()), state.mean.item(), math.sqrt(state.scatter.item())

    def _take_in(self, rows: float, batch_mean: float, batch_variance: float) -> None:
        """Moves the state as `ClassStatistics` does, in plain numbers: on tensors of one element it takes longer."""
        if rows == 0:
            return
        state = self.statistics
        seen, mean, variance = state.count.item(), state.mean.item(), state.scatter.item()
        weight = rows / (seen + rows) if seen == 0 or self.momentum is None else self.momentum
        distance = batch_mean - mean
        step = weight * (batch_variance + (1 - weight) * distance * distance - variance)
        state.scatter.fill_(max(variance + step, 0.0))
        state.mean.fill_(mean + weight * distance)
        state.count.fill_(int(seen + rows))


def _all_reduced(
    count: Tensor, mean: Tensor, spread: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The moments of all ranks' rows: first their common mean, then the spread about it; all in float64."""
    present = (count > 0).unsqueeze(1)
    rows = count.double().unsqueeze(1)
    packed = torch.cat([rows, torch.where(present, mean, 0.0) * rows], dim=1)
    dist.all_reduce(packed, group=group)
    all_rows = packed[:, :1].clamp(min=1)
    common = packed[:, 1:] / all_rows
    distance = torch.where(present, mean - common, 0.0).square()
    if spread.dim() == 1:
        distance, rows, all_rows = distance.sum(1), rows.squeeze(1), all_rows.squeeze(1)
    total = (spread + distance) * rows
    dist.all_reduce(total, group=group)
    return packed[:, 0].to(torch.int64), common, total / all_rows


def _check_features(features: Tensor, labels: Tensor | None) -> None:
    if not isinstance(features, Tensor) or features.dtype not in _FEATURE_DTYPES:
        raise TypeError(f"features: got {_kind(features)}; allowed: float32, float64, bfloat16, float16")
    if features.dim() != 2:
        raise ValueError(f"features: got shape {tuple(features.shape)}; allowed is (B, D)")
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.dtype not in _LABEL_DTYPES:
        raise TypeError(f"labels: got {_kind(labels)}; allowed are int64, int32 and uint8 tensors")
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}; allowed is (B,) = ({len(features)},)")
    if labels.device != features.device:
        raise ValueError(f"labels: got device {labels.device}; allowed is features', {features.device}")


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _checked_size(name: str, size: int) -> int:
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{name}: got {size!r}; allowed are integers of at least 1")
    if size < 1:
        raise ValueError(f"{name}: got {size}; allowed are integers of at least 1")
    return size


def _checked_momentum(momentum: float | None) -> float | None:
    if momentum is None:
        return None
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)):
        raise TypeError(f"momentum: got {momentum!r}; allowed are None and numbers in [0, 1]")
    if math.isnan(momentum) or not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum: got {momentum}; allowed are None and numbers in [0, 1]")
    return float(momentum)
