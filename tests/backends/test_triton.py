"""The Triton backend: interpreted on the CPU, compiled ahead of time, and on a GPU where there is one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_cases
import triton_main

import fusedloss
from fusedloss.backends import triton as backend
from fusedloss.core.operands import LogitInputs, RowInputs
from fusedloss.core.row_loss import RowOptions

ROOT = Path(__file__).parents[2]


def run(*command, allowed=(0,), **environment):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "cases"), str(ROOT / "tests" / "oracles")]),
        **environment,
    }
    result = subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode in allowed, result.stdout + result.stderr
    return result.stdout


def kernels_of_the_backend():
    files = (ROOT / "fusedloss/backends/triton").glob("*.py")
    return {name for file in files for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)}


CHUNKS, ALWAYS = 20, 3  # processes, for workers to share: each takes seconds to start; the others' are slow tests
# Neighbours are alike: each process gets some of every kind.
INTERPRETED = [*triton_cases.INTERPRETED, *triton_cases.CASES]


@pytest.mark.parametrize(
    "chunk", [pytest.param(chunk, marks=[] if chunk < ALWAYS else pytest.mark.slow) for chunk in range(CHUNKS)]
)
def test_interpreted(chunk):
    # NumPy, which interprets, warns of the infinities that the cases are about.
    options = {"allowed": (0, 1), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = json.loads(run("-W", "ignore", "tests/cases/triton_cases.py", *INTERPRETED[chunk::CHUNKS], **options))
    assert list(result) == INTERPRETED[chunk::CHUNKS]
    assert {name: wrong for name, wrong in result.items() if wrong} == {}


def test_compiled_without_spills():
    table = run("-m", "bench.resources", "--quick")
    kernels = {line.split()[0] for line in table.splitlines()}
    assert kernels >= kernels_of_the_backend()
    assert "0 with spills" in table
    # The default tiles fit GPUs with less shared memory than the one compiled for.
    from fusedloss.backends.triton import tuning

    shared = [int(line.split()[-3]) for line in table.splitlines()[1:-1]]
    assert max(shared) <= tuning.SHARED


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_cases_compile(every):
    """The interpreter accepts what the compiler refuses: each launch goes through its front end."""
    assert int(run("tests/cases/triton_front_end.py", *list(triton_cases.CASES)[::every])) > 100 // every


def test_labels_are_asserted_on_the_device():
    # The interpreter leaves assertions out, so it is looked for in the compiled kernel.
    code = (
        "from bench.resources import compiling\n"
        "from bench.variants.softmax_ce import softmax_stats\n"
        "with compiling(90) as result:\n"
        "    softmax_stats('f32', 10)\n"
        "print({name: 'assertfail' in kernel.asm['ptx'] for name, kernel in result})\n"
    )
    assert run("-c", code) == "{'label_kernel': True, 'row_kernel': False}\n"


def test_import_takes_no_kernels():
    # PyTorch may import Triton of its own accord, so what counts is that ours don't ask for it.
    imports = "import sys, fusedloss.backends.triton as t"
    code = f"{imports}; t.unavailable_reason('cpu'); print(t.__name__ + '.launch' in sys.modules)"
    assert run("-c", code) == "False\n"


def test_absent_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in backend.unavailable_reason("cpu")
    assert "'mps'" in backend.unavailable_reason("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.unavailable_reason("cuda") == "PyTorch sees no GPU"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.unavailable_reason("cpu") is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backend.unavailable_reason("cpu") == "the package triton is not installed"


def test_tuning_table_is_as_written():
    """Every type and width has its tile, of powers of two, and the file is what bench.tune would write."""
    from bench import tuning_file
    from fusedloss.backends.triton import tuning

    assert tuning.PATH.read_text() == tuning_file.text(tuning.DEVICES)
    default = tuning.DEVICES[tuning.DEFAULT]["tiles"]
    for device in tuning.DEVICES.values():
        tiles = device["tiles"]
        assert {stem: set(dates) for stem, dates in device["measured"].items()} == (
            {} if tiles is default else {stem: set(types) for stem, types in tiles.items()}
        )
        assert all(name in default[stem][each] for stem in tiles for each in tiles[stem] for name in tiles[stem][each])
        entries = [entry for types in tiles.values() for each in types.values() for entry in each.values()]
        assert all(size & (size - 1) == 0 for *sizes, _stages in entries for size in sizes)
        # Triton 3.6 multiplies nothing narrower than 16.
        products = [
            entry for stem in {"supcon"} & set(tiles) for each in tiles[stem].values() for entry in each.values()
        ]
        assert all(size >= 16 for *sizes, _warps, _stages in products for size in sizes)


def test_tiles_of_a_device_come_before_the_defaults(monkeypatch):
    from fusedloss.backends.triton import tuning

    device, other = torch.device("cuda", 0), torch.device("cpu")
    tuning.device_key.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(tuning.DEVICES, "sm_90", {"tiles": {"softmax_ce": {"float32": {"16": [1, 16, 1, 1]}}}})
    defaults = tuning.DEVICES[tuning.DEFAULT]["tiles"]["softmax_ce"]["float32"]
    assert tuning.entry(device, "softmax_ce", torch.float32, "16") == [1, 16, 1, 1]
    assert tuning.entry(device, "softmax_ce", torch.float32, "32") == defaults["32"]
    assert tuning.entry(other, "softmax_ce", torch.float32, "16") == defaults["16"]
    tuning.device_key.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("name", triton_cases.CASES)
def test_on_gpu(name):
    """Values, bitwise reruns, no waiting for the device, and capture in a graph; see triton_truth.repeated."""
    assert triton_main.outcome(triton_cases.CASES[name], "cuda") == []


@pytest.mark.gpu
def test_label_out_of_range_fails_an_assertion():
    code = (
        "import torch\n"
        "import fusedloss\n"
        "x, y = torch.randn(2, 5, device='cuda'), torch.tensor([5, 1], device='cuda')\n"
        "fusedloss.cross_entropy(x, y)\n"
        "torch.cuda.synchronize()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "a label is outside" in result.stderr


@pytest.mark.gpu
def test_more_than_two_to_the_31_logits():
    from fusedloss import ops

    rows, classes = 3, 2**30
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    with torch.no_grad():
        logits[2, classes - 1] = 30.0
    target = torch.tensor([0, 1, classes - 1], device="cuda")
    loss = ops.softmax_ce(LogitInputs(logits, target), RowInputs(), RowOptions(), mean=False)
    loss.backward()
    truth = torch.tensor([classes, classes, 1 + (classes - 1) * 9.357622968840175e-14], dtype=torch.float64).log()
    torch.testing.assert_close(loss.detach().cpu().double(), truth.sum(), rtol=1e-4, atol=1e-6)
    assert logits.grad[1, 1].item() == -1.0
    assert logits.grad[2, 0].item() > 0


def step_of(logits, target, **options):
    """A training step's loss and gradients of logits and a class temperature."""
    tau = (torch.rand(logits.shape[1], generator=torch.Generator().manual_seed(1)) + 0.5).to(logits.device)
    tau.requires_grad_()
    x = logits.detach().requires_grad_()

    def step():
        x.grad = tau.grad = None
        loss = fusedloss.cross_entropy(x, target, terms=[fusedloss.ClassTemperature(tau)], **options)
        (loss.sum() / 3).backward()
        return loss.detach(), x.grad, tau.grad

    return step


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "focal_gamma": 2.0}, {"reduction": "none"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_wait_for_nothing_and_are_captured(dtype, options):
    logits, target = torch.randn(64, 1000).to(dtype), torch.randint(1000, (64,))
    step = step_of(logits.cuda(), target.cuda(), **options)
    first = [value.clone() for value in step()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = [value.clone() for value in step()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    truth = step_of(logits.double(), target, **options)()
    for one, again, replayed, right in zip(first, second, captured, truth, strict=True):
        assert torch.equal(one, again)
        assert torch.equal(one, replayed)
        tolerance = {"rtol": 2e-2, "atol": 1e-4} if dtype != torch.float32 else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(one.cpu().double(), right, **tolerance)
