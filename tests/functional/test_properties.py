"""cross_entropy under random combinations of shape, data type, layout and option, against float64.

    FUSEDLOSS_PROPERTY_CASES=2000 pytest tests/functional/test_properties.py -s

runs that many accepted cases of each family on each backend and SIMD level, new ones each time, and prints how often
each option and the rarest pairs of options came up. property_cases.py makes and judges them (and does so in pieces).
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
from oracle import Case, cast, eager, loss_and_gradients
from property_cases import DTYPES, FAMILIES, LAYOUTS, added_up, run, torch_cases
from property_slopes import check_direction
from simd_levels import LEVELS, NOT_ALLOWED
from softmax_battery import fused

import fusedloss
from fusedloss.backends import cpp, triton

ROOT = Path(__file__).parents[2]
WANTED = os.environ.get("FUSEDLOSS_PROPERTY_CASES")
ALWAYS = {"class weight", "probabilities", "more than one block", *DTYPES, *LAYOUTS}
OWN = {"focal", "z-loss", "sample weight", "prior", "soft cap", "penalty mixed", "smoothing per row", "angular margin"}

needs_kernels = pytest.mark.skipif(cpp.unavailable_reason("cpu") is not None, reason="no compiled module")


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
    script, new = str(ROOT / "tests" / "cases" / "property_cases.py"), ["--new"] if WANTED else []
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


@pytest.mark.slow
@pytest.mark.skipif("not installed" in (triton.unavailable_reason("cpu") or ""), reason="no Triton")
def test_interpreted_by_triton():
    found = in_a_process("--backend", "triton", usual=4, TRITON_INTERPRET="1")
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


def penalised(**options):
    """Logits of which one lies 1e-7 off the margin penalty's kink, within the longest step of a difference quotient."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    logits[0, 4] = logits[0].max() - 0.5 - 1e-7
    return Case(logits, torch.tensor([1, 7]), penalty=(0.5, "sum", False), penalty_strength=0.8, **options)


@pytest.mark.parametrize("options", [{}, {"focal_gamma": 2.0, "z_loss": 0.1}], ids=["plain", "focal"])
def test_difference_quotients_tell_right_from_wrong(options):
    case = penalised(**options)
    right = loss_and_gradients(cast(case, torch.float64), eager)
    assert check_direction(case, right)
    without = replace(case, penalty=None, penalty_strength=0.0)
    one_off = right["input"].clone()
    one_off[1, 3] += 0.01
    for wrong in (
        1.001 * right["input"],
        loss_and_gradients(cast(without, torch.float64), eager)["input"],
        one_off,
    ):
        with pytest.raises(AssertionError, match="found gradients"):
            check_direction(case, {**right, "input": wrong})


def test_difference_quotients_on_a_kink():
    case = penalised()
    case.input[0, 4] = case.input[0].max() - 0.5
    assert check_direction(case, loss_and_gradients(cast(case, torch.float64), eager)) is None


def test_pieces_add_up(tmp_path):
    first, second = (run("torch", 10, chosen=seed) for seed in (1, 2))
    cases, options = first.cases + second.cases, first.options + second.options
    for piece in (first, second):
        total = added_up(piece, tmp_path / "counts", "torch")
    assert (total.cases, total.options) == (cases, options)
