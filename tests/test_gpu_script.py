"""bench/gpu.sh without a GPU: its modes, and its steps with small sizes in Triton's interpreter."""

import csv
import os
import subprocess
import sys
from pathlib import Path

from fusedloss.backends.triton import tuning

ROOT = Path(__file__).parent.parent


def script(*arguments, **environment):
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(
        ["bench/gpu.sh", *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_modes_cover_every_stem_that_has_cases_or_a_table(tmp_path):
    modes = script("list", OUT=str(tmp_path)).stdout.split()
    cases = {file.stem for file in (ROOT / "bench" / "gpu").glob("*.py")} - {"__init__", "__main__"}
    assert {mode.split(":")[1] for mode in modes if mode.startswith("bench:")} == cases
    assert {mode.split(":")[1] for mode in modes if mode.startswith("tune:")} == set(tuning.TABLES)
    assert modes[:3] == ["build", "test", "sanitize"]


def test_unknown_mode_is_refused(tmp_path):
    found = script("tune", OUT=str(tmp_path))
    assert found.returncode == 2
    assert "got 'tune'; allowed are: list, all, build" in found.stderr


def test_dry_run_tunes_and_writes_tables(tmp_path):
    before = (ROOT / "fusedloss/backends/triton/tuning.py").read_text()
    found = script("--dry-run", "tune:softmax_ce:bfloat16", "bench:softmax_ce", "report", OUT=str(tmp_path))
    assert found.returncode == 0, found.stdout + found.stderr
    assert (ROOT / "fusedloss/backends/triton/tuning.py").read_text() == before
    assert "the interpreter" in (tmp_path / "tuning.py").read_text()
    lines = list(csv.DictReader((tmp_path / "gpu_softmax_ce.csv").read_text().splitlines()))
    assert {line["contestant"] for line in lines} >= {"fused", "eager"}
    assert "| class temperature bfloat16" in (tmp_path / "gpu.md").read_text()


def test_a_failing_mode_leaves_the_others_their_turn(tmp_path):
    found = script("--dry-run", "nonsense", "sanitize", OUT=str(tmp_path))
    assert found.returncode == 1
    assert "failed: nonsense (exit status 2)" in found.stderr
    assert "== sanitize" in found.stdout
