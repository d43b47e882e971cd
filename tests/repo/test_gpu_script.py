"""bench/gpu.sh without a GPU: its modes, and its steps with small sizes in Triton's interpreter."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.cases import Mismatch
from bench.gpu import Case, Contest, agree, cases_of, parts_of, stems, values_of
from bench.gpu.__main__ import markdown, measured
from bench.tune import different
from fusedloss.backends.triton import tuning

ROOT = Path(__file__).parents[2]


def script(*arguments, **environment):
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(
        ["bench/gpu.sh", *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_modes_cover_every_stem_that_has_cases_or_a_table(tmp_path):
    modes = script("list", OUT=str(tmp_path)).stdout.split()
    cases = {file.stem for file in (ROOT / "bench" / "gpu").glob("*.py")} - {"__init__", "__main__"}
    assert {mode.split(":")[1] for mode in modes if mode.startswith("bench:")} == cases
    assert {mode.split(":")[1] for mode in modes if mode.startswith("tune:")} == set(
        tuning.DEVICES[tuning.DEFAULT]["tiles"]
    )
    assert modes[:2] == ["build", "test"] and modes[-1] == "report"


GROUP = re.compile(r'^    \[([a-d])\]="(.*)"$', re.MULTILINE)


def test_groups_are_of_modes_and_last_less_than_ten_minutes(tmp_path):
    modes = script("list", OUT=str(tmp_path)).stdout.split()
    groups = dict(GROUP.findall((ROOT / "bench" / "gpu.sh").read_text()))
    assert list(groups) == ["a", "b", "c", "d"]
    for group in groups.values():
        names, seconds = zip(*(each.split("=") for each in group.split()), strict=True)
        assert sum(map(int, seconds)) <= 570
        for name in set(names) - {"checks"}:
            assert any(mode == name or mode.startswith(f"{name}:") for mode in modes), name
    # Each stem that is tuned, and each that is timed, has its turn.
    for kind in ("tune", "bench"):
        stems_of = {mode.split(":")[1] for mode in modes if mode.startswith(f"{kind}:")}
        assert {
            name.split(":")[1].split("=")[0] for name in " ".join(groups.values()).split() if name.startswith(kind)
        } == stems_of


def test_parts_are_modes_and_have_cases(tmp_path):
    modes = script("list", OUT=str(tmp_path)).stdout.split()
    for stem in stems():
        parts = parts_of(stem)
        assert [f"bench:{stem}:{part}" for part in parts] == [
            mode for mode in modes if mode.startswith(f"bench:{stem}:")
        ]
        for small in (True, False):
            assert cases_of(stem, small)
            assert {case.part for case in cases_of(stem, small)} == set(parts or ("",))
            assert all(cases_of(stem, small, part) for part in parts)


def test_rivals_without_memory_or_with_wrong_values_have_no_time():
    truth = (torch.tensor(1.0),)

    def too_large():
        raise torch.OutOfMemoryError

    def prepare(device):
        calls = {"fused": lambda: truth, "eager": too_large, "liger": lambda: (torch.tensor(2.0),)}
        return Contest(calls, lambda: agree(values_of(calls), truth, 1e-2))

    case = Case("linear_ce", "a case", 1.0, "gemm", prepare)
    lines = {line["contestant"]: line for line in measured(case, torch.device("cpu"), 1.0, 1)}
    assert {name: line["ratio"] for name, line in lines.items()} == {
        "fused": "1", "eager": "out of memory", "liger": "wrong",
    }  # fmt: skip
    assert "ms" not in lines["eager"] and "ms" not in lines["liger"]
    where = dict.fromkeys(("device", "torch", "triton", "date"), "-")
    assert "| out of memory | wrong |" in markdown("linear_ce", [line | where for line in lines.values()])


def test_a_peer_that_fails_has_no_time_and_stops_nobody(capsys):
    truth = (torch.tensor(1.0),)

    def broken():
        raise TypeError("another version")

    def prepare(device):
        calls = {"fused": lambda: truth, "quack": broken}
        return Contest(calls, lambda: agree(values_of(calls), truth, 1e-2))

    case = Case("softmax_ce", "a case", 1.0, "copy", prepare)
    lines = {line["contestant"]: line["ratio"] for line in measured(case, torch.device("cpu"), 1.0, 1)}
    assert lines == {"fused": "1", "quack": "failed"}
    assert "quack failed: TypeError: another version" in capsys.readouterr().err
    with pytest.raises(TypeError, match="another version"):
        values_of({"eager": broken})


def test_no_case_is_begun_after_the_limit(tmp_path):
    code = "import sys; from bench.gpu.__main__ import main; sys.exit(main())"
    command = [
        "-c",
        code,
        "training",
        "softmax_ce",
        "--small",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--limit",
        "0",
    ]
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("left out after 0 s: softmax_ce") == 8
    assert list(tmp_path.iterdir()) == []


def test_candidates_of_the_same_machine_code_are_one():
    """Compiled for a GPU that isn't there: stages that change nothing, and warps, which do."""
    code = (
        "import json\n"
        "from triton.runtime import driver\n"
        "from bench.precompile import Job, compile_job\n"
        "from bench.resources import _Driver\n"
        "driver.set_active(_Driver(90))\n"
        "entries = ((64, 16, 1, 1), (64, 16, 1, 3), (64, 16, 4, 1), (64, 17, 4, 1))\n"
        "found = compile_job(Job('softmax_ce', 'bfloat16', '16', entries, 'cpu', True))\n"
        "print(json.dumps([found['16', entry] for entry in entries]))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr
    one, more_stages, more_warps, impossible = json.loads(result.stdout.splitlines()[-1])
    assert one == more_stages != more_warps and None not in (one, more_warps)
    assert impossible is None


def test_only_different_candidates_are_timed():
    compiled = {
        ("16", (1, 1)): "a",
        ("16", (2, 1)): "b",
        ("16", (2, 2)): "b",
        ("16", (4, 1)): None,
        ("32", (8, 1)): "c",
    }
    assert different([(1, 1), (2, 1), (2, 2), (4, 1), (1, 1), (8, 1)], "16", compiled) == [[1, 1], [2, 1]]
    # The present entry stays, for others to be compared with.
    assert different([(4, 1), (2, 1)], "16", compiled) == [[4, 1], [2, 1]]


def test_a_case_is_not_timed_where_ours_is_wrong():
    with pytest.raises(Mismatch, match="fused"):
        agree({"fused": (torch.tensor(2.0),), "eager": (torch.tensor(1.0),)}, (torch.tensor(1.0),), 1e-2)


@pytest.mark.parametrize("stem", ["linear_ce", "supcon", "training"])
def test_small_cases_are_right(stem):
    """On the backend of this machine: what each case compares is true of it."""
    for case in cases_of(stem, small=True)[:: 3 if stem == "linear_ce" else 1]:
        assert case.prepare(torch.device("cpu")).check() == []


def test_unknown_mode_is_refused(tmp_path):
    result = script("tune", OUT=str(tmp_path))
    assert result.returncode == 2
    assert "got 'tune'; allowed are: list, all, wheels, a, b, c, d, build" in result.stderr


@pytest.mark.slow
def test_dry_run_tunes_and_writes_tables(tmp_path):
    before = tuning.PATH.read_text()
    result = script("--dry-run", "tune:softmax_ce:bfloat16", "bench:softmax_ce", "report", OUT=str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert tuning.PATH.read_text() == before
    assert "the interpreter" in (tmp_path / "tuning.json").read_text()
    lines = list(csv.DictReader((tmp_path / "gpu_softmax_ce.csv").read_text().splitlines()))
    assert {line["contestant"] for line in lines} >= {"fused", "eager"}
    assert "| class temperature bfloat16" in (tmp_path / "gpu.md").read_text()


def test_a_failing_mode_leaves_the_others_their_turn(tmp_path):
    result = script("--dry-run", "nonsense", "sanitize:memcheck", OUT=str(tmp_path))
    assert result.returncode == 1
    assert "failed: nonsense (exit status 2)" in result.stderr
    assert re.search(
        r"^nonsense: \d+ s of \d+, exit status 2$", (tmp_path / "gpu_durations_some.txt").read_text(), re.M
    )
    assert "== sanitize:memcheck" in result.stdout
