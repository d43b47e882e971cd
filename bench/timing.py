"""The one clock: contestants take turns on the same inputs, refilled before every call."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Call = Callable[[], Any]
Refill = Callable[[int], None]
_FEWEST, _MOST = 7, 2000
# Seconds of a round beyond which three rounds have to do.
_LONG_ROUND, _FEWEST_LONG = 2.5, 3


class Summary(NamedTuple):
    """Seconds of one call: the median, the 20th and 80th percentile, the least."""

    median: float
    p20: float
    p80: float
    least: float


def once(call: Call, refill: Refill, repetition: int) -> float:
    """Seconds of one call on freshly filled inputs; the filling is not timed."""
    refill(repetition)
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def rounds_within(calls: Mapping[str, Call], refill: Refill, seconds: float) -> int:
    """How many rounds take about `seconds`; every contestant is warm afterwards."""
    taken = _round(calls, refill)
    if taken < seconds:
        taken = _round(calls, refill)
    fewest = _FEWEST if taken < _LONG_ROUND else _FEWEST_LONG
    return max(fewest, min(_MOST, int(seconds / taken)))


def _round(calls: Mapping[str, Call], refill: Refill) -> float:
    started = time.perf_counter()
    for call in calls.values():
        once(call, refill, 0)
    return time.perf_counter() - started


def in_turn(calls: Mapping[str, Call], refill: Refill, seconds: float) -> dict[str, list[float]]:
    """Seconds of every call of every contestant; each round starts with another one."""
    rounds = rounds_within(calls, refill, seconds)
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for repetition in range(rounds):
            first = repetition % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(once(calls[name], refill, repetition))
    finally:
        if collecting:
            gc.enable()
    return times


def summary(times: list[float]) -> Summary:
    """Median and spread of one contestant's times."""
    cuts = statistics.quantiles(times, n=5, method="inclusive")
    return Summary(statistics.median(times), cuts[0], cuts[-1], min(times))


def ratio(times: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """How many times longer `slow` takes: the median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))
