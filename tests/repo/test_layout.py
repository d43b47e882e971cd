"""The house: who imports whom, which files mirror each other, and what the repository may not hold."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusedloss import backends

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fusedloss"
# From the leaves up: a module may import from its own layer and from those before it. "" is the package itself, which
# exports the names of losses and below.
LAYERS = (
    ("terms", "core", "atomic_io", "folder_lock"),
    ("backends",),
    ("ops",),
    ("distributed",),
    ("functional",),
    ("losses", "longtail", "temperature", "calibration", "metrics", "retrieval"),
    ("",),
    ("features", "train", "integrations"),
    ("cli",),
    ("__main__",),
)
HEAVY = (
    "timm",
    "transformers",
    "matplotlib",
    "sklearn",
    "PIL",
    "typer",
    "tqdm",
    "safetensors",
    "triton",
    "torch._dynamo",
)


def layer(name):
    """Of a dotted name in the package."""
    part = [*name.split("."), ""][1]
    ranks = [rank for rank, names in enumerate(LAYERS) if part in names]
    assert ranks, f"{name} has no layer: add it to LAYERS"
    return ranks[0]


def module_names():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path, name):
    """Dotted names in the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "fusedloss")
        elif isinstance(node, ast.ImportFrom):
            # A relative import starts at the file's own package.
            package = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            module = ".".join(part for part in (package, node.module) if part)
            if module.split(".")[0] == "fusedloss":
                for alias in node.names:
                    inner = PACKAGE.joinpath(*module.split(".")[1:], alias.name)
                    is_module = inner.is_dir() or inner.with_suffix(".py").exists() or alias.name == "_C"
                    yield f"{module}.{alias.name}" if is_module else module


@pytest.mark.parametrize("path, name", [pytest.param(path, name, id=name) for path, name in module_names()])
def test_imports_go_down(path, name):
    for imported in imports_of(path, name):
        if imported == "fusedloss._C":
            assert name.startswith(("fusedloss.backends.cpp", "fusedloss.cli")), name
        else:
            assert layer(imported) <= layer(name), f"{name} imports {imported}"


def test_the_package_itself_is_above_what_it_exports():
    assert layer("fusedloss.losses.vace") < layer("fusedloss") < layer("fusedloss.train")


def test_no_imports_in_a_circle():
    """Those inside functions and those for types alone included."""
    names = dict(module_names())
    graph = {
        name: {imported for imported in imports_of(path, name) if imported in names.values()} - {name}
        for path, name in names.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


# Modules that still take private names of others; the list may only become shorter.
BORROWERS: set[tuple[str, str]] = set()


def private_names_of_others(path, name):
    """Private names that a module imports from another, or reads from a module that it imports."""
    tree = ast.parse(path.read_text())
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "fusedloss"):
            for alias in node.names:
                if alias.name.startswith("_") and alias.name != "_C":
                    yield alias.name
                modules.add(alias.asname or alias.name)
    names = {module.rpartition(".")[2] for _, module in module_names()}
    for node in ast.walk(tree):
        private = isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        if private and isinstance(node.value, ast.Name) and node.value.id in modules & names and node.attr != "_C":
            yield f"{node.value.id}.{node.attr}"


def test_nobody_takes_private_names_of_another_module():
    borrowed = {(name, private) for path, name in module_names() for private in private_names_of_others(path, name)}
    assert borrowed == BORROWERS


def test_terms_and_core_are_leaves():
    for path, name in module_names():
        if name.split(".")[1:2] in (["terms"], ["core"]):
            assert all(result.startswith(("fusedloss.terms", "fusedloss.core")) for result in imports_of(path, name)), (
                name
            )


def test_an_operation_has_the_same_name_in_every_layer():
    for stem in backends.OPERATIONS:
        for name in backends.NAMES:
            assert (PACKAGE / "backends" / name / f"{stem}.py").exists(), (name, stem)
        for name in (f"{stem}.inl", f"{stem}.h", f"bind_{stem}.cpp"):
            assert (ROOT / "csrc" / name).exists(), name
        assert (ROOT / "tests" / "backends" / f"test_{stem}.py").exists()
        assert (ROOT / "bench" / f"{stem}.py").exists()


def test_the_kernels_know_neither_torch_nor_outside_the_bindings_python():
    for path in sorted((ROOT / "csrc").iterdir()):
        text = path.read_text()
        assert not re.search(r"#include\s*<(torch|ATen|c10)/", text), path
        if not path.name.startswith("bind"):
            assert not re.search(r"#include\s*<(pybind11/|Python\.h)", text), path


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, torch; before = set(sys.modules); import fusedloss; "
        f"print([m for m in {HEAVY} if m in set(sys.modules) - before])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stdout + result.stderr


def repository_files():
    """Text files that git knows or would add; without git, those beside the tests."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.splitlines()]
    else:
        folders = ("fusedloss", "csrc", "tests", "bench", "docs", "examples")
        paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
        paths += list(ROOT.glob("*.*"))
    for path in paths:
        if path.is_file() and b"\0" not in path.read_bytes()[:4096]:
            yield path


def test_no_file_names_a_machines_folders():
    folders = "|".join(("work", "tmp", "root", "home"))
    machine_path = re.compile(rf"(?<![\w.~}}])/(?:{folders})/\w")
    for path in repository_files():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            assert not machine_path.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_there_is_no_utils():
    assert not [path for path in PACKAGE.rglob("*.py") if path.stem in ("utils", "helpers", "common", "misc")]
