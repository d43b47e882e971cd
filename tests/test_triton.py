"""The Triton backend: interpreted on the CPU, compiled ahead of time, and on a GPU where there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_cases

from fusedloss.backends import triton as backend

ROOT = Path(__file__).parent.parent


def run(*command, **environment):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        **environment,
    }
    found = subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def interpreted():
    # NumPy, which interprets, warns of the infinities that the cases are about.
    return json.loads(run("-W", "ignore", "tests/triton_cases.py", TRITON_INTERPRET="1"))


@pytest.mark.parametrize("name", [*triton_cases.CASES, *triton_cases.INTERPRETED])
def test_interpreted(interpreted, name):
    assert interpreted[name] == []


def test_compiled_without_spills():
    table = run("-m", "bench.resources", "--quick")
    kernels = {line.split()[0] for line in table.splitlines()}
    assert kernels >= {
        "row_kernel",
        "column_kernel",
        "label_kernel",
        "scale_kernel",
        "chunk_kernel",
        "class_kernel",
    }
    assert "0 with spills" in table


def test_every_case_compiles():
    """The interpreter accepts what the compiler refuses: each launch goes through its front end."""
    assert int(run("tests/triton_front_end.py")) > 100


def test_labels_are_asserted_on_the_device():
    # The interpreter leaves assertions out, so the compiled kernel is asked for its own.
    code = (
        "from bench.resources import _softmax_stats, compiling\n"
        "with compiling(90) as found:\n"
        "    _softmax_stats('f32', 10)\n"
        "print({name: 'assertfail' in kernel.asm['ptx'] for name, kernel in found})\n"
    )
    assert run("-c", code) == "{'label_kernel': True, 'row_kernel': False}\n"


def test_import_takes_no_kernels():
    # PyTorch may import Triton of its own accord, so what counts is that ours don't ask for it.
    imports = "import sys, fusedloss.backends.triton as t"
    code = f"{imports}; t.absent('cpu'); print(t.__name__ + '.launch' in sys.modules)"
    assert run("-c", code) == "False\n"


def test_absent_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in backend.absent("cpu")
    assert "'mps'" in backend.absent("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.absent("cuda") == "PyTorch sees no GPU"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.absent("cpu") is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backend.absent("cpu") == "the package triton is not installed"


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.gpu
@needs_gpu
def test_on_gpu():
    found = {name: triton_cases.outcome(check, "cuda") for name, check in triton_cases.CASES.items()}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.gpu
@needs_gpu
def test_label_out_of_range_fails_an_assertion():
    code = (
        "import torch\n"
        "from fusedloss.backends.triton.softmax_ce import softmax_ce\n"
        "x, y = torch.randn(2, 5, device='cuda'), torch.tensor([5, 1], device='cuda')\n"
        "softmax_ce(x, y, *[None] * 5, 0.0, 0.0, 0.0, -100, True, [False] * 3)\n"
        "torch.cuda.synchronize()\n"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "a label is outside" in found.stderr


@pytest.mark.gpu
@needs_gpu
def test_more_than_two_to_the_31_logits():
    from fusedloss.backends.triton.softmax_ce import softmax_ce

    rows, classes = 3, 2**30
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device="cuda")
    logits[2, classes - 1] = 30.0
    target = torch.tensor([0, 1, classes - 1], device="cuda")
    arguments = (None,) * 5 + (0.0, 0.0, 0.0, -100, False, [True, False, False])
    _, row_loss, (gradient,) = softmax_ce(logits, target, *arguments)
    truth = torch.tensor([classes, classes, 1 + (classes - 1) * 9.357622968840175e-14], dtype=torch.float64).log()
    torch.testing.assert_close(row_loss.cpu().double(), truth, rtol=1e-4, atol=1e-6)
    assert gradient[1, 1].item() == -1.0
    assert gradient[2, 0].item() > 0


@pytest.mark.gpu
@needs_gpu
def test_captured_in_a_graph():
    from fusedloss.backends.triton.softmax_ce import scale_in_place, softmax_ce

    logits, target = torch.randn(64, 1000, device="cuda"), torch.randint(1000, (64,), device="cuda")
    scale, factor = torch.rand(1000, device="cuda"), torch.ones((), device="cuda")

    def step():
        loss, _, gradients = softmax_ce(
            logits, target, scale, *[None] * 4, 0.1, 0.0, 0.0, -100, True, [True, True, False]
        )
        return loss, [scale_in_place(gradient, factor) for gradient in gradients]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradients = step()
    logits.normal_()
    graph.replay()
    truth, expected = step()
    assert torch.equal(loss, truth)
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))
