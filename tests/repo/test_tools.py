"""The gates: what .ci/run and make run, that a failure fails, and that every place names the same versions."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PRE_COMMIT = (ROOT / ".pre-commit-config.yaml").read_text()


def list_of(name):
    """The strings of a list in pyproject.toml; tomllib came with Python 3.11."""
    return re.findall(r'"([^"]+)"', re.search(rf"^{name} = (\[.*?\])$", PYPROJECT, re.M | re.S).group(1))


def names_of(requirements):
    return {re.split(r"[<>=\[; ]", requirement)[0] for requirement in requirements}


@pytest.mark.parametrize("tool, repository", [("ruff", "ruff-pre-commit"), ("clang-format", "mirrors-clang-format")])
def test_pre_commit_and_the_dev_extra_name_one_version(tool, repository):
    (hook,) = re.findall(rf"/{repository}\n +rev: v(\S+)", PRE_COMMIT)
    assert f"{tool}=={hook}" in list_of("dev")


def test_the_tests_extra_has_what_the_tests_import():
    given = names_of(list_of("test")) | names_of(list_of("dependencies"))
    assert {"pytest", "pytest-xdist", "hypothesis", "pybind11", "setuptools"} <= given
    assert {"ruff", "clang-format", "mypy", "pre-commit"} == names_of(list_of("dev"))


def test_all_holds_every_extra_of_a_user_and_of_the_tests():
    extras = PYPROJECT.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    names = set(re.findall(r"^(\w+) = ", extras, re.M))
    (everything,) = list_of("all")
    assert set(re.search(r"\[(.*)\]", everything).group(1).split(",")) == names - {"dev", "all"}


def run_with_tools(folder, command, **status):
    """Runs a command where each tool is a script that notes its arguments and ends with the given status."""
    for name, code in status.items():
        tool = folder / name.replace("_", "-")
        tool.write_text(f'#!/bin/sh\necho "{tool.name} $*" >> "{folder}/log"\nexit {code}\n')
        tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return ended.returncode, (folder / "log").read_text().splitlines()


@pytest.mark.parametrize("code", [0, 2])
def test_continuous_integration_runs_the_checks_and_the_tests(tmp_path, code):
    status, log = run_with_tools(tmp_path, [".ci/run"], make=code)
    assert [line.split()[1] for line in log] == ["check", "test"]
    assert (status != 0) == (code != 0)


@pytest.mark.parametrize("failing", [None, "ruff", "clang_format", "mypy"])
def test_a_check_that_fails_stops_no_other_and_fails_the_target(tmp_path, failing):
    tools = {name: int(name == failing) for name in ("ruff", "clang_format", "mypy")}
    # The stamp of a virtual environment that is newer than its sources: nothing is installed.
    (tmp_path / ".fusedloss-installed").touch()
    (tmp_path / "bin").symlink_to(tmp_path)
    status, log = run_with_tools(tmp_path, ["make", "check", f"VENV={tmp_path}"], **tools)
    assert [line.split()[0] for line in log] == ["ruff", "ruff", "clang-format", "mypy"]
    assert "csrc/bindings.cpp" in log[2]
    assert (status != 0) == (failing is not None)
