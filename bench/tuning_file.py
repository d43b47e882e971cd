"""The text of fusedloss/backends/triton/tuning.py: tables in, a module out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

PATH = Path(__file__).parent.parent / "fusedloss" / "backends" / "triton" / "tuning.py"
Entry = tuple[int, ...]
Tables = dict[str, dict[str, dict[str, Entry]]]

_HEAD = '''"""Tile sizes of each shape class: what ``python -m bench.tune`` measured, and defaults where it hasn't been.

Read at every launch, so that nothing is tuned while a program runs.
"""

# Stem, type: when, on what device and with which versions the table was measured. None: these are untuned defaults,
# chosen by registers and spills (python -m bench.resources) and never timed on a GPU.
MEASURED: dict[str, dict[str, str | None]] = {
'''
_TABLES = """}

# Stem, type of the input, shape class: the fields of the stem's tile in ``launch``.
TABLES: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {
"""


def text(measured: Mapping[str, Mapping[str, str | None]], tables: Tables) -> str:
    """The module that holds these."""
    lines = [_HEAD]
    for stem, dates in sorted(measured.items()):
        lines.append(f"    {_quoted(stem)}: {{\n")
        lines += [f"        {_quoted(dtype)}: {_quoted(when) if when else None},\n" for dtype, when in dates.items()]
        lines.append("    },\n")
    lines.append(_TABLES)
    for stem, types in sorted(tables.items()):
        lines.append(f"    {_quoted(stem)}: {{\n")
        for dtype, classes in types.items():
            lines.append(f"        {_quoted(dtype)}: {{\n")
            lines += [f"            {_quoted(name)}: {entry},\n" for name, entry in classes.items()]
            lines.append("        },\n")
        lines.append("    },\n")
    return "".join([*lines, "}\n"])


def _quoted(word: str) -> str:
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'
