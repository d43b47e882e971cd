"""Running statistics of one number per row, such as the norm of its features."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fusedloss import ops
from fusedloss.core.checks import check_ignore_index, check_integer_tensor, check_tensor
from fusedloss.core.dtypes import compute_dtype
from fusedloss.losses.class_statistics import ClassStatistics, all_reduced, check_feature_rows
from fusedloss.losses.running_state import add_skipped
from fusedloss.losses.settings_repr import SettingsRepr
from fusedloss.terms.term import readable


class NormMoments(NamedTuple):
    """Count, mean and variance of the values seen, and the values left out of a batch: plain numbers or tensors ``()``.

    Numbers where the values lie on the CPU: on tensors of one element each step takes longer.
    """

    count: Tensor | float  # type: ignore[assignment]  # tuple has a method of this name
    mean: Tensor | float
    variance: Tensor | float
    skipped: Tensor | int = 0

    def standardized(self, values: Tensor, least_deviation: float) -> Tensor:
        """``(values - mean) / (deviation + least_deviation)``; 0 before any statistics, and where it is not finite."""
        if isinstance(self.variance, Tensor):
            assert isinstance(self.mean, Tensor)
            mean, deviation = self.mean.to(values.dtype), self.variance.sqrt().to(values.dtype)
            distance = torch.where(
                torch.as_tensor(self.count) > 0, (values - mean) / (deviation + least_deviation), 0.0
            )
        elif self.count > 0:
            distance = (values - self.mean) / (math.sqrt(self.variance) + least_deviation)
        else:
            return torch.zeros_like(values)
        return torch.nan_to_num(distance, 0.0, 0.0, 0.0)


class NormStatistics(SettingsRepr):
    """Running mean and population deviation of the norms of feature rows: ``s_i = |f_i|_p``.

    The first batch starts both; later ones move them as in `ClassStatistics`; a batch of one row is fine. Rows whose
    norm is not finite (or beyond 2^50) are left out and counted in ``skipped``; on a CPU a warning says so once.

    Args:
        momentum: weight of the new batch in [0, 1]; None accumulates every row equally.
        norm: p, at least 1 or ``math.inf``; 1 is FeDLaS's.
        ignore_index: rows with this label are left out.

    Attributes:
        count, mean, deviation: 0-dim; rows seen (int64), mean (float32) and deviation (float64) of norms.
        skipped: int64 ``()``, rows left out as not finite since this object was built; not in the state dict.

    Raises:
        TypeError, ValueError: a momentum outside [0, 1], a norm below 1.

    Example:
        >>> statistics = NormStatistics(momentum=0.5)
        >>> statistics.update(torch.tensor([[1.0, -1.0], [3.0, 1.0]]))
        >>> statistics.mean, statistics.deviation
        (tensor(3.), tensor(1., dtype=torch.float64))
    """

    def __init__(self, momentum: float | None = 0.5, *, norm: float = 1.0, ignore_index: int = -100) -> None:
        super().__init__()
        if isinstance(norm, bool) or not isinstance(norm, (int, float)):
            raise TypeError(f"norm must be a number; got {type(norm).__name__}")
        if not norm >= 1.0:
            raise ValueError(f"norm must be at least 1, or math.inf; got {norm}")
        self.norm = float(norm)
        self.ignore_index = check_ignore_index(ignore_index)
        # One class whose only feature is the norm: its buffers are those of the state dict.
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

    @property
    def skipped(self) -> Tensor:
        return self.statistics.skipped

    def row_norms(self, features: Tensor) -> Tensor:
        """The norm of each row, ``(B,)`` in float32 (float64 for float64 features).

        Example:
            >>> NormStatistics().row_norms(torch.tensor([[1.0, -2.0]]))
            tensor([3.])
        """
        check_feature_rows(features, None)
        transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
        if self.norm == 1 and not transformed and not (features.requires_grad and torch.is_grad_enabled()):
            return ops.row_magnitudes(features)
        norms: Tensor = torch.linalg.vector_norm(features, self.norm, dim=1, dtype=compute_dtype(features.dtype))
        return norms

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
        check_feature_rows(features, labels)
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
        self.store(self.moved(values, labels, group))

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

    def current(self) -> NormMoments:
        """The state, as `moved` returns it."""
        state = self.statistics
        if readable(state.mean):
            return NormMoments(state.count.item(), state.mean.item(), state.scatter.item())
        return NormMoments(state.count[0], state.mean[0, 0], state.scatter[0])

    @torch.no_grad()
    def moved(
        self, values: Tensor, labels: Tensor | None = None, group: dist.ProcessGroup | None = None
    ) -> NormMoments:
        """What the state is after `values`, for `store`; nothing has changed yet."""
        check_tensor("values", values, ("B",), like=self.statistics.mean, of="the statistics")
        if labels is not None:
            check_integer_tensor("labels", labels, (values.shape[0],))
        batch = ops.moments(values, labels, self.ignore_index)
        if group is None and readable(batch):
            return self._moved_numbers(*batch.tolist())
        count, mean, variance, skipped = batch.unbind()
        if group is not None:
            count, mean, variance = _reduced(count, mean, variance, group)
        return self._moved_tensors(count, mean, variance, skipped.to(torch.int64))

    @torch.no_grad()
    def store(self, moments: NormMoments) -> None:
        """Makes what `moved` returned the state."""
        state = self.statistics
        add_skipped(state, moments.skipped, "norms")
        for buffer, value in (
            (state.count, moments.count),
            (state.mean, moments.mean),
            (state.scatter, moments.variance),
        ):
            if isinstance(value, Tensor):
                buffer.copy_(value)
            else:
                buffer.fill_(value)

    def _moved_numbers(self, rows: float, batch_mean: float, batch_variance: float, skipped: float) -> NormMoments:
        state = self.statistics
        seen, mean, variance = state.count.item(), state.mean.item(), state.scatter.item()
        if rows == 0:
            return NormMoments(seen, mean, variance, int(skipped))
        weight = rows / (seen + rows) if seen == 0 or self.momentum is None else self.momentum
        distance = batch_mean - mean
        step = weight * (batch_variance + (1 - weight) * distance * distance - variance)
        mean += weight * distance
        if state.mean.dtype == torch.float32:
            # As it is stored: a forward that is repeated reads the same number.
            mean = struct.unpack("f", struct.pack("f", mean))[0]
        return NormMoments(int(seen + rows), mean, max(variance + step, 0.0), int(skipped))

    def _moved_tensors(self, rows: Tensor, batch_mean: Tensor, batch_variance: Tensor, skipped: Tensor) -> NormMoments:
        state = self.statistics
        seen, mean, variance = state.count[0], state.mean[0, 0].double(), state.scatter[0]
        total = seen + rows
        share = rows / total.clamp(min=1)
        weight = share if self.momentum is None else torch.where(seen == 0, share, self.momentum * (rows > 0))
        distance = batch_mean - mean
        step = weight * (batch_variance + (1 - weight) * distance * distance - variance)
        moved = (mean + weight * distance).to(state.mean.dtype)
        return NormMoments(total.to(torch.int64), moved, (variance + step).clamp(min=0), skipped)


def _reduced(count: Tensor, mean: Tensor, variance: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """The moments of all ranks' values."""
    count, means, variances = all_reduced(count.reshape(1), mean.reshape(1, 1), variance.reshape(1), group)
    return count[0].double(), means[0, 0], variances[0]
