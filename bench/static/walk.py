"""Walks through the machine code of a kernel as one thread does, and counts what it issues.

The first thread of a program is followed from the entry to the exit: integers that come from the kernel's arguments,
from the program's place in the grid and from tensors of integers are computed as the GPU would (``arithmetic``), so
that loops run as often as they would there, whether unrolled, pipelined or peeled. What floats decide is not known,
and taken so:

* a branch forward that is not known to be taken is not, unless it leaps over a call of a few instructions' reach (the
  slow path of a division);
* a branch backward that is not known to be taken is not: such a loop runs once, and is reported;
* what another thread hands over is what this one holds: in shared memory what it stored last, in a shuffle its own;
* vectors of floats hold 1 (an upstream gradient), an atomic returns 0 (a program that isn't the last to finish), a
  barrier in shared memory has been reached.

An instruction whose predicate is false is issued all the same and counts; its traffic doesn't.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from bench.static.arithmetic import STEPS, setting
from bench.static.registers import Operands, Read, State, following, is_predicate, read, register_name, test
from bench.static.sass import Instruction, Listing, registers_of

_ADDRESS = re.compile(r"\[([^\[\]]*)\]$")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_LOADS = ("LDG", "LD", "LDGSTS")
_STORES = ("STG", "ST", "RED", "ATOMG", "ATOM")
_SLOW_PATH = 24  # instructions that a branch around a call leaps over at most
MOST_STEPS = 8_000_000

# (argument, offset, bytes) -> what lies there, None where it isn't known
Memory = Callable[[int, int, int], bytes | None]


class Access(NamedTuple):
    """Traffic of a load or store instruction: the argument that its address lies in, -1 where that isn't known."""

    argument: int
    store: bool
    loop: int  # the branch of the innermost loop, -1 outside of any
    width: int


@dataclass
class Walked:
    """What one thread issued: how often each instruction, bytes by kind of access, and what was not known."""

    counts: list[int]
    bytes: Counter[Access] = field(default_factory=Counter)
    unknown_branches: set[int] = field(default_factory=set)
    unknown_loops: set[int] = field(default_factory=set)
    outstanding: int = 0  # bytes of loads under way at the most
    truncated: bool = False

    @property
    def issued(self) -> int:
        return sum(self.counts)


class Arguments(NamedTuple):
    """A launch as the thread sees it: the constant bank, its program, the grid, and what lies at an address.

    Argument i of the bank starts at ``address_of(i)``.
    """

    constants: bytes
    program: tuple[int, int, int]
    grid: tuple[int, int, int]
    threads: int
    memory: Memory
    streamed: frozenset[int] = frozenset()  # arguments whose loads count as under way


def address_of(argument: int) -> int:
    """A made-up address for the tensor of an argument, far from all others."""
    return (argument + 1) << 40


def argument_at(address: int) -> tuple[int, int]:
    """The argument that an address belongs to (-1: none), and the offset from its start."""
    return (address >> 40) - 1, address & ((1 << 40) - 1)


class _Place(NamedTuple):
    """What the walk needs of one instruction."""

    runs: Callable[[State], bool | None]
    step: Callable[[State], object]
    kind: str
    target: int
    sources: frozenset[str]
    results: tuple[str, ...]
    reach: Callable[[State], int | None]
    access: tuple[bool, int, int]  # store, loop, width


class Walker:
    """A listing made ready to be walked through any number of times."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self.places = [self._place(place, instruction) for place, instruction in enumerate(listing.code)]

    def walk(self, arguments: Arguments, most_steps: int = MOST_STEPS) -> Walked:
        """Follows the first thread to its exit, or for so many steps."""
        special = {"SR_TID.X": 0, "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_NTID.X": arguments.threads}
        for axis, name in enumerate("XYZ"):
            special[f"SR_CTAID.{name}"] = arguments.program[axis]
            special[f"SR_NCTAID.{name}"] = arguments.grid[axis]
        state = State(arguments.constants, special)
        return _Walk(self, state, arguments).run(most_steps)

    def _place(self, place: int, instruction: Instruction) -> _Place:
        runs: Callable[[State], bool | None] = lambda state: True  # noqa: E731
        if instruction.predicate:
            runs = test("!" * instruction.negated + instruction.predicate)
        base, kind = instruction.base, ""
        operands = Operands(instruction)
        target = self.listing.labels.get(instruction.target, -1)
        results = tuple(written_by(operands, base))
        sources = frozenset(name for part in operands.sources for name in registers_of(part))
        loop = self.listing.innermost(place)
        width = next((_BYTES[part] for part in instruction.op.split(".") if part in _BYTES), 4)
        access = (base in _STORES, -1 if loop is None else loop.branch, width)
        reach: Callable[[State], int | None] = lambda state: None  # noqa: E731
        step: Callable[[State], object]
        if base in ("BRA", "EXIT", "CALL", "RET", "BRX", "JMP"):
            kind, step = base, lambda state: None
            conditions = [test(operand) for operand in instruction.operands if is_predicate(operand)]
            if conditions:
                runs = _both(runs, conditions[0])
        elif base in _LOADS or base in _STORES:
            kind = "STORE" if base in _STORES else "LOAD"
            global_operand = next((part for part in reversed(instruction.operands) if "[" in part), "")
            reach, step = (
                _address(global_operand, "desc" in global_operand or ".64" in global_operand),
                _forget(operands),
            )
        elif base in ("LDS", "STS", "ATOMS"):
            kind = base
            shared = next((part for part in instruction.operands if "[" in part), "")
            reach, step = _address(shared, False), _shared_step(instruction, base, shared, width)
        elif base == "SYNCS":
            step = setting(operands, "TRYWAIT" in instruction.op or None)
        elif base in ("LDGDEPBAR", "DEPBAR"):
            kind, step = base, lambda state: None
        elif base in STEPS and (operands.to or operands.to_predicates or base in ("R2P", "LOP3", "SHFL")):
            step = STEPS[base](operands)
        else:
            step = _forget(operands)
        if instruction.predicate:
            step = _guarded(step, runs, _forget(operands)) if kind in ("", "LDS") else step
        return _Place(runs, step, kind, target, sources, results, reach, access)


def _both(a: Callable[[State], bool | None], b: Callable[[State], bool | None]) -> Callable[[State], bool | None]:
    def both(state: State) -> bool | None:
        x, y = a(state), b(state)
        return False if x is False or y is False else None if x is None or y is None else True

    return both


def _guarded(
    step: Callable[[State], object], runs: Callable[[State], bool | None], forget: Callable[[State], object]
) -> Callable[[State], object]:
    def guarded(state: State) -> None:
        run = runs(state)
        if run:
            step(state)
        elif run is None:
            forget(state)

    return guarded


def written_by(operands: Operands, base: str) -> list[str]:
    """The registers that an instruction writes; those of matrix products are left out."""
    if not operands.to or base in _STORES or base in ("STS", "HGMMA", "HMMA", "UTCHMMA", "IMMA", "DMMA", "QGMMA"):
        return []
    parts = operands.parts
    if base in ("F2F", "F2I"):
        # The type of the result comes first: F2F.F32.F64 writes one register; F2I names it where it is of 64 bits.
        to_64 = operands.op.startswith("F2F.F64") or parts & {"S64", "U64"}
        return [following(operands.to, word) for word in range(2 if to_64 else 1)]
    words = 8 if "256" in parts else 4 if parts & {"128", "4"} else 1
    if parts & {"64", "WIDE", "F64", "U64", "2"} or base in ("DADD", "DMUL", "DFMA", "DSETP") or operands.op == "CS2R":
        words = max(words, 2)
    return [following(operands.to, word) for word in range(words)]


def _forget(operands: Operands) -> Callable[[State], object]:
    """After it the results are unknown."""
    base = operands.op.split(".", 1)[0]
    results, predicates = written_by(operands, base), operands.to_predicates

    def forget(state: State) -> None:
        for name in results:
            state.registers[name] = None
        for name in predicates:
            state.set_predicate(name, None)

    return forget


def _address(operand: str, wide: bool) -> Callable[[State], int | None]:
    """The address in an operand such as desc[UR8][R8.64+0x10] or [R79+UR4+0x40]."""
    found = _ADDRESS.search(operand)
    if found is None:
        return lambda state: None
    reads: list[Read] = []
    offset = 0
    for term in re.findall(r"[+-]?[^+-]+", found[1].replace(" ", "")):
        name = term.lstrip("+")
        if register_name(name):
            reads.append(read(name, wide and (name.endswith(".64") or name.startswith("U"))))
        elif "Z" not in name:
            try:
                offset += int(name, 0)
            except ValueError:
                return lambda state: None

    def address(state: State) -> int | None:
        values = [get(state) for get in reads]
        return None if None in values else sum(values) + offset  # type: ignore[arg-type]

    return address


def _shared_step(instruction: Instruction, base: str, operand: str, width: int) -> Callable[[State], object]:
    """Shared memory as this thread alone fills it; what others stored is what it stored last."""
    address = _address(operand, False)
    words = max(1, width // 4)
    if base == "LDS":
        to = register_name(instruction.operands[0])

        def load(state: State) -> None:
            start = address(state)
            for word in range(words):
                own = (
                    state.shared.get(-1) if start is None else state.shared.get(start + 4 * word, state.shared.get(-1))
                )
                state.set(following(to, word), own)

        return load
    if base == "STS" and width >= 4:
        source = register_name(instruction.operands[-1])
        zero = instruction.operands[-1] in ("RZ", "URZ")

        def store(state: State) -> None:
            start = address(state)
            for word in range(words):
                value = 0 if zero else state.registers.get(following(source, word))
                state.shared[-1] = value
                if start is not None:
                    state.shared[start + 4 * word] = value

        return store
    return _forget(Operands(instruction))


class _Walk:
    """One thread's way."""

    def __init__(self, walker: Walker, state: State, arguments: Arguments) -> None:
        self.walker, self.state, self.arguments = walker, state, arguments
        self.found = Walked([0] * len(walker.places))
        self.under_way: dict[str, int] = {}  # load's number by the register that it fills
        self.loads: dict[int, int] = {}  # bytes by number
        self.groups: list[int] = []  # bytes of each group of asynchronous copies that nobody has waited for
        self.copied = 0
        self.calls: list[int] = []

    def run(self, most_steps: int) -> Walked:
        places, counts, state = self.walker.places, self.found.counts, self.state
        here, last = 0, len(places)
        for _ in range(most_steps):
            if here >= last:
                return self.found
            place = places[here]
            counts[here] += 1
            if self.under_way and not place.sources.isdisjoint(self.under_way):
                self._wait(place.sources)
            if not place.kind:
                place.step(state)
                here += 1
                continue
            following_place = self._special(here, place)
            if following_place < 0:
                return self.found
            here = following_place
        self.found.truncated = True
        return self.found

    def _special(self, here: int, place: _Place) -> int:
        """Branches, memory and waits; the next instruction, -1 at the end."""
        kind = place.kind
        if kind in ("LOAD", "STORE"):
            self._access(place, here)
        elif kind == "LDGDEPBAR":
            self.groups.append(self.copied)
            self.copied = 0
        elif kind == "DEPBAR":
            self._wait_for_groups(here)
        elif kind in ("LDS", "STS", "ATOMS"):
            if kind == "LDS" or place.runs(self.state) is not False:
                place.step(self.state)
        else:
            return self._branch(here, place)
        return here + 1

    def _branch(self, here: int, place: _Place) -> int:
        runs = place.runs(self.state)
        if place.kind == "EXIT":
            return -1 if runs else here + 1
        if place.kind == "RET":
            return self.calls.pop() if runs and self.calls else -1 if runs else here + 1
        if place.kind == "CALL":
            if not runs or place.target < 0:
                return here + 1
            self.calls.append(here + 1)
            return place.target
        if place.target < 0 or ".DIV" in self.walker.listing.code[here].op:
            return here + 1
        if runs is None:
            if place.target <= here:
                self.found.unknown_loops.add(here)
                return here + 1
            between = self.walker.listing.code[here + 1 : min(place.target, here + 1 + _SLOW_PATH)]
            if place.target - here <= _SLOW_PATH and any(each.base == "CALL" for each in between):
                return place.target
            self.found.unknown_branches.add(here)
            return here + 1
        return place.target if runs else here + 1

    def _access(self, place: _Place, here: int) -> None:
        runs = place.runs(self.state)
        if runs is False:
            return
        store, loop, width = place.access
        address = place.reach(self.state)
        argument, offset = (-1, 0) if address is None else argument_at(address)
        self.found.bytes[Access(argument, store, loop, width)] += width
        place.step(self.state)
        instruction = self.walker.listing.code[here]
        if store:
            if instruction.base.startswith("ATOM") and place.results:
                self.state.set(place.results[0], 0)
            return
        if instruction.base == "LDGSTS":
            self.copied += width if argument in self.arguments.streamed else 0
        else:
            number = here
            self.loads[number] = width if argument in self.arguments.streamed else 0
            for name in place.results:
                self.under_way[name] = number
            self._fill(place, argument, offset, width, runs)
        self.found.outstanding = max(self.found.outstanding, sum(self.loads.values()) + self.copied + sum(self.groups))

    def _fill(self, place: _Place, argument: int, offset: int, width: int, runs: bool | None) -> None:
        """What a load brings where the tensor's values are known."""
        if argument < 0 or runs is None:
            return
        content = self.arguments.memory(argument, offset, width)
        if content is None:
            return
        for word, name in enumerate(place.results):
            self.state.set(name, int.from_bytes(content[4 * word : 4 * word + 4], "little"))

    def _wait(self, sources: frozenset[str]) -> None:
        """A load that something needs has arrived, and those before it."""
        for name in sources & self.under_way.keys():
            arrived = self.under_way.get(name)
            if arrived in self.loads:
                order = list(self.loads)
                for number in order[: order.index(arrived) + 1]:
                    del self.loads[number]
        self.under_way = {name: number for name, number in self.under_way.items() if number in self.loads}

    def _wait_for_groups(self, here: int) -> None:
        operands = self.walker.listing.code[here].operands
        left = int(operands[-1], 0) if operands and operands[-1].startswith("0x") else 0
        self.groups = self.groups[max(0, len(self.groups) - left) :] if left else []
