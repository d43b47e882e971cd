"""The cluster kernel of long rows: its source as C++ with emulated threads, and its way through the driver.

No GPU runs here: that the machine does what the emulation does is for one to show.
"""

import ctypes
import math
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fusedloss.backends.cuda import cluster, driver
from fusedloss.core.operands import LogitInputs, RowInputs, SoftmaxMask
from fusedloss.core.row_loss import RowOptions

EMULATION = Path(__file__).parents[1] / "cases" / "cluster_emulation.h"
COMPILER = shutil.which("g++")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++ for the emulation")


class Launch(ctypes.Structure):
    """What the emulated driver was given."""

    _fields_ = (
        *((name, ctypes.c_uint * 3) for name in ("grid", "block")),
        *((name, ctypes.c_uint) for name in ("shared_bytes", "attribute")),
        ("cluster", ctypes.c_uint * 3),
        *((name, ctypes.c_uint) for name in ("largest_shared", "code_bytes")),
        ("stream", ctypes.c_ulonglong),
    )


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """(plan, changes of the source) -> the kernel as a library."""
    folder, built = tmp_path_factory.mktemp("cluster"), {}

    def build(plan, change=None):
        key = (plan.macros, change)
        if key not in built:
            text = cluster.SOURCE.read_text()
            if change is not None:
                assert text.count(change[0]) >= 1
                text = text.replace(*change)
            source, library = folder / f"{len(built)}.cpp", folder / f"{len(built)}.so"
            source.write_text(text)
            emulation = f'-DEMULATION="{EMULATION}"'
            options = ("-O1", "-std=c++17", "-shared", "-fPIC", "-w", emulation, *plan.macros)
            subprocess.run([COMPILER, *options, source, "-o", library], check=True)
            built[key] = ctypes.CDLL(str(library))
            built[key].run.restype = ctypes.c_char_p
            built[key].last_launch.restype = ctypes.POINTER(Launch)
        return built[key]

    return build


def small_plan(num_classes, dtype, scale, bias, clusters, stages=2, aligned=True):
    """A plan of two warps for so few classes."""
    lanes = 16 // dtype.itemsize
    width = -(-num_classes // (clusters * 64)) * 64
    room = width if aligned else width + 64
    shared = cluster.HEADER + 4 * width * (scale + bias) + stages * room * dtype.itemsize
    vectors = -(-(width if aligned else width + lanes) // (64 * lanes))
    sizes = (vectors, stages, clusters, int(scale), int(bias), int(aligned), width)
    return cluster.Plan(cluster._ELEMENTS[dtype], 2, *sizes, shared)


def made(rows, num_classes, dtype, *, scale=True, bias=True, weight=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, num_classes, generator=generator)).to(dtype)
    labels = torch.randint(num_classes, (rows,), generator=generator)
    labels[1::4] = -100
    affine = [torch.rand(num_classes, generator=generator) + 0.5, torch.randn(num_classes, generator=generator)]
    class_weight = torch.rand(num_classes, generator=generator) + 0.5 if weight else None
    return LogitInputs(logits, labels, affine[0] if scale else None, affine[1] if bias else None, class_weight)


def truth(inputs, mean=True):
    """Row losses and gradient in float64."""
    x = inputs.logits.double().requires_grad_()
    z = x if inputs.scale is None else x * inputs.scale.double()
    z = z if inputs.bias is None else z + inputs.bias.double()
    weight = None if inputs.class_weight is None else inputs.class_weight.double()
    rows = torch.nn.functional.cross_entropy(z, inputs.target, weight, reduction="none")
    kept = inputs.target != -100
    total = torch.where(kept, rows, 0.0).sum()
    (total / denominator(inputs).double() if mean else total).backward()
    return torch.where(kept, rows, 0.0).detach(), torch.where(kept[:, None], x.grad, 0.0)


def denominator(inputs):
    labels = inputs.target[inputs.target != -100]
    weight = inputs.class_weight
    return torch.tensor(float(len(labels))) if weight is None else weight[labels].sum()


def emulate(library, plan, inputs, mean=True, clusters=2, seed=0):
    """Row losses and gradient by the kernel; NaN where it wrote nothing."""
    grad = torch.full_like(inputs.logits, math.nan)
    row_loss = torch.full((len(grad),), math.nan)
    kept = [*inputs[1:5], denominator(inputs) if mean else None]
    arguments = cluster.arguments_of(plan, inputs.logits, kept, grad, row_loss, -100)
    wrong = library.run(ctypes.byref(arguments), clusters * plan.cluster, plan.shared_bytes, seed)
    assert wrong is None, wrong
    return row_loss, grad


def check(found, expected, dtype):
    """Both within a few units of float32 of the row's largest, and a rounding of `dtype`."""
    rows, grad = found
    torch.testing.assert_close(rows.double(), expected[0], rtol=2e-6, atol=4e-6, equal_nan=True)
    rtol = {torch.float32: 4e-6, torch.bfloat16: 2**-8 + 4e-6, torch.float16: 2**-11 + 4e-6}[dtype]
    atol = 1e-9 if dtype != torch.float16 else 2**-24
    torch.testing.assert_close(grad.double(), expected[1], rtol=rtol, atol=atol, equal_nan=True)


SCALES = [
    (False, False),
    pytest.param(True, False, marks=pytest.mark.slow),
    pytest.param(False, True, marks=pytest.mark.slow),
    (True, True),
]


@pytest.mark.parametrize(("dtype", "clusters"), list(zip(DTYPES, (2, 4, 8), strict=True)))
@pytest.mark.parametrize(("scale", "bias"), SCALES)
def test_loss_and_gradient(emulated, dtype, scale, bias, clusters):
    for num_classes in (clusters * 128, clusters * 192 - 8, (clusters - 1) * 64 + 8):
        plan = small_plan(num_classes, dtype, scale, bias, clusters)
        for mean in (True, False):
            inputs = made(9, num_classes, dtype, scale=scale, bias=bias, weight=mean)
            check(emulate(emulated(plan), plan, inputs, mean), truth(inputs, mean), dtype)


def displaced(rows, step, offset, fill):
    """Like rows, so many elements apart and the first so many from a multiple of 16 bytes; and what it lies in."""
    whole = torch.full((len(rows) * step + 64,), fill).to(rows.dtype)
    start = (-whole.data_ptr() // rows.itemsize) % (16 // rows.itemsize) + offset
    view = whole[start : start + len(rows) * step].view(len(rows), step)[:, : rows.shape[1]]
    view.copy_(rows)
    return view, whole


@pytest.mark.parametrize(("dtype", "clusters"), list(zip(DTYPES, (4, 2, 2), strict=True)))
@pytest.mark.parametrize(("scale", "bias"), [*SCALES[:2], SCALES[3]])
def test_rows_that_begin_anywhere(emulated, dtype, scale, bias, clusters):
    for num_classes in (clusters * 128 - 1, (clusters - 1) * 64 + 1, (clusters - 1) * 64 + 13):
        plan = small_plan(num_classes, dtype, scale, bias, clusters, aligned=False)
        inputs = made(12, num_classes, dtype, scale=scale, bias=bias)
        if scale:
            inputs.scale[::3] *= -1
        inputs.target[2], inputs.target[3] = 0, num_classes - 1
        for step, offset in ((num_classes, 0), (num_classes + 5, 3)):
            logits, _ = displaced(inputs.logits, step, offset, math.nan)
            grad, around = displaced(torch.full_like(logits, 7.0), step, offset, 7.0)
            kept, row_loss = [*inputs[1:5], denominator(inputs)], torch.full((12,), math.nan)
            arguments = cluster.arguments_of(plan, logits, kept, grad, row_loss, -100)
            for seed in range(2):
                assert emulated(plan).run(ctypes.byref(arguments), 2 * clusters, plan.shared_bytes, seed) is None
                check((row_loss, grad), truth(inputs), dtype)
            grad.fill_(7.0)
            assert (around == 7).all()


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 12])
def test_rows_and_stages(emulated, stages, rows):
    plan = small_plan(512, torch.bfloat16, True, False, 2, stages)
    inputs = made(rows, 512, torch.bfloat16, bias=False)
    results = []
    for clusters in (1, 2, 3):
        for seed in range(3):
            results.append(emulate(emulated(plan), plan, inputs, clusters=clusters, seed=seed))
    check(results[0], truth(inputs), torch.bfloat16)
    for other in results[1:]:
        assert all(torch.equal(one, again) for one, again in zip(results[0], other, strict=True))


def special(name, inputs):
    """The same with awkward values in some rows."""
    x, labels = inputs.logits.clone(), inputs.target.clone()
    rows = torch.arange(len(x))
    labels[:] = rows * 37 % x.shape[1]
    if name == "masked":
        x[:, 1::2] = -math.inf
        labels[:] = labels // 2 * 2
    elif name == "label masked":
        x[rows, labels] = -math.inf
    elif name == "label alone":
        x[:] = -math.inf
        x[rows, labels] = -70.0
    elif name == "nothing left":
        x[2] = -math.inf
    elif name == "confident":
        x[rows, labels] = 40.0
    elif name == "far below":
        x -= 300.0
    elif name == "hopeless":
        x[rows, labels] = -300.0
    elif name == "nan":
        x[2, 5], x[3, labels[3]] = math.nan, math.nan
    elif name == "infinite":
        x[2, 5], x[3, labels[3]] = math.inf, math.inf
    elif name == "ignored nan":
        x[2], labels[2] = math.nan, -100
    elif name == "ignored":
        labels[:] = -100
    return inputs._replace(logits=x, target=labels)


SPECIAL = ["masked", "label masked", "label alone", "nothing left", "confident", "far below", "hopeless", "nan",
           "infinite", "ignored nan", "ignored"]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_values(emulated, name, dtype):
    plan = small_plan(512, dtype, False, False, 4)
    inputs = special(name, made(6, 512, dtype, scale=False, bias=False, weight=False))
    check(emulate(emulated(plan), plan, inputs, mean=False), truth(inputs, mean=False), dtype)
    if name == "confident":
        # Smaller than a rounding of 1: the truth sums the others alone.
        z = inputs.logits.double()
        others = z.scatter(1, inputs.target[:, None], -math.inf).logsumexp(1) - 40.0
        rows, _ = emulate(emulated(plan), plan, inputs, mean=False)
        torch.testing.assert_close(rows.double(), others.exp().log1p(), rtol=1e-5, atol=0)


def test_labels_out_of_range_make_their_rows_nan(emulated):
    plan = small_plan(512, torch.float32, True, True, 2)
    inputs = made(6, 512, torch.float32)
    labels = torch.tensor([1, 512, -1, 2**32, -(2**40), 4])
    rows, grad = emulate(emulated(plan), plan, inputs._replace(target=labels, class_weight=None), mean=False)
    assert rows.isnan().tolist() == grad.isnan().all(1).tolist() == [False, True, True, True, True, False]


def test_rows_apart(emulated):
    """Rows of a wider tensor; nothing between them is written."""
    plan = small_plan(512, torch.bfloat16, False, False, 2)
    inputs = made(5, 512, torch.bfloat16, scale=False, bias=False, weight=False)
    wide, grad = torch.full((5, 640), math.nan).bfloat16(), torch.full((5, 576), 7.0).bfloat16()
    wide[:, 64:576] = inputs.logits
    logits, row_loss = wide[:, 64:576], torch.empty(5)
    arguments = cluster.arguments_of(plan, logits, [inputs.target, *[None] * 4], grad[:, :512], row_loss, -100)
    assert emulated(plan).run(ctypes.byref(arguments), 4, plan.shared_bytes, 0) is None
    check((row_loss, grad[:, :512]), truth(inputs, mean=False), torch.bfloat16)
    assert (grad[:, 512:] == 7).all()


_SYNC, _OUT = "block_sync();\n        ", "if (thread == 0) {\n            copy_out"
BROKEN = {
    "sums before all warps have theirs": (f"{_SYNC}sums = over_lanes(of_warps", "sums = over_lanes(of_warps"),
    "sums before all blocks have theirs": (
        "cluster_sync();\n        sums = over_lanes(of_blocks",
        "sums = over_lanes(of_blocks",
    ),
    "a gradient out before it is whole": (_SYNC + _OUT, _OUT),
    "a buffer filled before it went out": ("wait_for_copies_but_one();", ""),
    "a row read before it is there": ("barrier_wait(full + stage, phase);", ""),
    "a label in its own sum": ("if (c + i == mine) value[v][i] = -INFINITE;", ";"),
    "a thread's maximum as the row's": ("share * exp2_approx(top - most)", "share"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_fails(emulated, name):
    plan = small_plan(1024, torch.float32, True, False, 4)
    library, inputs = emulated(plan, BROKEN[name]), made(12, 1024, torch.float32, bias=False)
    with pytest.raises(AssertionError):
        for seed in range(5):
            check(emulate(library, plan, inputs, seed=seed), truth(inputs), torch.float32)


def test_plans_fit_a_multiprocessor():
    for dtype in DTYPES:
        for scale, bias in ((False, False), (True, False), (True, True)):
            for num_classes in range(cluster.FEWEST // 8 * 8 + 8, cluster.MOST + 1, 4096 + 8):
                plan = cluster.plan(num_classes, dtype, scale, bias)
                if plan is None:
                    assert (dtype, scale, bias) == (torch.float32, True, True)
                    continue
                assert plan.shared_bytes <= cluster.SHARED_MEMORY and plan.stages >= 2
                assert plan.cluster * plan.slice >= num_classes > (plan.cluster - 1) * plan.slice
                assert plan.vectors * 32 * plan.warps * 16 // dtype.itemsize >= plan.slice
    assert cluster.plan(cluster.MOST + 8, torch.bfloat16, False, False) is None


def served(inputs=None, **changes):
    inputs = made(2, 32768, torch.bfloat16) if inputs is None else inputs
    arguments = {"rows": RowInputs(), "options": RowOptions(), "mask": SoftmaxMask(logits=True), **changes}
    grad = arguments.pop("grad", torch.empty_like(inputs.logits))
    return cluster.serves(inputs, *arguments.values(), grad)


def test_what_is_not_served():
    inputs = made(2, 32768, torch.bfloat16)
    assert served()
    assert not served(made(2, 32000, torch.bfloat16))
    assert served(made(2, 40001, torch.bfloat16))
    assert not served(made(2, 33000, torch.float64))
    assert not served(inputs._replace(soft_cap=3.0))
    assert not served(inputs._replace(target_override=torch.zeros(2)))
    assert not served(inputs._replace(target=torch.rand(2, 32768)))
    assert not served(inputs._replace(logits=displaced(inputs.logits, 32768, 1, 0.0)[0]))
    assert not served(inputs._replace(logits=torch.zeros(32768, 2).bfloat16().t()))
    assert not served(grad=inputs.logits, inputs=inputs)
    assert not served(options=RowOptions(label_smoothing=0.1))
    assert not served(rows=RowInputs(sample_weight=torch.ones(2)))
    assert not served(mask=SoftmaxMask(logits=True, affine=True))
    assert (os.environ.get("FUSEDLOSS_CLUSTER", "0") in ("", "0")) == (not cluster.ENABLED)


def nvrtc():
    try:
        driver._compiler()
    except OSError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiles_by_nvrtc(dtype, architecture):
    nvrtc()
    plan = cluster.plan(32768, dtype, True, dtype != torch.float32)
    assert driver.compiled(cluster.SOURCE.read_text(), plan.macros, architecture).startswith(b"\x7fELF")


def test_a_source_that_does_not_compile_says_why():
    nvrtc()
    with pytest.raises(RuntimeError, match="nothing_like_it"):
        driver.compiled("__global__ void f() { nothing_like_it(); }", (), "sm_90")


def test_no_registers_spill(tmp_path):
    triton = pytest.importorskip("triton")
    nvrtc()
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for dtype, num_classes in ((torch.bfloat16, 128256), (torch.float32, 65536)):
        plan = cluster.plan(num_classes, dtype, True, True)
        code = driver.compiled(cluster.SOURCE.read_text(), plan.macros, "sm_90")
        (tmp_path / "kernel.cubin").write_bytes(code)
        command = [tool, "--dump-resource-usage", tmp_path / "kernel.cubin"]
        used = subprocess.run(command, capture_output=True, check=True).stdout.decode()
        assert "STACK:0" in used and "LOCAL:0" in used, used


@pytest.mark.parametrize(
    ("dtype", "num_classes", "scale"),
    [(torch.bfloat16, 32768, True), (torch.float32, 32064, False), (torch.bfloat16, 32771, True)],
)
def test_through_the_driver(emulated, monkeypatch, dtype, num_classes, scale):
    """From the hook to the launch, which the emulation runs as the driver would."""
    nvrtc()
    plan = cluster.plan(num_classes, dtype, scale, False, num_classes % 8 == 0)
    library = emulated(plan)
    monkeypatch.setattr(cluster, "ENABLED", True)
    monkeypatch.setattr(driver, "_driver", lambda: library)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=2 * plan.cluster + 1)
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    driver.unavailable_reason.cache_clear()
    driver.kernel.cache_clear()
    inputs = made(5, num_classes, dtype, scale=scale, bias=False)
    grad = torch.full_like(inputs.logits, math.nan)
    arguments = (RowInputs(), RowOptions(), denominator(inputs), SoftmaxMask(logits=True), grad)
    assert cluster.try_softmax_ce(inputs, *arguments) is None  # these tensors are on the CPU
    found = cluster.launch(plan, inputs, denominator(inputs), grad)
    check((found, grad), truth(inputs), dtype)
    last = library.last_launch().contents
    assert list(last.grid) == [2 * plan.cluster, 1, 1] and list(last.block) == [32 * plan.warps, 1, 1]
    assert last.attribute == 4 and list(last.cluster) == [plan.cluster, 1, 1]
    assert last.shared_bytes == last.largest_shared == plan.shared_bytes and last.stream == 77
    assert last.code_bytes == 4  # machine code
    driver.unavailable_reason.cache_clear()
    driver.kernel.cache_clear()


HOOKED = """
import torch
from fusedloss.backends.cuda import cluster
from fusedloss.backends.triton.softmax_ce import softmax_ce
from fusedloss.core.operands import LogitInputs, RowInputs, SoftmaxMask
from fusedloss.core.row_loss import RowOptions

def served(inputs, rows, options, denominator, mask, grad):
    assert float(denominator) == 2
    grad.fill_(5.0)
    return torch.tensor([6.0, 8.0]), [grad]

inputs = LogitInputs(torch.zeros(2, 40), torch.tensor([3, 4]))
arguments = (inputs, RowInputs(), RowOptions(), True, SoftmaxMask(logits=True))
assert round(float(softmax_ce(*arguments)[0]), 4) == 3.6889  # log 40: off by default
cluster.ENABLED, cluster.try_softmax_ce = True, served
loss, rows, grads = softmax_ce(*arguments)
assert loss == 7 and rows.tolist() == [6, 8] and len(grads) == 1 and (grads[0] == 5).all()
softmax_ce(*arguments, in_place=True)
"""


def test_triton_asks_it_first():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FUSEDLOSS_CLUSTER": "0"}
    pytest.importorskip("triton")
    run = subprocess.run([sys.executable, "-c", HOOKED], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
