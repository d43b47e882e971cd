"""The benchmarks' own machinery: wrong contestants are refused, figures and verdicts are what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench import memory, report, softmax_ce, timing
from bench.cases import OPERATIONS, Mismatch, cases_of

TAU = torch.tensor([0.5, 1.0, 1.5, 0.8, 1.2])


def eager(logits: Tensor, target: Tensor) -> Tensor:
    return softmax_ce.vace_eager(logits, target, TAU)


class Cached(torch.autograd.Function):
    """Hands on the gradient of whichever loss was computed last."""

    last: Tensor

    @staticmethod
    def forward(ctx, logits, target):
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            loss = eager(leaf, target)
        (Cached.last,) = torch.autograd.grad(loss, leaf)
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream):
        return Cached.last * upstream, None


class WithoutUpstream(torch.autograd.Function):
    """Forgets that the loss may be scaled."""

    @staticmethod
    def forward(ctx, logits, target):
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            loss = eager(leaf, target)
        (ctx.gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.gradient, None


def check(contestant: softmax_ce.Loss, divisor: int = 1) -> None:
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randn(64, 5, generator=generator) for _ in range(2)]
    labels = [torch.randint(5, (64,), generator=generator) for _ in range(2)]
    softmax_ce._check({"fused": contestant, "eager": eager}, sources, labels, TAU, divisor)


@pytest.mark.parametrize("divisor", [1, 4])
def test_right_values_pass(divisor):
    check(lambda logits, target: softmax_ce.vace_fused(logits, target, TAU), divisor)


@pytest.mark.parametrize(
    "contestant",
    [
        Cached.apply,
        WithoutUpstream.apply,
        lambda logits, target: F.cross_entropy(logits, target),
        lambda logits, target: eager(logits * 1.0001, target),
        lambda logits, target: eager(logits, target) * 1.0001,
        lambda logits, target: eager(logits, target) * float("nan"),
    ],
    ids=["shared gradient", "no upstream", "no temperature", "logits off", "loss off", "nan"],
)
def test_wrong_values_are_refused(contestant):
    with pytest.raises(Mismatch):
        check(contestant)


def test_contestants_take_turns_on_refilled_inputs():
    log = []
    calls = {name: lambda name=name: log.append(name) for name in "abc"}
    times = timing.in_turn(calls, lambda repetition: log.append(repetition), seconds=0.0)
    rounds = len(times["a"])
    timed = log[-6 * rounds :]
    assert timed[:12] == [0, "a", 0, "b", 0, "c", 1, "b", 1, "c", 1, "a"]
    assert [entry for entry in timed if isinstance(entry, int)] == [i for i in range(rounds) for _ in range(3)]


def test_ratio_is_the_median_of_the_rounds():
    times = {"slow": [2.0, 30.0, 4.0], "fast": [1.0, 10.0, 1.0]}
    assert timing.ratio(times, "slow", "fast") == 3.0
    assert timing.summary([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (3.5, 2.0, 5.0, 1.0)


def test_peak_memory_is_what_the_call_touches():
    megabytes = 96
    peak = memory.peak_bytes(lambda: torch.ones(megabytes << 18), lambda _: None)
    if peak is None:
        pytest.skip("this system can't reset a process's peak memory")
    assert megabytes << 20 <= peak + (1 << 20) < (megabytes + 8) << 20


def test_every_case_has_a_name_of_its_own():
    names = [case.name for operation in OPERATIONS for case in cases_of(operation)]
    assert len(names) == len(set(names))
    assert all(cases_of(operation, quick=True) for operation in OPERATIONS)


def test_verdicts_and_tables():
    (case,) = (case for case in cases_of("softmax_ce") if case.name == "VACE cross-entropy (4096, 1000) float32")
    line = {"median_ms": 2.0, "gb_per_s": 16.0, "share": 0.7, "ratio": 1.0}
    speed = {
        "fused": line,
        "eager": line | {"ratio": 3.1, "share": 0.2},
        "compiled": line | {"ratio": 3.9},
        "copy": line,
    }
    measured = {
        "retained": {"environment": {"allocator": "retained"}, "cases": {case.name: speed}},
        "returned": {
            "environment": {},
            "cases": {case.name: {"fused": {"peak_mb": 2.0}, "baseline": {"peak_mb": 2.0}}},
        },
    }
    verdicts = {figure: good for (_, figure), good in report.verdicts([case], measured).items()}
    assert verdicts == {"eager": True, "compiled": False, "share": False, "peak": True}
    table = report.tables([case], measured)
    assert "3.1x (3 reached)" in table and "3.9x (4 NOT reached)" in table
    lines = report.rows([case], measured)
    assert [row["provider"] for row in lines] == ["fused", "eager", "compiled", "copy", "baseline"]
    assert set().union(*lines) <= set(report.COLUMNS)


def test_cases_that_were_not_measured_keep_their_rows(tmp_path):
    def line(case, median, allocator="retained"):
        return {"title": "CE", "case": case, "provider": "fused", "median_ms": median, "allocator": allocator}

    def written(**options):
        report.write_csv(path, [line("b", 3), line("c", 4)], **options)
        return [tuple(row.split(",")[i] for i in (2, 7, 8)) for row in path.read_text().splitlines()[1:]]

    path = tmp_path / "softmax_ce.csv"
    report.write_csv(path, [line("a", 1), line("b", 2), line("b", 9, "default")], keep_others=True)
    new = [("b", "retained", "3"), ("c", "retained", "4")]
    assert written(keep_others=True) == [("a", "retained", "1"), ("b", "default", "9"), *new]
    assert written() == new


def test_a_match_without_a_case_is_an_error(monkeypatch, capsys):
    import bench.__main__ as command

    monkeypatch.setattr("sys.argv", ["bench", "softmax_ce", "--match", "no such case"])
    with pytest.raises(SystemExit):
        command.main()
    assert "--match: no case's name holds 'no such case'" in capsys.readouterr().err
