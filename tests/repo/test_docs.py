"""Documents are run: every python block, every docstring example, every command-line flag that they mention."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedloss

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [
    "fusedloss.backends",
    "fusedloss.calibration",
    "fusedloss.longtail",
    "fusedloss.metrics",
    "fusedloss.losses.class_statistics",
    *(
        f"fusedloss.{package}.{path.stem}"
        for package in ("functional", "losses", "terms")
        for path in sorted((ROOT / "fusedloss" / package).glob("[a-z]*.py"))
        if ">>>" in path.read_text()
    ),
]


def blocks(language: str):
    for path in DOCUMENTS:
        for number, text in enumerate(re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.S)):
            yield pytest.param(text, id=f"{path.name}-{number}")


@pytest.mark.parametrize("code", list(blocks("python")))
def test_python_blocks_run(code):
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(code, "<document>", "exec"), names)
    assert names


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    torch.manual_seed(0)
    module = importlib.import_module(name)
    result = doctest.testmod(
        module,
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
        extraglobs={"torch": torch, "fusedloss": fusedloss, **vars(fusedloss)},
    )
    assert result.failed == 0
    assert result.attempted > 0, f"{name} has no example"


def test_every_public_name_has_an_example():
    records = {"RowStatistics"}  # fields of a result
    for name in sorted(set(fusedloss.__all__) - records):
        public = getattr(fusedloss, name)
        if callable(public):
            assert ">>>" in (public.__doc__ or ""), f"{name} has no example"


def test_commands_in_documents_exist():
    pytest.importorskip("typer")
    lines = [line for block in blocks("bash") for line in block.values[0].splitlines() if line.startswith("fusedloss ")]
    assert lines
    wide = {**os.environ, "COLUMNS": "200", "TERMINAL_WIDTH": "200"}
    for line in lines:
        command, flags = line.split()[1], re.findall(r"--[a-z-]+", line)
        shown = subprocess.run(
            [sys.executable, "-m", "fusedloss", command, "--help"], capture_output=True, text=True, cwd=ROOT, env=wide
        )
        assert shown.returncode == 0, shown.stderr
        for flag in flags:
            assert flag in shown.stdout, f"{line}: {command} has no {flag}"
