"""The search for a temperature over logits that come in blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fusedloss.core.checks import as_labels, as_tensor

Blocks = Callable[[], Iterable[tuple[Tensor, Tensor]]]

LOWEST, HIGHEST = 0.01, 100.0
# A block and its two companions stay in a core's cache.
BLOCK_ELEMENTS = 1 << 18
# Few logits are worked through in float64.
ELEMENTS_IN_FLOAT64 = 1 << 22
PASSES_BEFORE_BOUND = 5
SAMPLE_ROWS, SAMPLE_ELEMENTS = 8192, 1 << 22


@dataclass(frozen=True)
class TemperatureFit:
    """A fitted temperature; ``converged`` is False where the optimum lies at the end of the search range."""

    temperature: float
    nll_before: float
    nll_after: float
    converged: bool


class Moments(NamedTuple):
    """The mean negative log-likelihood at an inverse temperature, and its first four derivatives there."""

    nll: float
    first: float
    second: float
    third: float
    fourth: float

    def nll_after(self, step: float) -> float:
        """The likelihood a small step further."""
        terms = (self.nll, self.first, self.second, self.third, self.fourth)
        return sum(term * step**order / math.factorial(order) for order, term in enumerate(terms))

    def step(self) -> tuple[float, float]:
        """The step to the optimum, and how much of it the last derivative contributes: an error's upper estimate."""
        if self.second <= 0.0:
            return math.nan, math.inf
        newton = step = -self.first / self.second
        for _ in range(20):
            value = self.first + step * (self.second + step * (self.third / 2 + step * self.fourth / 6))
            slope = self.second + step * (self.third + step * self.fourth / 2)
            # Far from the optimum the polynomial may have none.
            if not 0.2 * self.second < slope < 5.0 * self.second:
                return newton, math.inf
            step -= value / slope
        return step, abs(self.fourth * step**3 / (6 * self.second))


@dataclass
class Sample:
    """Rows taken evenly from blocks as they pass, at most ``SAMPLE_ROWS`` of them."""

    stride: int = 1
    seen: int = 0

    def __post_init__(self) -> None:
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        first = -self.seen % self.stride
        self.logits.append(logits[first :: self.stride].clone())
        self.labels.append(labels[first :: self.stride].clone())
        self.seen += len(labels)
        most = min(SAMPLE_ROWS, max(1, SAMPLE_ELEMENTS // logits.shape[1]))
        while sum(map(len, self.labels)) > most:
            kept, labels_kept = torch.cat(self.logits)[::2], torch.cat(self.labels)[::2]
            self.logits, self.labels, self.stride = [kept.clone()], [labels_kept.clone()], 2 * self.stride

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        logits, labels = torch.cat(self.logits), torch.cat(self.labels)
        rows = max(1, BLOCK_ELEMENTS // logits.shape[1])
        return zip(logits.split(rows), labels.split(rows), strict=True)


def fit_to_blocks(blocks: Blocks, max_iterations: int, start: float | None = None) -> TemperatureFit:
    """``calibration.fit_temperature`` of a function that gives blocks; errors as there."""
    sample = Sample() if start is None else None
    point = 1.0 if start is None else min(max(1.0 / start, LOWEST), HIGHEST)
    moments, nll_at_one, exact = measure(blocks, point, sample=sample, also_at_one=point != 1.0)
    before = moments.nll if nll_at_one is None else nll_at_one
    search = Search(point, 1e-12 if exact else 3e-6)
    for used in range(max_iterations):
        if search.take(moments) or used + 1 == max_iterations:
            break
        if sample is not None:
            search.point = _of_sample(sample, search)
            sample = None
        moments, _, _ = measure(blocks, search.point)
        if moments.first == moments.second == 0.0:
            # Certain of every row, or no signal in any.
            at_low, _, _ = measure(blocks, LOWEST)
            beta = 1.0 if at_low.first == 0.0 else HIGHEST
            return TemperatureFit(1.0 / beta, before, moments.nll, False)
    return TemperatureFit(1.0 / search.found, before, search.nll, search.converged)


def _of_sample(sample: Sample, search: Search) -> float:
    """Where to go on: the optimum of the sample, unless the sample is most of the rows."""
    if sample.stride < 4:
        return search.point
    beta = 1.0 / fit_to_blocks(sample.blocks, 50, start=1.0 / search.point).temperature
    return beta if search.low <= beta <= search.high else search.point


class Search:
    """A bracket around the optimum, and the next point to measure."""

    def __init__(self, point: float, tolerance: float) -> None:
        self.low, self.high, self.point, self.tolerance = LOWEST, HIGHEST, point, tolerance
        self.found, self.nll, self.converged = point, math.nan, False
        self.points = 0

    def take(self, moments: Moments) -> bool:
        """Learn from what was measured at the point; True at the end."""
        point = self.point
        self.found, self.nll = point, moments.nll
        if (point == LOWEST and moments.first >= 0.0) or (point == HIGHEST and moments.first <= 0.0):
            return True
        if moments.first < 0.0:
            self.low = point
        else:
            self.high = point
        step, rest = moments.step()
        following = point + step
        if rest <= self.tolerance * point and self.low <= following <= self.high:
            self.found, self.nll, self.converged = following, moments.nll_after(step), True
            return True
        self.points += 1
        # Towards an optimum at a bound every step is as long as the last: look at the bound itself.
        far = self.points == PASSES_BEFORE_BOUND
        if self.high == HIGHEST and (following >= HIGHEST or (far and step > 0)):
            self.point = HIGHEST
        elif self.low == LOWEST and (following <= LOWEST or (far and step < 0)):
            self.point = LOWEST
        elif self.low < following < self.high:
            self.point = following
        else:
            self.point = math.sqrt(self.low * self.high)
        return False


def measure(
    blocks: Blocks, beta: float, *, sample: Sample | None = None, also_at_one: bool = False
) -> tuple[Moments, float | None, bool]:
    """The likelihood's derivatives in the inverse temperature over all rows, its value at 1, and whether in float64."""
    total: Tensor | None = None
    rows, exact = 0, True
    for logits, labels in blocks():
        whole, targets = _checked(logits, labels, rows)
        exact &= whole.dtype == torch.float64
        rows += len(whole)
        most = max(1, BLOCK_ELEMENTS // whole.shape[1])
        for z, target in zip(whole.split(most), targets.split(most), strict=True):
            if len(z) == 0:
                continue
            if sample is not None:
                sample.add(z, target)
            sums = _block_sums(z, target, beta, also_at_one)
            total = sums if total is None else total + sums
    if total is None:
        raise ValueError("logits must hold at least one sample; got none")
    nll, first, second, third, fourth, at_one = (total / rows).tolist()
    return Moments(nll, first, second, third, fourth), at_one if also_at_one else None, exact


def _checked(logits: Tensor, labels: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    logits = as_tensor("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape (N, K); got {tuple(logits.shape)}")
    target = as_labels("labels", labels, logits.shape[:1], logits.shape[1]).to(logits.device)
    z = logits if logits.dtype == torch.float64 else logits.float()
    finite = torch.isfinite(z.amax(1)) & torch.isfinite(z.amin(1)) if len(z) else z.new_ones(0, dtype=torch.bool)
    if not bool(finite.all()):
        row = first_row + int((~finite).nonzero()[0])
        raise ValueError(f"logits must be finite; got another value in row {row}")
    return z, target


def _block_sums(z: Tensor, target: Tensor, beta: float, also_at_one: bool) -> Tensor:
    """Sums over rows of the likelihood, its derivatives and its value at 1, ``(6,)`` float64."""
    x = z - z.amax(1, keepdim=True)
    label = x.gather(1, target[:, None])[:, 0]
    at_one = x.exp().sum(1).log().sub(label) if also_at_one else torch.zeros_like(label)
    p = (x * beta).exp_()
    s = p.sum(1)
    power = p * x
    mean = power.sum(1) / s
    x -= mean[:, None]
    moments = []
    torch.mul(p, x, out=power)
    for _ in range(3):
        power *= x
        moments.append(power.sum(1) / s)
    second, third, fourth = (moment.double() for moment in moments)
    fourth = fourth - 3 * second.square()
    nll = s.log() - beta * label
    values = (nll.double(), (mean - label).double(), second, third, fourth, at_one.double())
    return torch.stack([value.sum() for value in values])
