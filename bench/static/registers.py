"""Registers of one thread, and how the operands of an instruction are read.

A register holds a 32-bit number, or None where it isn't known: what was loaded from a tensor of floats, or comes from
an operation that isn't followed. Whatever is computed from None is None.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence

from bench.static.sass import Instruction

Value = int | None
MASK, MASK64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
_PREDICATE = re.compile(r"^(!?)(U?P(?:\d+|T))$")
_REGISTER = re.compile(r"^(-?)(~?)(\|?)(U?R)(\d+|Z)(?:\.\w+)*\|?$")
CONSTANT = re.compile(r"^(-?)(~?)c\[0x0\]\[(0x[0-9a-f]+)\]$")
_SPECIAL = {"SRZ": 0, "SR_LANEID": 0, "SR_CgaCtaId": 0, "SR_CgaSize": 0}


class State:
    """Registers and predicates of one thread, its constant bank, its special registers, and shared memory."""

    def __init__(self, constants: bytes, special: dict[str, int]) -> None:
        self.registers: dict[str, Value] = {}
        self.predicates: dict[str, bool | None] = {"PT": True, "UPT": True}
        self.constants = constants
        self.special = _SPECIAL | special
        self.shared: dict[int, Value] = {}

    def constant(self, offset: int) -> Value:
        if offset + 4 > len(self.constants):
            return None
        return int.from_bytes(self.constants[offset : offset + 4], "little")

    def set(self, name: str, value: Value) -> None:
        if name:
            self.registers[name] = value if value is None else value & MASK

    def set64(self, name: str, value: Value) -> None:
        self.set(name, value)
        self.set(following(name, 1), value if value is None else value >> 32)

    def set_predicate(self, name: str, value: bool | None) -> None:
        if not name.endswith("PT"):
            self.predicates[name] = value


Read = Callable[[State], Value]
Test = Callable[[State], bool | None]


def following(name: str, count: int) -> str:
    """The register so many places behind another; "" stays."""
    prefix = name.rstrip("0123456789")
    return f"{prefix}{int(name[len(prefix) :]) + count}" if name else ""


def is_predicate(operand: str) -> bool:
    return _PREDICATE.match(operand) is not None


def register_name(operand: str) -> str:
    """The register that an operand is, "" for the one that is always 0 and for anything else."""
    found = _REGISTER.match(operand)
    return "" if found is None or found[5] == "Z" else found[4] + found[5]


def test(operand: str) -> Test:
    """Reads a predicate operand."""
    negation, name = _PREDICATE.match(operand).groups()  # type: ignore[union-attr]
    if negation:

        def negated(state: State) -> bool | None:
            value = state.predicates.get(name)
            return None if value is None else not value

        return negated
    return lambda state: state.predicates.get(name)


def float_bits(value: float) -> int:
    try:
        return int.from_bytes(struct.pack("<f", value), "little")
    except OverflowError:
        return float_bits(float("inf"))


def bits_float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits & MASK))[0])


def _number(text: str) -> Value:
    try:
        return int(text, 0)
    except ValueError:
        pass
    try:
        return float_bits(float(text.replace("QNAN", "NAN").replace("SNAN", "NAN")))
    except ValueError:
        return None


def read(operand: str, wide: bool = False) -> Read:
    """Reads an operand of 32 or 64 bits, two's complement of what has a minus sign."""
    register = _REGISTER.match(operand)
    constant = CONSTANT.match(operand)
    mask = MASK64 if wide else MASK
    if register:
        minus, inverse, absolute, _, index = register.groups()
        get = _read_register(register_name(operand), wide)
        if index == "Z":
            return (lambda state: mask) if inverse else (lambda state: 0)
        if absolute:
            return lambda state: None
        return _signed(get, bool(minus), bool(inverse), mask)
    if constant:
        offset = int(constant[3], 16)
        if wide:
            return _signed(_join(offset), bool(constant[1]), bool(constant[2]), mask)
        return _signed(lambda state: state.constant(offset), bool(constant[1]), bool(constant[2]), mask)
    value = _number(operand)
    if value is not None:
        known = value & mask
        return lambda state: known
    return lambda state: None


def read_float(operand: str) -> Read:
    """An operand of an operation on floats, whose numbers are written as floats."""
    try:
        bits = float_bits(float(operand))
    except ValueError:
        return read(operand) if not operand.startswith("-") else lambda state: None
    return lambda state: bits


def _read_register(name: str, wide: bool) -> Read:
    if not wide:
        return lambda state: state.registers.get(name)
    second = following(name, 1)

    def both(state: State) -> Value:
        low, high = state.registers.get(name), state.registers.get(second)
        return None if low is None or high is None else low | high << 32

    return both


def _join(offset: int) -> Read:
    def both(state: State) -> Value:
        low, high = state.constant(offset), state.constant(offset + 4)
        return None if low is None or high is None else low | high << 32

    return both


def _signed(get: Read, minus: bool, inverse: bool, mask: int) -> Read:
    if not minus and not inverse:
        return get

    def changed(state: State) -> Value:
        value = get(state)
        if value is None:
            return None
        # -0 carries out of an addition, as the machine's inverse plus one does.
        return mask + 1 - value if minus else value ^ mask

    return changed


def signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


class Operands:
    """An instruction's operands in order: registers and predicates that it writes, then what it reads."""

    def __init__(self, instruction: Instruction) -> None:
        self.op = instruction.op
        self.parts = set(instruction.op.split("."))
        operands = list(instruction.operands)
        self.to_predicates: list[str] = []
        self.to = ""
        if operands and is_predicate(operands[0]):
            while operands and len(self.to_predicates) < 2 and is_predicate(operands[0]):
                self.to_predicates.append(operands.pop(0))
        elif operands:
            self.to = register_name(operands.pop(0))
            while operands and is_predicate(operands[0]) and not operands[0].startswith("!"):
                self.to_predicates.append(operands.pop(0))
        self.tests = [test(operand) for operand in operands if is_predicate(operand)]
        self.sources = [operand for operand in operands if not is_predicate(operand)]

    def reads(self, wide: Sequence[int] = ()) -> list[Read]:
        return [read(operand, place in wide) for place, operand in enumerate(self.sources)]
