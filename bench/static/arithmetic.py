"""Integer arithmetic of the machine code, as far as addresses, loop counters and branches need it."""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable, Sequence
from typing import Any

from bench.static.registers import (
    CONSTANT,
    MASK,
    MASK64,
    Operands,
    Read,
    State,
    Value,
    bits_float,
    float_bits,
    following,
    read,
    read_float,
    register_name,
    signed,
)

_COMPARISONS = {
    "EQ": operator.eq, "NE": operator.ne, "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge,
    "NEU": operator.ne, "GEU": operator.ge, "GTU": operator.gt, "LTU": operator.lt, "LEU": operator.le,
}  # fmt: skip

Step = Callable[[State], Any]


def _values(reads: Sequence[Read], state: State) -> list[int] | None:
    found = [get(state) for get in reads]
    return None if None in found else found  # type: ignore[return-value]


def _simple(compute: Callable[..., int], count: int) -> Callable[[Operands], Step]:
    """Operations whose result depends on `count` numbers only."""

    def build(operands: Operands) -> Step:
        reads, to = operands.reads()[:count], operands.to

        def step(state: State) -> None:
            values = _values(reads, state)
            state.set(to, None if values is None else compute(*values))

        return step

    return build


def _multiply(operands: Operands) -> Step:
    """IMAD and its kinds: a * b + c, of 64 bits with WIDE, the upper half with HI."""
    parts, to = operands.parts, operands.to
    wide, high, unsigned = "WIDE" in parts, "HI" in parts, "U32" in parts
    a, b, c = operands.reads((2,) if wide or high else ())[:3]
    carries, out = operands.tests if "X" in parts else [], operands.to_predicates[:1]

    def step(state: State) -> None:
        values = _values((a, b, c), state)
        carried = [carry(state) for carry in carries]
        if values is None or None in carried:
            (state.set64 if wide else state.set)(to, None)
            for name in out:
                state.set_predicate(name, None)
            return
        x, y, z = values[0] & MASK, values[1] & MASK, values[2]
        if (wide or high) and not unsigned:
            x, y = signed(x), signed(y)
        total = x * y + z + sum(map(bool, carried))
        result = total & MASK64
        for name in out:
            state.set_predicate(name, total >> (64 if wide else 32) != 0)
        if wide:
            state.set64(to, result)
        else:
            state.set(to, result >> 32 if high else result)

    return step


def _add(operands: Operands) -> Step:
    """IADD3 and IADD: up to three numbers, a carry into X, and carries out."""
    wide = "64" in operands.parts
    reads = operands.reads((0, 1, 2) if wide else ())[:3]
    to, out = operands.to, operands.to_predicates
    carries = operands.tests if "X" in operands.parts else []
    bits = 64 if wide else 32

    def step(state: State) -> None:
        values = _values(reads, state)
        carried = [carry(state) for carry in carries]
        known = values is not None and None not in carried
        total = sum(values or ()) + sum(map(bool, carried))
        (state.set64 if wide else state.set)(to, total if known else None)
        for place, name in enumerate(out):
            # Three numbers may carry twice.
            state.set_predicate(name, total >> bits > place if known else None)

    return step


def _lea(operands: Operands) -> Step:
    """LEA: (a << s) + b; HI takes the upper half of a 64-bit shift, of which X adds the carry of the lower."""
    parts, to, out = operands.parts, operands.to, operands.to_predicates[:1]
    high, extend = "HI" in parts, "SX32" in parts
    # The shifted number is taken from b: 0 too carries then.
    minus = operands.sources[0].startswith("-") and not high
    operands.sources[0] = operands.sources[0].lstrip("-") if minus else operands.sources[0]
    reads = operands.reads()
    carries = operands.tests if "X" in parts else []

    def step(state: State) -> None:
        values = _values(reads, state)
        carried = [carry(state) for carry in carries]
        if values is None or None in carried or len(values) < 3:
            state.set(to, None)
            for name in out:
                state.set_predicate(name, None)
            return
        if not high:
            a, b, shift = values[:3]
            shifted = (a << (shift & 31)) & MASK
            total = (MASK + 1 - shifted if minus else shifted) + b
        elif extend:
            a, b, shift = values[:3]
            total = ((signed(a) << (shift & 31) >> 32) & MASK) + b
        else:
            a, b, upper, shift = values if len(values) == 4 else (values[0], values[1], 0, values[2])
            total = (((upper << 32 | a) << (shift & 31) >> 32) & MASK) + b
        total += sum(map(bool, carried))
        state.set(to, total)
        for name in out:
            state.set_predicate(name, total >> 32 != 0)

    return step


def _shift(operands: Operands) -> Step:
    """SHF: shifts of c:a, of which one half is kept."""
    parts, to = operands.parts, operands.to
    left, high = "L" in parts, "HI" in parts
    is_signed, of_both = bool(parts & {"S32", "S64"}), bool(parts & {"U64", "S64"})
    reads = operands.reads()[:3]

    def step(state: State) -> None:
        values = [get(state) for get in reads]
        low, shift, upper = values if len(values) == 3 else (*values, 0)
        if shift is None:
            state.set(to, None)
            return
        shift = shift & (31 if "W" in parts else 63)
        if left and not high:
            state.set(to, None if low is None else low << shift)
            return
        if not left and high and not of_both:
            # The upper half alone is moved down.
            state.set(to, None if upper is None else (signed(upper) if is_signed else upper) >> shift)
            return
        if low is None or upper is None:
            state.set(to, None)
            return
        both = upper << 32 | low
        if not left and is_signed:
            both = signed(both, 64)
        both = both << shift if left else both >> shift
        state.set(to, both >> 32 if high else both)

    return step


def lookup(table: int, a: int, b: int, c: int) -> int:
    """The bitwise function of three numbers that a table of eight bits names."""
    result = 0
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result & MASK


def _logic(operands: Operands) -> Step:
    sources = list(operands.sources)
    to, out = operands.to, operands.to_predicates
    if not to and out:
        # The predicate comes first where both are written.
        to = register_name(sources.pop(0))
    reads = [read(operand) for operand in sources[:3]]
    table = int(sources[3], 0) if len(sources) > 3 else 0

    def step(state: State) -> None:
        a, b, c = (get(state) for get in reads)
        if a is None or b is None or c is None:
            # An "and" with 0 is 0, whatever the other is.
            value = 0 if table in (0xC0, 0x80) and 0 in (a, b) else None
        else:
            value = lookup(table, a, b, c)
        state.set(to, value)
        for name in out:
            state.set_predicate(name, None if value is None else value != 0)

    return step


def _combine(parts: set[str], a: bool | None, b: bool | None) -> bool | None:
    if "OR" in parts:
        return True if a or b else None if a is None or b is None else False
    if "XOR" in parts:
        return None if a is None or b is None else a != b
    return False if a is False or b is False else None if a is None or b is None else True


def _compare(operands: Operands) -> Step:
    """ISETP and FSETP; EX goes on from the comparison of the lower halves."""
    parts = operands.parts
    name = next((part for part in operands.op.split(".")[1:] if part in _COMPARISONS), "")
    compare, extended = _COMPARISONS.get(name), "EX" in parts
    floats = operands.op.startswith("F")
    a, b = (read_float(operand) if floats else read(operand) for operand in operands.sources[:2])
    tests, out = operands.tests, operands.to_predicates

    def step(state: State) -> None:
        x, y = a(state), b(state)
        result: bool | None = None
        if x is not None and y is not None and compare is not None:
            x, y = x & MASK, y & MASK
            if floats:
                result = bool(compare(bits_float(x), bits_float(y)))
            else:
                left, right = (x, y) if "U32" in parts else (signed(x), signed(y))
                if extended and left == right:
                    result = tests[1](state) if len(tests) > 1 else None
                elif extended and name in ("EQ", "NE"):
                    result = name == "NE"
                elif extended:
                    result = left > right if name in ("GT", "GE") else left < right
                else:
                    result = bool(compare(left, right))
        other = tests[0](state) if tests else True
        inverse = None if result is None else not result
        for place, predicate in enumerate(out):
            state.set_predicate(predicate, _combine(parts, inverse if place else result, other))

    return step


def _select(operands: Operands) -> Step:
    a, b = operands.reads()[:2]
    to, choose = operands.to, operands.tests[0] if operands.tests else lambda state: None

    def step(state: State) -> None:
        chosen = choose(state)
        x, y = a(state), b(state)
        state.set(to, x if chosen else y if chosen is False or x == y else None)

    return step


def _extreme(operands: Operands) -> Step:
    reads, to = operands.reads()[:2], operands.to
    is_least = operands.tests[-1] if operands.tests else lambda state: None
    unsigned = "U32" in operands.parts

    def step(state: State) -> None:
        values = _values(reads, state)
        least = is_least(state)
        if values is None or least is None:
            state.set(to, None)
            return
        numbers = [value & MASK if unsigned else signed(value & MASK) for value in values]
        state.set(to, min(numbers) if least else max(numbers))

    return step


def _to_float(operands: Operands) -> Step:
    get, to = operands.reads()[0], operands.to
    unsigned, rounded_up = "U32" in operands.parts, "RP" in operands.parts
    known = not operands.parts & {"F64", "F16", "U16", "S16", "U8", "S8", "U64", "S64"}

    def step(state: State) -> None:
        value = get(state) if known else None
        if value is None:
            state.set(to, None)
            return
        number = value if unsigned or value < 1 << 31 else signed(value)
        bits = float_bits(number)
        if rounded_up and bits_float(bits) < number:
            bits += 1
        state.set(to, bits)

    return step


def _to_integer(operands: Operands) -> Step:
    get, to = operands.reads()[0], operands.to

    def step(state: State) -> None:
        bits = get(state)
        value = None if bits is None else bits_float(bits)
        usable = value is not None and abs(value) < 1 << 32
        state.set(to, int(value) if usable else None)  # type: ignore[arg-type]

    return step


def _special_function(operands: Operands) -> Step:
    get, to = operands.reads()[0], operands.to

    def step(state: State) -> None:
        bits = get(state) if operands.op == "MUFU.RCP" else None
        value = 0.0 if bits is None else bits_float(bits)
        state.set(to, float_bits(1 / value) if value else None)

    return step


def _half_constant(operands: Operands) -> Step:
    """-0 * 0 + (a, b): how a constant is loaded by the other pipe."""
    sources, to = operands.sources, operands.to
    constant: Value = None
    if len(sources) == 4 and sources[0] in ("-RZ", "RZ") and sources[1] == "RZ":
        high, low = (struct.unpack("<H", struct.pack("<e", float(text)))[0] for text in sources[2:])
        constant = high << 16 | low
    return lambda state: state.set(to, constant)


def _permute(operands: Operands) -> Step:
    reads, to = operands.reads()[:3], operands.to

    def step(state: State) -> None:
        values = _values(reads, state)
        if values is None:
            state.set(to, None)
            return
        a, selector, b = values
        source = (a | b << 32).to_bytes(8, "little")
        state.set(to, int.from_bytes(bytes(source[selector >> 4 * place & 7] for place in range(4)), "little"))

    return step


def _logic_of_predicates(operands: Operands) -> Step:
    tests, out = operands.tests, operands.to_predicates
    tables = [int(text, 0) for text in operands.sources]

    def step(state: State) -> None:
        a, b, c = (each(state) for each in tests[:3])
        for name, table in zip(out, tables, strict=False):
            state.set_predicate(name, _looked_up(table, a, b, c))

    return step


def _looked_up(table: int, *inputs: bool | None) -> bool | None:
    """The table's entry; known too where the unknown inputs don't matter."""
    rows = [0]
    for value in inputs:
        rows = [2 * row + int(bit) for row in rows for bit in ((False, True) if value is None else (value,))]
    found = {bool(table >> row & 1) for row in rows}
    return found.pop() if len(found) == 1 else None


def _special_register(operands: Operands) -> Step:
    name, to = operands.sources[0] if operands.sources else "", operands.to
    wide = operands.op == "CS2R"
    return lambda state: (state.set64 if wide else state.set)(to, state.special.get(name))


def _load_constant(operands: Operands) -> Step:
    to, source = operands.to, operands.sources[0] if operands.sources else ""
    words = 4 if "128" in operands.parts else 2 if "64" in operands.parts else 1
    found = CONSTANT.match(source)
    offset = int(found[3], 16) if found else None

    def step(state: State) -> None:
        for word in range(words):
            state.set(following(to, word), None if offset is None else state.constant(offset + 4 * word))

    return step


def _predicates_to_register(operands: Operands) -> Step:
    to, mask = operands.to, read(operands.sources[-1])

    def step(state: State) -> None:
        chosen, result = mask(state), 0
        for place in range(8):
            if chosen is not None and chosen >> place & 1:
                bit = state.predicates.get(f"P{place}")
                if bit is None:
                    chosen = None
                    break
                result |= bit << place
        state.set(to, None if chosen is None else result)

    return step


def _register_to_predicates(operands: Operands) -> Step:
    value_of, mask = (read(operand) for operand in operands.sources[-2:])

    def step(state: State) -> None:
        value, chosen = value_of(state), mask(state) or 0
        for place in range(7):
            if chosen >> place & 1:
                state.set_predicate(f"P{place}", None if value is None else bool(value >> place & 1))

    return step


def _vote(operands: Operands) -> Step:
    """All threads of a warp are taken to agree."""
    tests, out, to = operands.tests, operands.to_predicates, operands.to

    def step(state: State) -> None:
        state.set(to, None)
        for name in out:
            state.set_predicate(name, tests[-1](state) if tests else None)

    return step


def setting(operands: Operands, value: bool | None) -> Step:
    def step(state: State) -> None:
        for name in operands.to_predicates:
            state.set_predicate(name, value)

    return step


def _sign_extend(operands: Operands) -> Step:
    unsigned = "U32" in operands.parts

    def extended(value: int, width: int) -> int:
        kept = value & ((1 << width) - 1)
        return kept if unsigned or not kept >> (width - 1) & 1 else kept - (1 << width)

    return _simple(extended, 2)(operands)


def _moved_with(operands: Operands) -> Step:
    """VIADDMNMX: the lesser or greater of a + b and c."""
    reads, to, tests = operands.reads()[:3], operands.to, operands.tests
    unsigned = "U32" in operands.parts

    def step(state: State) -> None:
        values, least = _values(reads, state), tests[-1](state) if tests else None
        if values is None or least is None:
            state.set(to, None)
            return
        pair = [(values[0] + values[1]) & MASK, values[2] & MASK]
        numbers = pair if unsigned else [signed(value) for value in pair]
        state.set(to, min(numbers) if least else max(numbers))

    return step


def _shuffled(operands: Operands) -> Step:
    """What another thread holds is taken to be what this one holds."""
    reads, to = operands.reads(), operands.to
    if not to and operands.to_predicates:
        to, reads = register_name(operands.sources[0]), reads[1:]
    return lambda state: state.set(to, reads[0](state))


_COPY = _simple(lambda a: a, 1)
STEPS: dict[str, Callable[[Operands], Step]] = {
    "MOV": _COPY, "UMOV": _COPY, "R2UR": _COPY, "MOV32I": _COPY,
    "IMAD": _multiply, "UIMAD": _multiply,
    "IADD3": _add, "UIADD3": _add, "IADD": _add, "VIADD": _add, "UIADD": _add, "IADD32I": _add,
    "LEA": _lea, "ULEA": _lea, "SHF": _shift, "USHF": _shift, "LOP3": _logic, "ULOP3": _logic,
    "ISETP": _compare, "UISETP": _compare, "FSETP": _compare, "SEL": _select, "USEL": _select, "FSEL": _select,
    "IMNMX": _extreme, "VIMNMX": _extreme, "UIMNMX": _extreme, "UVIMNMX": _extreme,
    "VIADDMNMX": _moved_with, "UVIADDMNMX": _moved_with,
    "IABS": _simple(lambda a: abs(signed(a)), 1), "UIABS": _simple(lambda a: abs(signed(a)), 1),
    "POPC": _simple(lambda a: a.bit_count(), 1), "UPOPC": _simple(lambda a: a.bit_count(), 1),
    "BREV": _simple(lambda a: int(f"{a:032b}"[::-1], 2), 1),
    "SGXT": _sign_extend, "USGXT": _sign_extend,
    "I2F": _to_float, "I2FP": _to_float, "F2I": _to_integer, "MUFU": _special_function,
    "HFMA2": _half_constant, "PRMT": _permute, "UPRMT": _permute,
    "PLOP3": _logic_of_predicates, "UPLOP3": _logic_of_predicates,
    "S2R": _special_register, "S2UR": _special_register, "CS2R": _special_register,
    "LDC": _load_constant, "ULDC": _load_constant, "LDCU": _load_constant,
    "P2R": _predicates_to_register, "R2P": _register_to_predicates,
    "VOTE": _vote, "VOTEU": _vote, "ELECT": lambda operands: setting(operands, True), "SHFL": _shuffled,
    "FCHK": lambda operands: setting(operands, False),
}  # fmt: skip
