"""cross_entropy under random combinations of shape, data type, layout and option, against float64.

    FUSEDLOSS_PROPERTY_CASES=2000 pytest tests/test_properties.py -s

runs that many accepted cases of each family on each backend and SIMD level, new ones each time, and prints how often
each option and the rarest pairs of options came up. property_cases.py makes and judges them.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from property_cases import DTYPES, FAMILIES, LAYOUTS, run, torch_cases
from softmax_battery import fused
from test_simd import LEVELS, NOT_ALLOWED

import fusedloss
from fusedloss.backends import cpp, triton

ROOT = Path(__file__).parent.parent
WANTED = os.environ.get("FUSEDLOSS_PROPERTY_CASES")
ALWAYS = {"class weight", "probabilities", "more than one block", *DTYPES, *LAYOUTS}
OWN = {"focal", "z-loss", "sample weight", "prior", "soft cap", "penalty mixed", "smoothing per row", "angular margin"}

needs_kernels = pytest.mark.skipif(cpp.absent("cpu") is not None, reason="no compiled module")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("backend", "usual"), [pytest.param("cpp", 100, marks=needs_kernels), pytest.param("reference", 25)]
)
def test_random_combinations(family, backend, usual):
    with fusedloss.backend(backend):
        tally = run(family, int(WANTED or usual), new=WANTED is not None)
    tally.check()
    if WANTED:
        print(f"\n{backend}, {family}: {tally.report()}")
    if backend == "cpp":
        assert ALWAYS | (OWN if family == "own" else set()) <= set(tally.options)


def in_a_process(*arguments, usual, **environment):
    """The cases in a process of their own, with what the environment chooses there."""
    kept = {name: value for name, value in os.environ.items() if name != "FUSEDLOSS_SIMD"}
    script, new = str(ROOT / "tests" / "property_cases.py"), ["--new"] if WANTED else []
    return subprocess.run(
        [sys.executable, "-W", "ignore", script, *arguments, "--cases", str(WANTED or usual), *new],
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


@needs_kernels
@pytest.mark.parametrize("level", LEVELS)
def test_on_every_level(level):
    if level == cpp.extension.level():
        pytest.skip("the level of the tests in this process")
    found = in_a_process(usual=25, FUSEDLOSS_SIMD=level)
    if NOT_ALLOWED in found.stderr:
        pytest.skip(f"this machine has no {level}")
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"level {level}" in found.stdout
    if WANTED:
        print(f"\n{found.stdout}")


@pytest.mark.skipif("not installed" in (triton.absent("cpu") or ""), reason="no Triton")
def test_interpreted_by_triton():
    found = in_a_process("--backend", "triton", usual=8, TRITON_INTERPRET="1")
    assert found.returncode == 0, found.stdout + found.stderr
    if WANTED:
        print(f"\n{found.stdout}")


@settings(max_examples=60)
@given(torch_cases(), st.integers(0, 2**31))
def test_rows_do_not_see_each_other(drawn, seed):
    """Each row's loss is what it is alone."""
    case = replace(drawn[0], reduction="none", upstream=1.0, learned=())
    row = seed % len(case.input)
    alone = replace(case, input=case.input[row : row + 1], target=case.target[row : row + 1])
    torch.testing.assert_close(fused(alone), fused(case)[row : row + 1], rtol=1e-5, atol=1e-5, equal_nan=True)
