"""One group for each case; each contestant of it is a benchmark."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from bench import timing
from bench.cases import Case, Contest
from bench.measure import QUICK_SECONDS


@pytest.mark.parametrize("provider", ["fused", "eager", "compiled", "limit"])
def test_speed(benchmark: Any, case: Case, contest: Contest, provider: str) -> None:
    call = contest.limit if provider == "limit" else contest.calls[provider]
    repetition = itertools.count()
    benchmark.group = case.name
    rounds = timing.rounds_within({provider: call}, contest.refill, QUICK_SECONDS)
    benchmark.pedantic(call, setup=lambda: contest.refill(next(repetition)), rounds=rounds)
    benchmark.extra_info |= {"limit": case.limit, "moved_bytes": case.moved}
    if benchmark.stats is not None:
        benchmark.extra_info["gb_per_s"] = case.moved / benchmark.stats.stats.median / 1e9
