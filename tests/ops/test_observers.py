"""What profilers and FLOP counters see of the operations."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedloss

ROOT = Path(__file__).parents[2]
ROWS, WIDTH, CLASSES = 8, 6, 5


def head(requires_grad=True):
    x = torch.randn(ROWS, WIDTH, requires_grad=requires_grad)
    w = torch.randn(CLASSES, WIDTH, requires_grad=requires_grad)
    return x, w, torch.arange(ROWS) % CLASSES


def test_a_profile_names_the_operations():
    x, w, y = head()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fusedloss.cross_entropy(x, y).backward()
        fusedloss.linear_cross_entropy(x, w, y, reduction="none").sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"fusedloss::softmax_ce", "fusedloss::linear_stats", "fusedloss::linear_stats_backward"} <= names


@pytest.mark.parametrize("reduction, products", [("mean", 3), ("none", 4)])
def test_flops_of_a_linear_head(reduction, products):
    from torch.utils.flop_counter import FlopCounterMode

    x, w, y = head()
    with FlopCounterMode(display=False) as counter:
        fusedloss.linear_cross_entropy(x, w, y, reduction=reduction).sum().backward()
    assert counter.get_total_flops() == products * 2 * ROWS * WIDTH * CLASSES
    x, w, y = head(requires_grad=False)
    with FlopCounterMode(display=False) as counter:
        fusedloss.linear_cross_entropy(x, w, y)
    assert counter.get_total_flops() == 2 * ROWS * WIDTH * CLASSES


@pytest.mark.parametrize(
    "order", ["import fusedloss, torch.utils.flop_counter as f", "import torch.utils.flop_counter as f, fusedloss"]
)
def test_formulas_are_registered_whoever_is_imported_first(order):
    code = f"import torch; {order}; print(torch.ops.fusedloss.linear_ce in f.flop_registry)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.stdout == "True\n", ran.stderr
