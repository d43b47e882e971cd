"""Documents are run: every python block, every docstring example, every command-line flag that they mention."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import fusedloss

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Every module with an example, in the package's own order.
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "fusedloss").rglob("*.py"))
    if ">>> " in path.read_text()
]


def blocks(language: str):
    for path in DOCUMENTS:
        for number, text in enumerate(re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.S)):
            yield pytest.param(text, id=f"{path.name}-{number}")


@pytest.mark.parametrize("code", list(blocks("python")))
def test_python_blocks_run(code):
    exec(compile(code, "<document>", "exec"), {})


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(
        module,
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
        extraglobs={"torch": torch, "fusedloss": fusedloss, **vars(fusedloss)},
    )
    assert result.failed == 0


def test_every_public_name_has_an_example():
    records = {"RowStatistics"}  # fields of a result
    for name in sorted(set(fusedloss.__all__) - records):
        public = getattr(fusedloss, name)
        if callable(public):
            assert ">>>" in (public.__doc__ or ""), f"{name} has no example"


def command_lines():
    """Our command in shell blocks, without their comments, and in the text."""
    for path in DOCUMENTS:
        lines = re.findall(r"^fusedloss [^#\n]+|(?<=`)fusedloss [a-z]+(?: [^`\n]*)?(?=`)", path.read_text(), re.M)
        yield from (pytest.param(line, id=f"{path.name}-{line}") for line in lines)


@pytest.mark.parametrize("line", list(command_lines()))
def test_commands_in_documents_exist(line, capsys, monkeypatch):
    pytest.importorskip("typer")
    from fusedloss.cli.main import run

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    command, flags = line.split()[1], set(re.findall(r" (--[a-z-]+)", line))
    assert run([command, "--help"]) == 0
    missing = flags - set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert not missing, f"{command} has no {missing}"
