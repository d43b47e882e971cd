"""CONTRIBUTING's steps, carried out in a scratch copy of the package: nothing else may need a change."""

import filecmp
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import scratch

from fusedloss import backends
from fusedloss.backends import cpp

ROOT = Path(__file__).parents[2]
BACKENDS = ["reference"] + (["cpp"] if backends.resolve_backend("cpu") == "cpp" else [])

CHECK_AFFINE = """
logits, labels = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, -100])
offset = torch.randn(5, requires_grad=True)
result = fusedloss.cross_entropy(logits, labels, terms=[fusedloss.Scale(2.0), fusedloss.Shift(offset)])
expected = F.cross_entropy(2 * logits + offset, labels)
compare(result, expected, [logits, offset])
layer = torch.nn.Linear(3, 5)
folded = fusedloss.CrossEntropyLoss(terms=[fusedloss.Shift(offset)]).fold_into(layer)
torch.testing.assert_close(folded(torch.ones(1, 3)), layer(torch.ones(1, 3)) + offset)
"""
CHECK_MARGIN = """
logits, labels = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 0])
amount = torch.tensor(0.3, requires_grad=True)
terms = [fusedloss.Shrink(amount), fusedloss.Scale(3.0)]
result = fusedloss.cross_entropy(logits, labels, terms=terms, label_smoothing=0.1)
chosen = F.one_hot(labels, 5)
expected = F.cross_entropy(3 * (logits - chosen * amount * torch.tanh(logits)), labels, label_smoothing=0.1)
compare(result, expected, [logits, amount])
"""
CHECK_ROW = """
logits, labels = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, -100])
weight = torch.rand(5)
result = Polynomial(weight=weight)(logits, labels)
p = logits[:5].softmax(1).gather(1, labels[:5].unsqueeze(1)).squeeze(1)
expected = (weight[labels[:5]] * (1 - p - p.log())).sum() / weight[labels[:5]].sum()
compare(result, expected, [logits])
"""
CHECK_OPTION = """
logits, labels = 3 * torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, -100])
for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.01}, {"focal_gamma": 2.0, "poly_epsilon": 0.5}):
    x = logits.clone().requires_grad_()
    result = fusedloss.cross_entropy(x, labels, poly2_epsilon=0.7, **options)
    p = x[:5].softmax(1).gather(1, labels[:5].unsqueeze(1)).squeeze(1)
    compare(result, fusedloss.cross_entropy(x, labels, **options) + 0.7 * (1 - p).square().mean(), [x])
"""
PRELUDE = """
import torch, fusedloss
import torch.nn.functional as F

def compare(result, expected, tensors):
    torch.testing.assert_close(result, expected)
    for one, other in zip(torch.autograd.grad(result, tensors), torch.autograd.grad(expected, tensors), strict=True):
        torch.testing.assert_close(one, other)
"""


def section_of(heading):
    return (ROOT / "CONTRIBUTING.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]


def code_of(heading):
    """The code block under a heading of CONTRIBUTING.md."""
    return re.search(r"```python\n(.*?)```", section_of(heading), re.S).group(1)


def class_of(code):
    """The class that a code block defines, with its decorator."""
    return re.search(r"((?:@dataclass[^\n]*\n)?class .*?)\n\n\n", code, re.S).group(1)


def changes_of(heading):
    """(file, lines before, lines after) of the ```diff blocks under a heading, each of the first file of its step."""
    for step in re.split(r"^\d+\. ", section_of(heading), flags=re.M)[1:]:
        block = re.search(r"^( *)```diff\n(.*?)^ *```", step, re.M | re.S)
        if not block:
            continue
        path = re.search(r"`((?:fusedloss|csrc)/[\w/]+\.\w+)`", step).group(1)
        lines = [line[len(block.group(1)) :] for line in block.group(2).splitlines()]
        for hunk in split_at(lines, "@@"):
            before, after = ([line[1:] for line in hunk if line[:1] != sign] for sign in "+-")
            yield path, "\n".join(before) + "\n", "\n".join(after) + "\n"


def split_at(lines, separator):
    parts = [[]]
    for line in lines:
        if line == separator:
            parts.append([])
        else:
            parts[-1].append(line)
    return parts


@pytest.fixture
def folder(tmp_path):
    return scratch.copy_package(tmp_path)


def run(folder, code, names=BACKENDS):
    """Runs code on each of the backends, with the package that is in the folder."""
    code = PRELUDE + "".join(f"with fusedloss.backend('{name}'):\n{textwrap.indent(code, '    ')}\n" for name in names)
    environment = {**os.environ, "PYTHONPATH": str(folder), "TRITON_INTERPRET": str(int("triton" in names))}
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def changed(folder):
    """Files of the copy that differ from the repository's, or are missing there; without what was compiled."""
    paths = [path.relative_to(folder) for name in ("fusedloss", "csrc") for path in (folder / name).rglob("*")]
    sources = [path for path in paths if path.suffix in (".py", ".pyi", ".h", ".inl", ".cpp")]
    return {
        str(path)
        for path in sources
        if not (ROOT / path).exists() or not filecmp.cmp(folder / path, ROOT / path, shallow=False)
    }


def exported(folder, name, module):
    """Writes the export of a new term into both packages' __init__.py."""
    inner, outer = folder / "fusedloss" / "terms" / "__init__.py", folder / "fusedloss" / "__init__.py"
    inner.write_text(inner.read_text() + f"\nfrom fusedloss.terms.{module} import {name}\n")
    outer.write_text(outer.read_text() + f"\nfrom fusedloss.terms import {name}\n")


@pytest.mark.parametrize(
    ("heading", "module", "name", "check"),
    [
        ("How to add an affine term", "affine", "Shift", CHECK_AFFINE),
        ("How to add a margin", "margins", "Shrink", CHECK_MARGIN),
    ],
)
def test_a_new_term_is_one_class(folder, heading, module, name, check):
    path = folder / "fusedloss" / "terms" / f"{module}.py"
    source = class_of(code_of(heading)).replace("torch.Tensor", "Tensor")
    assert f"class {name}" in source
    path.write_text(f"{path.read_text()}\n\nimport torch\n\n\n{source}\n")
    exported(folder, name, module)
    if "cpp" in BACKENDS:
        shutil.copy(cpp.extension.__file__, folder / "fusedloss")
    run(folder, check)
    assert changed(folder) == {f"fusedloss/terms/{module}.py", "fusedloss/terms/__init__.py", "fusedloss/__init__.py"}


def test_a_row_option_is_a_few_lines_in_each_language(folder):
    changes = list(changes_of("How to add a row option"))
    for path, before, after in changes:
        scratch.replace_once(folder / path, before, after)
    files = {path for path, _, _ in changes}
    names = ["reference"]
    if any(path.startswith("csrc/") for path in files):
        scratch.build_kernels(folder)
        names.append("cpp")
    if any("triton" in path for path in files):
        names.append("triton")
    run(folder, CHECK_OPTION, names)
    assert changed(folder) == files
    assert len(files) <= 7


def test_a_row_of_ones_own_changes_no_file():
    run(ROOT, class_of(code_of("How to add a row of your own")) + "\n" + CHECK_ROW)


def test_the_files_that_the_steps_name_exist():
    """<stem> stands for each operation."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`((?:fusedloss|tests|docs|bench|csrc)/[\w/<>]+\.\w+)`", text))
    assert len(named) >= 10
    for path in named:
        for stem in backends.OPERATIONS:
            assert (ROOT / path.replace("<stem>", stem)).exists(), path.replace("<stem>", stem)
