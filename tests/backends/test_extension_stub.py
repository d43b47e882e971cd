"""_C.pyi says what the compiled module holds: every function and class, the arguments' names and order."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import fusedloss
from fusedloss.backends.cpp import extension, unavailable_reason
from fusedloss.core.row_loss import RowOptions

pytestmark = pytest.mark.skipif(unavailable_reason("cpu") is not None, reason="no compiled module")

STUB = ast.parse((Path(fusedloss.__file__).parent / "_C.pyi").read_text())
DEFINITIONS = {node.name: node for node in STUB.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
FUNCTIONS = [name for name, node in DEFINITIONS.items() if isinstance(node, ast.FunctionDef)]
CLASSES = [name for name, node in DEFINITIONS.items() if isinstance(node, ast.ClassDef) and name != "RowOptions"]


def public(names):
    return {name for name in names if not name.startswith("_")}


def split_top(text):
    """The parts between the commas that lie in no bracket."""
    depth, parts = 0, [""]
    for character in text:
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def module_arguments(function):
    """Argument names as pybind11's docstring shows them, in order; without self."""
    signature = re.match(r"\w+\((.*)\) -> ", function.__doc__.splitlines()[0])
    assert signature, f"no signature, or several: {function.__doc__}"
    names = [re.split(r"[:=]", part)[0].strip() for part in split_top(signature.group(1))]
    return [name for name in names if name not in ("self", "*", "/")]


def stub_arguments(node):
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [argument.arg for argument in arguments if argument.arg != "self"]


def compare(name, function, node):
    given, written = module_arguments(function), stub_arguments(node)
    assert len(given) == len(written), f"{name}: {given}, not {written}"
    # An argument that the binding does not name is arg0, arg1, ...
    named = [(one, other) for one, other in zip(given, written, strict=True) if not re.fullmatch(r"arg\d+", one)]
    assert all(one == other for one, other in named), f"{name}: {given}, not {written}"


def test_the_same_names():
    assert public(vars(extension)) == public(DEFINITIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_arguments(name):
    compare(name, getattr(extension, name), DEFINITIONS[name])


# Without a class there is nothing to compare.
@pytest.mark.parametrize("name", CLASSES or [pytest.param("", marks=pytest.mark.skip(reason="no classes"))])
def test_the_same_members(name):
    body = DEFINITIONS[name].body
    methods = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    fields = {node.target.id for node in body if isinstance(node, ast.AnnAssign)}
    bound = getattr(extension, name)
    assert public(vars(bound)) == public(methods.keys() | fields)
    for method, node in methods.items():
        function = getattr(bound, method)
        if not isinstance(inspect.getattr_static(bound, method), property):
            compare(f"{name}.{method}", function, node)


def test_the_options_of_a_row_are_those_of_python():
    bound = extension.RowOptions
    assert module_arguments(bound.__init__) == list(RowOptions._fields)
    assert public(vars(bound)) == set(RowOptions._fields)
    values = RowOptions(*range(len(RowOptions._fields)))
    for made, meant in ((bound(), RowOptions()), (bound(*values), values), (bound(**values._asdict()), values)):
        assert RowOptions(*(getattr(made, name) for name in RowOptions._fields)) == meant


@pytest.mark.parametrize(
    ("docstring", "names"),
    [
        ("f(a: tuple[int, int], b: int = 3) -> None\n\nText.", ["a", "b"]),
        ("f(arg0: typing.SupportsInt | int, *, c: dict[str, (int, int)]) -> float\n", ["arg0", "c"]),
        ("f() -> str\n", []),
    ],
)
def test_reading_a_signature(docstring, names):
    assert module_arguments(type("F", (), {"__doc__": docstring})) == names
