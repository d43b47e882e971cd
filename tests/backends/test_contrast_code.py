"""The machine code of the contrastive kernels of 16-bit rows, compiled ahead of time for sm_90."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.contrast_model import DEVICES, Kernel, loops, share_of_products

ROOT = Path(__file__).parents[2]
SHARED = 99 * 1024  # bytes that a program may have on every GPU from sm_80 on


def output(*command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def counted():
    """By width and kernel."""
    code = (
        "import json; from bench.contrast_model import kernels\n"
        "print(json.dumps({width: kernels(width) for width in (128, 256, 512)}))\n"
    )
    found = json.loads(output("-c", code))
    return {int(width): {name: Kernel(*each) for name, each in both.items()} for width, both in found.items()}


def test_products_are_of_16_bits_and_nothing_spills(counted):
    for width, both in counted.items():
        for name, kernel in both.items():
            assert kernel.wgmma > 0, (width, name)
            assert not kernel.spills, (width, name)
            assert kernel.shared <= SHARED, (width, name)


def test_instructions_of_a_pair(counted):
    """Counted when this was written: 19 in each kernel at 128 features; a fifth more is a regression."""
    assert counted[128]["sums"].of_pair <= 23
    assert counted[128]["gradient"].of_pair <= 23
    assert counted[128]["sums"].steps == 0 and counted[512]["sums"].steps == 8


@pytest.mark.parametrize("device", DEVICES)
def test_predicted_share(counted, device):
    for width, both in counted.items():
        assert share_of_products(DEVICES[device], width, both) >= 0.2, width


def test_more_instructions_take_longer(counted):
    slower = {name: each._replace(of_pair=3 * each.of_pair) for name, each in counted[128].items()}
    assert share_of_products(DEVICES["H100"], 128, slower) < 0.2


def test_loops_are_counted():
    code = "\n".join(
        [".L_x_0:", "/*0000*/ MOV R1, R2 ;", ".L_x_1:", "/*0010*/ FADD R1, R1, R2 ;", "/*0020*/ @P0 BRA `(.L_x_1) ;",
         "/*0030*/ FMUL R1, R1, R2 ;", "/*0040*/ @!P1 BRA `(.L_x_0) ;", "/*0050*/ EXIT ;", ".L_x_2:",
         "/*0060*/ BRA `(.L_x_2);"]
    )  # fmt: skip
    assert loops(code) == [2, 5]


def test_programs_fit_every_gpu():
    """Shared memory of every kernel of the linear heads and of contrast, with all options."""
    table = output("-m", "bench.resources", "linear_ce", "supcon", "--quick", "--processes", "1")
    lines = [line.split() for line in table.splitlines()[1:-1]]
    assert {line[0] for line in lines} >= {"sums_kernel", "gradient_kernel", "norm_kernel", "coefficient_kernel"}
    assert all(int(line[-3]) <= SHARED for line in lines), table
    assert "0 with spills" in table
