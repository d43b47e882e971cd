"""L-BFGS in a given metric, for smooth convex functions whose evaluation is what takes the time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Of the decrease that the slope promises, what a step has to bring (Armijo).
_SUFFICIENT = 1e-4
# A step is shortened to no less than this share at a time, and so often.
_SHORTEST, _MOST_TRIALS = 0.1, 20
# Steps whose decrease is compared, and the slowest convergence that is believed.
_WINDOW, _SLOWEST = 5, 0.95


class Minimum(NamedTuple):
    """Where a search ended."""

    point: Tensor
    value: float
    gradient: Tensor
    iterations: int
    evaluations: int
    converged: bool


class _Pair(NamedTuple):
    """A step, the change of the gradient along it, and 1 over their product."""

    step: Tensor
    change: Tensor
    inverse: float


def minimize(
    function: Callable[[Tensor], tuple[float, Tensor]],
    start: Tensor,
    precondition: Callable[[Tensor], Tensor],
    *,
    tolerance: float,
    max_iterations: int,
    memory: int,
    resolution: float,
) -> Minimum:
    """Minimize a convex `function` of a point to (value, gradient) from `start`.

    Stops where the value is estimated to be at most `tolerance` of it above the minimum, or where no step lowers it
    any more. Two estimates have to agree: half the squared length of the gradient in the metric that L-BFGS has
    learned, and what the decrease of the latest steps adds up to if it goes on falling as it did.

    Args:
        function: value and gradient; the point is not kept.
        start: any shape.
        precondition: the inverse of an approximate Hessian times a gradient, as a new tensor; symmetric and positive.
        tolerance: relative.
        max_iterations: steps.
        memory: pairs that are kept.
        resolution: relative error of a value; smaller differences say nothing.

    >>> import torch
    >>> scale = torch.tensor([1.0, 100.0])
    >>> def function(x):
    ...     return float((scale * x * x).sum() / 2) + 1, scale * x
    >>> found = minimize(function, torch.ones(2), lambda gradient: gradient / scale,
    ...                  tolerance=1e-9, max_iterations=10, memory=5, resolution=1e-15)
    >>> found.value, found.converged
    (1.0, True)
    """
    point = start
    value, gradient = function(point)
    pairs: deque[_Pair] = deque(maxlen=memory)
    iterations, evaluations = 0, 1
    values = [value]
    while True:
        direction = _direction(gradient, pairs, precondition)
        slope = _dot(gradient, direction)
        small = -slope <= 2 * tolerance * abs(value)
        if slope == 0 or (small and _left(values) <= max(tolerance, resolution) * abs(value)):
            return Minimum(point, value, gradient, iterations, evaluations, True)
        if iterations == max_iterations:
            return Minimum(point, value, gradient, iterations, evaluations, False)
        length = 1.0
        for _trial in range(_MOST_TRIALS):
            trial = torch.add(point, direction, alpha=length)
            trial_value, trial_gradient = function(trial)
            evaluations += 1
            if trial_value <= value + _SUFFICIENT * length * slope + resolution * abs(value):
                break
            length *= _shorter(value, slope * length, trial_value)
        else:
            if pairs:  # stale curvature: once more from the metric alone
                pairs.clear()
                continue
            return Minimum(point, value, gradient, iterations, evaluations, small)
        pair = _pair(trial - point, trial_gradient - gradient)
        if pair is not None:
            pairs.append(pair)
        point, value, gradient = trial, trial_value, trial_gradient
        iterations += 1
        values.append(value)


def _left(values: list[float]) -> float:
    """What is left to gain if the gain of some steps goes on shrinking as from the steps before them."""
    count = min(_WINDOW, (len(values) - 1) // 2)
    if count == 0:
        return values[0] - values[-1]
    latest, before = values[-1 - count] - values[-1], values[-1 - 2 * count] - values[-1 - count]
    ratio = min(_SLOWEST, max(0.0, latest / before)) if before > 0 else _SLOWEST
    return latest * ratio / (1 - ratio)


def _shorter(value: float, slope: float, trial: float) -> float:
    """The share of a step at which the parabola through both values is least."""
    curvature = 2 * (trial - value - slope)
    if not curvature > 0 or curvature == float("inf"):
        return _SHORTEST
    return min(0.5, max(_SHORTEST, -slope / curvature))


def _direction(gradient: Tensor, pairs: deque[_Pair], precondition: Callable[[Tensor], Tensor]) -> Tensor:
    """Minus the gradient times the inverse Hessian of the pairs and the metric: the two loops."""
    result = gradient.neg()
    shares = []
    for pair in reversed(pairs):
        share = pair.inverse * _dot(pair.step, result)
        shares.append(share)
        result.add_(pair.change, alpha=-share)
    result = precondition(result)
    if pairs:
        # Where the metric underestimates the latest curvature, every first trial would be too long
        change = pairs[-1].change
        result.mul_(min(1.0, 1 / (pairs[-1].inverse * _dot(change, precondition(change)))))
    for pair, share in zip(pairs, reversed(shares), strict=True):
        result.add_(pair.step, alpha=share - pair.inverse * _dot(pair.change, result))
    return result


def _pair(step: Tensor, change: Tensor) -> _Pair | None:
    product = _dot(step, change)
    if not product > 1e-10 * (_dot(step, step) * _dot(change, change)) ** 0.5:
        return None
    return _Pair(step, change, 1 / product)


def _dot(left: Tensor, right: Tensor) -> float:
    return float(torch.dot(left.reshape(-1), right.reshape(-1)))
