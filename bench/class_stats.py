"""Cases of class statistics: what is timed, and the two-pass PyTorch formula it is timed against."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import roofline
from bench.cases import Case, Contest, Mismatch, compiled
from fusedloss.losses.class_statistics import ClassStatistics


@dataclass(frozen=True)
class Batch:
    """One batch: uniform labels, labels in order, or nine rows in ten in one class."""

    rows: int
    width: int
    num_classes: int
    labels: str = "uniform"
    dtype: torch.dtype = torch.float32

    @property
    def bytes_read(self) -> int:
        """The floor of the traffic: each feature once."""
        return self.rows * self.width * self.dtype.itemsize

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(self.rows, self.width, generator=generator).to(self.dtype)
        labels = torch.randint(self.num_classes, (self.rows,), generator=generator)
        if self.labels == "sorted":
            labels = labels.sort().values
        elif self.labels == "skewed":
            labels[torch.rand(self.rows, generator=generator) < 0.9] = 0
        return features, labels


BATCHES = (
    Batch(65536, 1024, 1000),
    Batch(65536, 1024, 1000, "sorted"),
    Batch(65536, 1024, 1000, "skewed"),
    Batch(65536, 1024, 1000, dtype=torch.bfloat16),
    Batch(65536, 256, 100),
    Batch(4096, 512, 1000),
    Batch(256, 512, 100),
)


def eager_two_pass(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, scatter) of one batch: ``index_add_`` for the means, then for the distances to them."""
    width = features.shape[1]
    count = torch.bincount(labels, minlength=num_classes)
    rows = count.clamp(min=1)
    mean = torch.zeros(num_classes, width).index_add_(0, labels, features.float()) / rows.unsqueeze(1)
    distance = (features.float() - mean[labels]).square().sum(1)
    scatter = torch.zeros(num_classes).index_add_(0, labels, distance) / rows
    return count, mean, scatter


def eager_moments(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, scatter) as ``E f² - |E f|²``: one pass, and wrong where the mean is far from zero."""
    width = features.shape[1]
    count = torch.bincount(labels, minlength=num_classes)
    rows = count.clamp(min=1)
    mean = torch.zeros(num_classes, width).index_add_(0, labels, features.float()) / rows.unsqueeze(1)
    square = torch.zeros(num_classes).index_add_(0, labels, features.float().square().sum(1)) / rows
    return count, mean, square - mean.square().sum(1)


def prepare(batch: Batch) -> Contest:
    """Two batches, which repetitions alternate between; ``fused`` merges into statistics it already has."""
    inputs = [batch.inputs(seed) for seed in range(2)]
    features, labels = (tensor.clone() for tensor in inputs[0])
    statistics = ClassStatistics(batch.width, batch.num_classes)
    statistics.update(*inputs[1])
    rivals: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
        "eager": eager_two_pass,
        "one pass": eager_moments,
        "compiled": compiled(eager_two_pass),
    }

    def refill(repetition: int) -> None:
        features.copy_(inputs[repetition % 2][0])
        labels.copy_(inputs[repetition % 2][1])

    calls: dict[str, Callable[[], object]] = {"fused": lambda: statistics.update(features, labels)}
    for name, rival in rivals.items():
        calls[name] = functools.partial(rival, features, labels, batch.num_classes)
    return Contest(
        calls=calls,
        limit=roofline.read_of(features),
        refill=refill,
        check=lambda: _check(batch, rivals, *inputs[0]),
    )


def _check(batch: Batch, rivals: dict[str, Callable], features: Tensor, labels: Tensor) -> None:
    """Counts, means and scatters of a batch, against the two passes in float64."""
    statistics = ClassStatistics(batch.width, batch.num_classes)
    statistics.update(features, labels)
    found = {"fused": (statistics.count, statistics.mean, statistics.scatter)}
    found |= {name: rival(features, labels, batch.num_classes) for name, rival in rivals.items()}
    count = torch.bincount(labels, minlength=batch.num_classes)
    rows = count.clamp(min=1).double()
    wide = features.double()
    mean = torch.zeros(batch.num_classes, batch.width, dtype=torch.float64).index_add_(0, labels, wide)
    mean /= rows.unsqueeze(1)
    distance = wide.sub_(mean[labels]).square_().sum(1)
    scatter = torch.zeros_like(rows).index_add_(0, labels, distance) / rows
    errors = {
        name: (
            float((values[0] - count).abs().max()),
            float((values[1] - mean).abs().max()),
            float((values[2] / scatter - 1).abs()[count > 1].max()),
        )
        for name, values in found.items()
    }
    for name, error in errors.items():
        if not all(got <= least + 1e-5 for got, least in zip(error, errors["eager"], strict=True)):
            raise Mismatch(f"{name} is {error} from float64 in count, mean and scatter, eager {errors['eager']}")


def _case(batch: Batch) -> Case:
    whole = (batch.rows, batch.width) == (65536, 1024) and batch.dtype == torch.float32
    return Case(
        operation="class_stats",
        title="ClassStatistics",
        shape=(batch.rows, batch.width),
        dtype=batch.dtype,
        moved=batch.bytes_read,
        limit="read",
        prepare=functools.partial(prepare, batch),
        variant=f"{batch.num_classes} classes {batch.labels}",
        targets={"eager": 15.0, "share": 0.38} if whole else {},
        quick=batch.rows <= 4096,
    )


CASES = tuple(_case(batch) for batch in BATCHES)
