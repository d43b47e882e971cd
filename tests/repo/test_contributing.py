"""CONTRIBUTING's steps, carried out in a scratch copy of the package: nothing else may need a change."""

import filecmp
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fusedloss import backends

ROOT = Path(__file__).parents[2]
BACKENDS = ["reference"] + (["cpp"] if backends.resolve_backend("cpu") == "cpp" else [])

CHECK_AFFINE = """
logits, labels = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, -100])
offset = torch.randn(5, requires_grad=True)
found = fusedloss.cross_entropy(logits, labels, terms=[fusedloss.Scale(2.0), fusedloss.Shift(offset)])
expected = F.cross_entropy(2 * logits + offset, labels)
compare(found, expected, [logits, offset])
layer = torch.nn.Linear(3, 5)
folded = fusedloss.CrossEntropyLoss(terms=[fusedloss.Shift(offset)]).fold_into(layer)
torch.testing.assert_close(folded(torch.ones(1, 3)), layer(torch.ones(1, 3)) + offset)
"""
CHECK_MARGIN = """
logits, labels = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 0])
amount = torch.tensor(0.3, requires_grad=True)
terms = [fusedloss.Shrink(amount), fusedloss.Scale(3.0)]
found = fusedloss.cross_entropy(logits, labels, terms=terms, label_smoothing=0.1)
chosen = F.one_hot(labels, 5)
expected = F.cross_entropy(3 * (logits - chosen * amount * torch.tanh(logits)), labels, label_smoothing=0.1)
compare(found, expected, [logits, amount])
"""
CHECK_ROW = """
logits, labels = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, -100])
weight = torch.rand(5)
found = Polynomial(weight=weight)(logits, labels)
p = logits[:5].softmax(1).gather(1, labels[:5].unsqueeze(1)).squeeze(1)
expected = (weight[labels[:5]] * (1 - p - p.log())).sum() / weight[labels[:5]].sum()
compare(found, expected, [logits])
"""
PRELUDE = """
import torch, fusedloss
import torch.nn.functional as F

def compare(found, expected, tensors):
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, tensors), torch.autograd.grad(expected, tensors), strict=True):
        torch.testing.assert_close(one, other)
"""


def code_of(heading):
    """The code block under a heading of CONTRIBUTING.md."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.S).group(1)


def class_of(code):
    """The class that a code block defines, with its decorator."""
    return re.search(r"((?:@dataclass[^\n]*\n)?class .*?)\n\n\n", code, re.S).group(1)


@pytest.fixture
def scratch(tmp_path):
    shutil.copytree(ROOT / "fusedloss", tmp_path / "fusedloss", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(scratch, code):
    environment = {**os.environ, "PYTHONPATH": str(scratch)}
    for backend in BACKENDS:
        found = subprocess.run(
            [sys.executable, "-c", PRELUDE + code],
            env={**environment, "FUSEDLOSS_BACKEND": backend},
            cwd=scratch,
            capture_output=True,
            text=True,
        )
        assert found.returncode == 0, f"{backend}: {found.stderr}"


def changed(scratch):
    """Files of the scratch copy that differ from the repository's."""
    paths = [path.relative_to(scratch) for path in (scratch / "fusedloss").rglob("*") if path.is_file()]
    paths = [path for path in paths if path.suffix != ".pyc"]
    return {str(path) for path in paths if not filecmp.cmp(scratch / path, ROOT / path, shallow=False)}


def exported(scratch, name, module):
    """Writes the export of a new term into both packages' __init__.py."""
    inner, outer = scratch / "fusedloss" / "terms" / "__init__.py", scratch / "fusedloss" / "__init__.py"
    inner.write_text(inner.read_text() + f"\nfrom fusedloss.terms.{module} import {name}\n")
    outer.write_text(outer.read_text() + f"\nfrom fusedloss.terms import {name}\n")


@pytest.mark.parametrize(
    ("heading", "module", "name", "check"),
    [
        ("How to add an affine term", "affine", "Shift", CHECK_AFFINE),
        ("How to add a margin", "margins", "Shrink", CHECK_MARGIN),
    ],
)
def test_a_new_term_is_one_class(scratch, heading, module, name, check):
    path = scratch / "fusedloss" / "terms" / f"{module}.py"
    source = class_of(code_of(heading)).replace("torch.Tensor", "Tensor")
    assert f"class {name}" in source
    path.write_text(f"{path.read_text()}\n\nimport torch\n\n\n{source}\n")
    exported(scratch, name, module)
    run(scratch, check)
    assert changed(scratch) == {f"fusedloss/terms/{module}.py", "fusedloss/terms/__init__.py", "fusedloss/__init__.py"}


def test_a_row_of_ones_own_changes_no_file(scratch):
    run(scratch, class_of(code_of("How to add a row of your own")) + "\n" + CHECK_ROW)
    assert changed(scratch) == set()


def test_the_files_that_the_steps_name_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path in set(re.findall(r"`((?:fusedloss|tests|docs|bench|csrc)/[\w/]+\.\w+)`", text)):
        assert (ROOT / path).exists(), path
