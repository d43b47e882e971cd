"""Installing without a compiler succeeds and says what is missing; one that fails is an error; no torch needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest

import fusedloss

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    if not (ROOT / "setup.py").exists():
        pytest.fail("these tests run from a source checkout")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "fusedloss").mkdir()
    shutil.copy(ROOT / "fusedloss" / "__init__.py", tmp_path / "fusedloss")
    return tmp_path


def build(checkout, compiler):
    environment = {**os.environ, "CXX": compiler, "CC": compiler}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", "out"],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_without_a_compiler(checkout):
    done = build(checkout, "no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler ('no-such-compiler' is not on PATH)" in done.stderr
    assert not list(checkout.rglob("*.so"))


def test_a_failing_compiler_is_an_error(checkout):
    done = build(checkout, shutil.which("false"))
    assert done.returncode != 0
    assert "no OpenMP" in done.stderr
    assert not list(checkout.rglob("*.so"))


def test_a_source_distribution_holds_what_is_compiled_and_what_types_need(checkout):
    for name in ("py.typed", "_C.pyi"):
        shutil.copy(ROOT / "fusedloss" / name, checkout / "fusedloss")
    command = [sys.executable, "setup.py", "--quiet", "sdist"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    assert held >= {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    assert held >= {"setup.py", "pyproject.toml", "LICENSE", "fusedloss/py.typed", "fusedloss/_C.pyi"}


def test_the_version_is_the_installed_package_s(monkeypatch):
    monkeypatch.setattr(metadata, "version", {"fusedloss": "1.2.3"}.__getitem__)
    assert fusedloss.__version__ == "1.2.3"

    def not_installed(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", not_installed)
    assert fusedloss.__version__ == "0+unknown"
    with pytest.raises(AttributeError, match="'fusedloss' has no attribute 'version'"):
        _ = fusedloss.version


def test_nothing_of_the_build_needs_torch():
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"\[build-system\]\s*requires = \[(.*?)\]", text, re.S).group(1)
    assert "torch" not in requires
    for path in [ROOT / "setup.py", *(ROOT / "csrc").iterdir()]:
        assert not re.search(r"import torch|#include <(torch|ATen|c10)", path.read_text()), path


def test_without_the_compiled_module_the_reference_is_used(tmp_path):
    """A broken binary never makes the import fail: a warning says so once and the reference is used."""
    shutil.copytree(ROOT / "fusedloss", tmp_path / "fusedloss", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "fusedloss" / "_C.py").write_text("raise ImportError('this binary is broken')\n")
    code = """
import warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fusedloss
    logits = torch.randn(4, 3, requires_grad=True)
    for _ in range(2):
        fusedloss.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    statistics = fusedloss.ClassStatistics(3, 3)
    statistics.update(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
ours = [str(w.message) for w in caught if "fusedloss" in str(w.message)]
assert len(ours) == 1 and "this binary is broken" in ours[0], ours
try:
    with fusedloss.backend("cpp"):
        fusedloss.cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
except RuntimeError as error:
    assert "this binary is broken" in str(error)
else:
    raise AssertionError("a backend without its module was used")
from fusedloss.cli import info
assert "this binary is broken" in info.report()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
