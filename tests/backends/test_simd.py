"""The battery on every SIMD level of this machine, and on kernels that are deliberately wrong."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from fusedloss.backends.cpp import unavailable_reason

ROOT = Path(__file__).parents[2]
LEVELS = ("baseline", "avx2", "avx512")
NOT_ALLOWED = "this processor and build allow baseline and, where present, avx2 and avx512"

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
    found = run_battery("--gradcheck", level=level)
    if NOT_ALLOWED in found.stderr:
        pytest.skip(f"this machine has no {level}")
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.startswith(f"level {level}\n")


@needs_kernels
def test_a_level_that_does_not_exist_is_an_error():
    found = run_battery(level="avx9")
    assert found.returncode != 0
    assert "FUSEDLOSS_SIMD: got 'avx9'" in found.stderr
    assert NOT_ALLOWED in found.stderr


def build(folder: Path, changes: dict[str, tuple[str, str]]) -> Path:
    """The compiled module of a copy of csrc with one text replaced in each of some files."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copy(ROOT / "setup.py", folder)
    for name, (text, wrong) in changes.items():
        path = folder / "csrc" / name
        source = path.read_text()
        assert source.count(text) == 1, f"{name} holds {text!r} {source.count(text)} times: choose another error"
        path.write_text(source.replace(text, wrong))
    (folder / "fusedloss").mkdir()
    command = [
        sys.executable,
        "setup.py",
        "--quiet",
        "build_ext",
        "--build-lib",
        "out",
        "--build-temp",
        "objects",
    ]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return next((folder / "out" / "fusedloss").glob("_C*"))


@pytest.mark.slow
@needs_kernels
@pytest.mark.skipif(shutil.which((sysconfig.get_config_var("CXX") or "c++").split()[0]) is None, reason="no compiler")
def test_the_battery_fails_on_a_wrong_kernel(tmp_path):
    changes = {
        "rows.inl": (
            "const double rest = sums.rest * per_sum,",
            "const double rest = (1 + 1e-4) * sums.rest * per_sum,",
        )
    }
    found = run_battery("--extension", str(build(tmp_path, changes)))
    assert found.returncode == 1, found.stdout + found.stderr
    failures = [line for line in found.stdout.splitlines() if "AssertionError" in line]
    assert any("input[" in line for line in failures), found.stdout
