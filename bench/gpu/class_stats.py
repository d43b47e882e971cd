"""Sums by class over frozen features: each read once."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bench.cases import compiled
from bench.gpu import Case, Contest, agree
from fusedloss.losses.class_statistics import ClassStatistics


def eager_two_pass(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean and scatter of each class: ``index_add_`` for the means, then for the distances to them."""
    rows = torch.bincount(labels, minlength=num_classes).clamp(min=1)
    wide = features.new_zeros(num_classes, features.shape[1], dtype=torch.float32)
    mean = wide.index_add_(0, labels, features.float()) / rows.unsqueeze(1)
    distance = (features.float() - mean[labels]).square().sum(1)
    return mean, distance.new_zeros(num_classes).index_add_(0, labels, distance) / rows


def prepare(device: torch.device, rows: int, width: int, num_classes: int, skewed: bool) -> Contest:
    generator = torch.Generator(device=device).manual_seed(0)
    features = torch.randn(rows, width, generator=generator, device=device, dtype=torch.bfloat16)
    labels = torch.randint(num_classes, (rows,), generator=generator, device=device)
    if skewed:
        labels[torch.rand(rows, generator=generator, device=device) < 0.9] = 0
    statistics = ClassStatistics(width, num_classes).to(device)
    rivals = {"eager": eager_two_pass, **({"compiled": compiled(eager_two_pass)} if device.type == "cuda" else {})}

    def check() -> list[str]:
        fresh = ClassStatistics(width, num_classes).to(device)
        fresh.update(features, labels)
        found = {name: rival(features, labels, num_classes) for name, rival in rivals.items()}
        found["fused"] = (fresh.mean, fresh.scatter)
        some = labels < 8
        wide, mine = features[some].double(), labels[some]
        count = torch.bincount(mine, minlength=8).clamp(min=1).double()
        mean = wide.new_zeros(8, width).index_add_(0, mine, wide) / count.unsqueeze(1)
        distance = (wide - mean[mine]).square().sum(1)
        scatter = distance.new_zeros(8).index_add_(0, mine, distance) / count
        return agree({name: tuple(value[:8] for value in pair) for name, pair in found.items()}, (mean, scatter), 1e-4)

    calls = {name: functools.partial(rival, features, labels, num_classes) for name, rival in rivals.items()}
    return Contest({"fused": lambda: statistics.update(features, labels), **calls}, check)


def cases(small: bool) -> list[Case]:
    rows, width = (300, 40) if small else (2_000_000, 1024)
    found = []
    for num_classes in (10,) if small else (1000, 100_000):
        for skewed in (False, True):
            label = f"bfloat16 {rows} x {width}, {num_classes} classes{', 90% in one' if skewed else ''}"
            found.append(Case("class_stats", label, 2.0 * rows * width, "read", functools.partial(
                prepare, rows=rows, width=width, num_classes=num_classes, skewed=skewed)))  # fmt: skip
    return found
