"""Machine code of NVIDIA kernels as ``nvdisasm`` prints it: instructions, branch targets, loops, resources."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?)(U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^\s*(\.L_[\w$]+|\$[\w$.]+|[A-Za-z_][\w$]*):\s*$")
_TARGET = re.compile(r"`\(([^)]+)\)")
_REGISTER = re.compile(r"(?<![\w.])U?R\d+")
_PADDING = "NOP"


class Instruction(NamedTuple):
    """One line: its predicate ("" if none) and whether it is negated, the operation with its modifiers, operands."""

    predicate: str
    negated: bool
    op: str
    operands: tuple[str, ...]
    target: str

    @property
    def base(self) -> str:
        return self.op.split(".", 1)[0]


class Loop(NamedTuple):
    """A backward branch: the first instruction of its body and the branch."""

    first: int
    branch: int


class Listing(NamedTuple):
    """The code of a kernel with the subroutines it calls; `labels` are places in `code`."""

    code: tuple[Instruction, ...]
    labels: dict[str, int]
    loops: tuple[Loop, ...]

    def innermost(self, place: int) -> Loop | None:
        """The smallest loop around an instruction."""
        around = [loop for loop in self.loops if loop.first <= place <= loop.branch]
        return min(around, key=lambda loop: loop.branch - loop.first, default=None)


class Resources(NamedTuple):
    """Of one kernel: registers of a thread; bytes of static shared memory, stack and local memory."""

    registers: int
    shared: int
    stack: int
    local: int


def split_operands(text: str) -> tuple[str, ...]:
    """Operands between commas that no bracket encloses."""
    parts = re.split(r",\s*(?![^\[]*\])", text) if text else []
    return tuple(part.strip().replace(".reuse", "") for part in parts)


def parse(text: str) -> Listing:
    """The instructions of a listing made by ``nvdisasm -c``."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        found = _LINE.match(line)
        if found:
            _, negation, predicate, op, operands = found.groups()
            target = _TARGET.search(operands)
            code.append(
                Instruction(
                    predicate or "", bool(negation), op, split_operands(operands), target.group(1) if target else ""
                )
            )
            continue
        label = _LABEL.match(line)
        if label:
            labels.setdefault(label.group(1), len(code))
    return Listing(tuple(code), labels, tuple(_loops(code, labels)))


def _loops(code: list[Instruction], labels: dict[str, int]) -> Iterable[Loop]:
    for place, instruction in enumerate(code):
        if instruction.base == "BRA" and labels.get(instruction.target, place) < place:
            yield Loop(labels[instruction.target], place)


def registers_of(operand: str) -> list[str]:
    """The registers that an operand names."""
    return _REGISTER.findall(operand)


def _tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _printed(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_tool(tool)), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.lru_cache(maxsize=64)
def listing(cubin: bytes) -> Listing:
    """Disassembles with the nvdisasm that comes with Triton."""
    return parse(_printed("nvdisasm", "-c", cubin))


@functools.lru_cache(maxsize=64)
def resources(cubin: bytes) -> Resources:
    """Reads a kernel's resources with the cuobjdump that comes with Triton."""
    text = _printed("cuobjdump", "--dump-resource-usage", cubin)
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return Resources(numbers["REG"], numbers["SHARED"], numbers["STACK"], numbers["LOCAL"])
