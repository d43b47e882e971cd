"""Training speed of our loop against the loops that people write, and where its time goes.

    python -m bench.training                    # both cases
    python -m bench.training --case glyphs --epochs 10

Contestants, on the same rows, head, optimizer settings and batch size, one epoch each in turn in one process:
  ours        the loop of fusedloss.train: resident rows, reused buffers, fused loss, fused AdamW
  DataLoader  TensorDataset, DataLoader(shuffle=True), nn.CrossEntropyLoss, AdamW as they come
  tuned       resident rows, index batches, the step compiled by torch.compile, fused AdamW
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedloss.train.data import TrainingData
from fusedloss.train.loop import Training
from fusedloss.train.recipe import Recipe


class Case(NamedTuple):
    """Sizes of a synthetic bank, and how it is trained."""

    rows: int
    width: int
    classes: int
    batch_size: int
    description: str


CASES = {
    "large": Case(65536, 1280, 1000, 1024, "a synthetic bank"),
    "glyphs": Case(7558, 1280, 142, 512, "the shape of the glyph bank's training rows"),
}
Epoch = Callable[[], float]


def synthetic_rows(case: Case) -> tuple[Tensor, Tensor]:
    """Standard normal features around class centres, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(case.classes, (case.rows,), generator=generator)
    features = torch.randn(case.rows, case.width, generator=generator)
    return features.add_(torch.randn(case.classes, case.width, generator=generator)[labels], alpha=0.2), labels


def ours(case: Case, features: Tensor, labels: Tensor, loss: str = "ce") -> tuple[Epoch, nn.Module]:
    recipe = Recipe(epochs=1000, batch_size=case.batch_size, lr=1e-3, loss=loss)
    counts = torch.bincount(labels, minlength=case.classes)
    with torch.random.fork_rng(devices=[]):
        training = Training(recipe, 1e-3, TrainingData(features, labels, counts), None)
    return training._train_epoch, training.head


def data_loader(case: Case, features: Tensor, labels: Tensor) -> tuple[Epoch, nn.Module]:
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(features, labels), batch_size=case.batch_size, shuffle=True
    )
    head, criterion = nn.Linear(case.width, case.classes), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=1e-4)

    def epoch() -> float:
        total = 0.0
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(head(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(x)
        return total / len(labels)

    return epoch, head


def tuned(case: Case, features: Tensor, labels: Tensor) -> tuple[Epoch, nn.Module]:
    head = nn.Linear(case.width, case.classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)

    @torch.compile
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(head(x), y)
        loss.backward()
        return loss.detach()

    def epoch() -> float:
        total = torch.zeros(())
        for rows in torch.randperm(len(labels)).split(case.batch_size):
            optimizer.zero_grad(set_to_none=True)
            total += step(features[rows], labels[rows]) * len(rows)
            optimizer.step()
        return float(total) / len(labels)

    return epoch, head


def time_in_turn(contestants: dict[str, Epoch], epochs: int) -> dict[str, float]:
    """Median seconds of an epoch; contestants take turns, so that all see the same machine."""
    for epoch in contestants.values():
        epoch()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(epochs):
        for name, epoch in contestants.items():
            started = time.perf_counter()
            epoch()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def parts_of_a_step(case: Case, features: Tensor, labels: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of the parts of one step of ours, each timed where it stands in the step."""
    counts = torch.bincount(labels, minlength=case.classes)
    recipe = Recipe(batch_size=case.batch_size, lr=1e-3)
    with torch.random.fork_rng(devices=[]):
        training = Training(recipe, 1e-3, TrainingData(features, labels, counts), None)
    head, criterion = training.head, training.objective.loss
    batch, logits = (
        features.new_empty(case.batch_size, case.width),
        features.new_empty(case.batch_size, case.classes),
    )
    for parameter in head.parameters():
        parameter.grad = torch.zeros_like(parameter)
    times: dict[str, list[float]] = {name: [] for name in ("gather", "GEMMs", "loss", "optimizer")}
    for rows in torch.randint(case.rows, (repeats, case.batch_size)):
        marks = [time.perf_counter()]
        torch.index_select(features, 0, rows, out=batch)
        y = labels.index_select(0, rows)
        marks.append(time.perf_counter())
        with torch.no_grad():
            torch.addmm(head.bias, batch, head.weight.t(), out=logits)
        marks.append(time.perf_counter())
        z = logits.detach().requires_grad_()
        criterion(z, y).backward()
        marks.append(time.perf_counter())
        torch.mm(z.grad.t(), batch, out=head.weight.grad)
        torch.sum(z.grad, 0, out=head.bias.grad)
        marks.append(time.perf_counter())
        training.optimizer.step()
        marks.append(time.perf_counter())
        gather, forward, loss, backward, update = (after - before for before, after in pairwise(marks))
        for name, value in zip(times, (gather, forward + backward, loss, update), strict=True):
            times[name].append(value)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def report(name: str, case: Case, epochs: int) -> None:
    features, labels = synthetic_rows(case)
    steps = -(-case.rows // case.batch_size)
    print(
        f"\n{name}: {case.description}, {case.rows} x {case.width}, {case.classes} classes, "
        f"batches of {case.batch_size}, "
        f"{torch.get_num_threads()} threads"
    )
    built = {
        "ours": ours(case, features, labels),
        "DataLoader": data_loader(case, features, labels),
        "tuned": tuned(case, features, labels),
        "ours, vace": ours(case, features, labels, "vace"),
    }
    median = time_in_turn({label: epoch for label, (epoch, _) in built.items()}, epochs)
    flops = 4 * case.rows * case.width * case.classes
    for label, seconds in median.items():
        print(
            f"  {label:<11} {1000 * seconds / steps:8.3f} ms/step  {flops / seconds / 1e9:7.1f} GFLOP/s  "
            f"{seconds / median['ours']:5.2f} x the time of ours"
        )
    parts = parts_of_a_step(case, features, labels, min(4 * steps, 100))
    whole = sum(parts.values())
    print("  a step of ours: " + ", ".join(f"{part} {1000 * s:.3f} ms ({s / whole:.0%})" for part, s in parts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help="a case; several may be named (default: all)")
    parser.add_argument("--epochs", type=int, default=7, help="timed epochs of each contestant (default: 7)")
    options = parser.parse_args()
    for name in options.case or CASES:
        report(name, CASES[name], options.epochs)


if __name__ == "__main__":
    main()
