"""bench.static: machine code is counted right, a kernel's loops by what they run, and budgets hold."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench.static import arithmetic, budgets, model, sass, walk
from bench.static.judge import KernelRow, Verdict
from bench.static.registers import Operands, State
from bench.static.walk import Access, Arguments, Walker, address_of

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
PARAMETERS = 0x210

# A pointer and two counts: an outer loop of the first, an inner one of the second, which loads 16 bytes.
NESTED = """
kernel:
.text.kernel:
        /*0000*/ LDC R1, c[0x0][0x28] ;
        /*0010*/ LDC.64 R2, c[0x0][0x210] ;
        /*0020*/ ULDC UR4, c[0x0][0x218] ;
        /*0030*/ MOV R4, RZ ;
.L_x_0:
        /*0040*/ MOV R5, RZ ;
        /*0050*/ DFMA R20, R20, R22, R24 ;
.L_x_1:
        /*0060*/ IMAD.WIDE R6, R5, 0x10, R2 ;
        /*0070*/ IADD3 R5, R5, 0x1, RZ ;
        /*0080*/ LDG.E.128 R8, desc[UR8][R6.64] ;
        /*0090*/ ISETP.GE.AND P0, PT, R5, c[0x0][0x21c], PT ;
        /*00a0*/ FADD R12, R8, R12 ;
        /*00b0*/ @!P0 BRA `(.L_x_1) ;
        /*00c0*/ VIADD R4, R4, 0x1 ;
        /*00d0*/ ISETP.LT.AND P1, PT, R4, UR4, PT ;
        /*00e0*/ @P1 BRA `(.L_x_0) ;
        /*00f0*/ STG.E desc[UR8][R2.64], R12 ;
        /*0100*/ EXIT ;
.L_x_2:
        /*0110*/ BRA `(.L_x_2);
"""


def walked(text: str, *numbers: int, memory=lambda argument, offset, size: None):
    """A listing's walk; its arguments are one tensor and these numbers."""
    constants = bytes(PARAMETERS) + address_of(0).to_bytes(8, "little")
    constants += b"".join(number.to_bytes(4, "little") for number in numbers)
    walker = Walker(sass.parse(text))
    return walker, walker.walk(Arguments(constants, (0, 0, 0), (1, 1, 1), 32, memory, frozenset([0])))


def test_loops_count_as_often_as_they_run():
    walker, found = walked(NESTED, 3, 5)
    by_op = {instruction.op: found.counts[place] for place, instruction in enumerate(walker.listing.code)}
    assert by_op["LDG.E.128"] == by_op["FADD"] == 15
    assert by_op["DFMA"] == by_op["VIADD"] == 3
    assert by_op["STG.E"] == by_op["EXIT"] == 1
    assert found.issued == 4 + 3 * (2 + 3) + 15 * 6 + 2
    assert [(loop.first, loop.branch) for loop in walker.listing.loops] == [(6, 11), (4, 14)]
    inner = Access(argument=0, store=False, loop=11, width=16)
    assert found.bytes == {inner: 240, Access(argument=0, store=True, loop=-1, width=4): 4}
    assert found.outstanding == 16
    assert not found.unknown_loops and not found.unknown_branches and not found.truncated


def test_what_floats_decide_is_reported():
    loop = NESTED.replace("ISETP.GE.AND P0, PT, R5, c[0x0][0x21c], PT", "FSETP.GEU.AND P0, PT, R12, R8, PT")
    walker, found = walked(loop, 3, 5)
    assert found.counts[8] == 3
    assert {walker.listing.code[place].op for place in found.unknown_loops} == {"BRA"}


def test_a_value_in_memory_decides_a_loop():
    text = NESTED.replace("LDC.64 R2", "LDC.64 R2").replace(
        "ULDC UR4, c[0x0][0x218]", "LDG.E R30, desc[UR8][R2.64+0x8]"
    )
    text = text.replace("R4, UR4, PT", "R4, R30, PT")
    content = {8: 4}
    _, found = walked(text, 0, 2, memory=lambda argument, offset, size: content.get(offset, 0).to_bytes(size, "little"))
    assert found.counts[8] == 4 * 2


SLOW_PATH = """
kernel:
        /*0000*/ FSETP.GT.AND P0, PT, |R2|, R3, PT ;
        /*0010*/ @P0 BRA `(.L_x_0) ;
        /*0020*/ CALL.REL.NOINC `($slow) ;
.L_x_0:
        /*0030*/ FADD R4, R4, R4 ;
        /*0040*/ EXIT ;
$slow:
        /*0050*/ FMUL R4, R4, R4 ;
        /*0060*/ RET.REL.NODEC R6 `(kernel) ;
"""


def test_the_slow_path_of_a_division_is_not_counted_and_calls_come_back():
    _, found = walked(SLOW_PATH)
    assert found.counts == [1, 1, 0, 1, 1, 0, 0]
    _, found = walked(SLOW_PATH.replace("@P0 BRA", "@!PT BRA"))
    assert found.counts == [1, 1, 1, 1, 1, 1, 1]


# How a GPU divides integers: the reciprocal in float32, then two corrections.
DIVISION = """
    IABS R5, R7
    I2F.RP R0, R5
    MUFU.RCP R0, R0
    VIADD R2, R0, 0xffffffe
    F2I.FTZ.U32.TRUNC.NTZ R3, R2
    HFMA2.MMA R2, -RZ, RZ, 0, 0
    IMAD.MOV R4, RZ, RZ, -R3
    IMAD R9, R4, R5, RZ
    IABS R4, R56
    IMAD.HI.U32 R3, R3, R9, R2
    IMAD.HI.U32 R50, R3, R4, RZ
    IMAD.MOV R0, RZ, RZ, -R50
    IMAD R0, R5, R0, R4
    ISETP.GT.U32.AND P1, PT, R5, R0, PT
    @!P1 IMAD.IADD R0, R0, 0x1, -R5
    @!P1 IADD3 R50, R50, 0x1, RZ
    ISETP.GE.U32.AND P0, PT, R0, R5, PT
    @P0 VIADD R50, R50, 0x1
"""


def run(text: str, **registers: int) -> State:
    """A state after these instructions."""
    state = State(b"", {})
    state.registers.update(registers)
    for line in text.strip().splitlines():
        (instruction,) = sass.parse(f"/*0000*/ {line.strip()} ;").code
        guard = state.predicates.get(instruction.predicate, True)
        if guard != instruction.negated:
            arithmetic.STEPS[instruction.base](Operands(instruction))(state)
    return state


@pytest.mark.parametrize(
    "text, written",
    [("F2F.F32.F64 R6, R4", 1), ("F2F.F64.F32 R6, R4", 2), ("F2I.F64.TRUNC R6, R4", 1), ("F2I.S64.F64 R6, R4", 2)],
)
def test_conversions_write_the_type_that_comes_first(text, written):
    (instruction,) = sass.parse(f"/*0000*/ {text} ;").code
    assert walk.written_by(Operands(instruction), instruction.base) == ["R6", "R7"][:written]


@pytest.mark.parametrize("a", [0, 1, 31, 67108, 2**31 - 1])
@pytest.mark.parametrize("b", [1, 3, 125, 16384, 2**31 - 1])
def test_division(a, b):
    assert run(DIVISION, R56=a, R7=b).registers["R50"] == a // b


@pytest.mark.parametrize("a, b", [(0, 0), (5, 7), (2**32 + 3, 2**32 - 1), (2**63, 12)])
def test_carries_make_64_bits(a, b):
    registers = {"R2": a & 0xFFFFFFFF, "R3": a >> 32, "R4": b & 0xFFFFFFFF, "R5": b >> 32}
    add = "IADD3 R6, P0, R2, R4, RZ\nIADD3.X R7, R3, R5, RZ, P0, !PT"
    subtract = "IADD3 R6, P0, R2, -R4, RZ\nIADD3.X R7, R3, ~R5, RZ, P0, !PT"
    scaled = "LEA R6, P0, R2, R4, 0x3\nLEA.HI.X R7, R2, R5, R3, 0x3, P0"
    less = "ISETP.LT.U32.AND P1, PT, R2, R4, PT\nISETP.LT.U32.AND.EX P1, PT, R3, R5, PT, P1"
    for text, value in ((add, a + b), (subtract, a - b), (scaled, 8 * a + b)):
        found = run(text, **registers).registers
        assert found["R6"] | found["R7"] << 32 == value % 2**64, text
    assert run(less, **registers).predicates["P1"] == (a < b)


def test_three_numbers_carry_twice():
    state = run("IADD3 R1, P0, P1, R2, R3, R4", R2=2**32 - 1, R3=2**32 - 1, R4=2**32 - 1)
    assert state.predicates["P0"] and state.predicates["P1"]
    assert run("IADD3.X R5, RZ, RZ, RZ, PT, PT").registers["R5"] == 2


@pytest.mark.parametrize(
    "registers, warps, shared, programs",
    [(80, 16, 1024, 1), (48, 8, 4096, 5), (32, 4, 0, 16), (201, 8, 49152, 1), (64, 16, 0, 2), (40, 4, 100000, 2)],
)
def test_programs_of_a_multiprocessor(registers, warps, shared, programs):
    assert model.programs_per_processor(registers, 32 * warps, shared, "sm_90") == programs


def test_few_warps_issue_less():
    shares = [model.issue_share(warps) for warps in (4, 8, 16, 24, 32, 64)]
    assert shares == sorted(shares) and shares[2] == 0.45 and shares[-1] == shares[-2] == 0.65


def verdict(
    instructions: float = 30.0, spilled: int = 0, launches: tuple[int, int] = (2, 1), counted: bool = True
) -> Verdict:
    row = KernelRow(
        "kernel", "forward", "132", 8, 40, 1024, spilled, 6, 0.0, "", "", instructions, 0.0, 1.0, {}, "", 0, False, ""
    )
    return Verdict("case", "softmax_ce", "sm_90", launches, kernels=[(1, row)], counted=counted)


def test_budgets(tmp_path):
    path = tmp_path / "budgets.json"
    budgets.write([verdict()], path)
    held = budgets.read(path)
    assert budgets.exceeded(verdict(), held) == []
    assert budgets.exceeded(verdict(31.4), held) == []
    (line,) = budgets.exceeded(verdict(31.6), held)
    assert re.search(r"instructions 31.6, budget 31.5", line)
    (line,) = budgets.exceeded(verdict(launches=(3, 1)), held)
    assert "launches_forward 3, budget 2" in line
    assert budgets.exceeded(verdict(spilled=8), held)
    (line,) = budgets.exceeded(verdict(counted=False), held)
    assert "not walked to its end" in line
    budgets.write([verdict(launches=(1, 1))], path)
    assert budgets.read(path)["sm_90"]["case"]["launches_forward"] == 1


KERNEL = """
import json, torch, triton, triton.language as tl
from bench.static import gpu, model

@triton.jit
def kernel(x, out, steps, BLOCK: tl.constexpr):
    place = tl.program_id(0) * steps * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(steps):
        total += tl.load(x + place + step * BLOCK)
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total)

with gpu.recording("TARGET", 132) as record:
    x = torch.empty(8 * 33 * 512, device="cuda")
    out = torch.empty(8 * 512, device="cuda")
    record.events.clear()
    kernel[(8,)](x, out, 33, BLOCK=512, num_warps=4)
    y = (out * 2).view(8, 512).sum(1)
launch, *operations = record.events
found = model.judge(launch, "TARGET")
print(json.dumps({
    "bytes": found.bytes, "loads": found.loads, "unknown": found.unknown, "spilled": found.spilled,
    "instructions": found.instructions / x.numel(), "operations": [each.name for each in operations],
    "moved": [each.bytes for each in operations],
}))
"""


def subprocess_of(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("target", ["sm_90", pytest.param("sm_80", marks=pytest.mark.slow),
                                    pytest.param("sm_100", marks=pytest.mark.slow)])  # fmt: skip
def test_a_kernel_with_a_loop_of_known_length(tmp_path, target):
    script = tmp_path / "kernel.py"
    script.write_text(KERNEL.replace("TARGET", target))
    ended = subprocess_of(str(script))
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["bytes"] == 4 * (8 * 33 * 512 + 8 * 512)
    assert found["loads"] == "128:100%" and found["unknown"] == found["spilled"] == 0
    # A load and an addition of 4 values, an addition of the counter and of an address, a comparison, a branch.
    assert 1.5 < found["instructions"] < 4
    assert found["operations"] == ["mul", "sum"]
    assert found["moved"] == [2 * 4 * 8 * 512, 4 * 8 * 513]


def test_the_quick_cases_keep_their_budgets():
    ended = subprocess_of("-m", "bench.static", "softmax_ce", "linear_ce", "--quick", "--check", "--processes", "1")
    assert ended.returncode == 0, ended.stderr
    assert "softmax_ce bfloat16" in ended.stdout


@pytest.mark.slow
def test_every_case_keeps_its_budgets():
    ended = subprocess_of("-m", "bench.static", "--check", "--csv", os.devnull)
    assert ended.returncode == 0, ended.stderr
