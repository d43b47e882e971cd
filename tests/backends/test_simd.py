"""The battery on the other SIMD levels of this machine, and on kernels that are deliberately wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import scratch
from simd_levels import LEVELS, NOT_ALLOWED

from fusedloss.backends.cpp import extension, unavailable_reason

ROOT = Path(__file__).parents[2]

needs_kernels = pytest.mark.skipif(unavailable_reason("cpu") is not None, reason="no compiled module")


def run_battery(*arguments, level=None):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("FUSEDLOSS_SIMD", None)
    if level:
        environment["FUSEDLOSS_SIMD"] = level
    return subprocess.run(
        [sys.executable, str(ROOT / "tests" / "cases" / "softmax_battery.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )


@needs_kernels
@pytest.mark.parametrize("level", LEVELS)
def test_battery_on_level(level):
    if level == extension.level():
        pytest.skip("the level of this process, where test_softmax_ce and test_gradcheck run the battery")
    result = run_battery("--gradcheck", level=level)
    if NOT_ALLOWED in result.stderr:
        pytest.skip(f"this machine has no {level}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith(f"level {level}\n")


@needs_kernels
def test_a_level_that_does_not_exist_is_an_error():
    result = run_battery(level="avx9")
    assert result.returncode != 0
    assert "FUSEDLOSS_SIMD: got 'avx9'" in result.stderr
    assert NOT_ALLOWED in result.stderr


@needs_kernels
@pytest.mark.slow
@pytest.mark.skipif(scratch.COMPILER is None, reason="no compiler")
def test_the_battery_fails_on_a_wrong_kernel(tmp_path):
    folder = scratch.copy_package(tmp_path)
    right, wrong = "one_minus_pt = sums.other_sum * per_sum", "one_minus_pt = (1 + 1e-4) * sums.other_sum * per_sum"
    scratch.replace_once(folder / "csrc" / "row_loss.inl", right, wrong)
    found = run_battery("--extension", str(scratch.build_kernels(folder)))
    assert found.returncode == 1, found.stdout + found.stderr
    failures = [line for line in found.stdout.splitlines() if "AssertionError" in line]
    assert any("input[" in line for line in failures), found.stdout
