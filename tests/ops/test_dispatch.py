"""Whatever is not a plain tensor, in whatever argument, reaches the kernels through torch's dispatcher; threads too."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from wrapped import Wrapped, plain

import fusedloss
from fusedloss import backends
from fusedloss.backends.cpp import unavailable_reason
from fusedloss.terms import AngularMargin, ClassTemperature, Prior, Scale

ROOT = Path(__file__).parents[2]
needs_kernels = pytest.mark.skipif(unavailable_reason("cpu") is not None, reason="no compiled module")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
]


def logits_case():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, generator=generator)
    return {
        "input": x,
        "target": torch.tensor([0, 1, 2, 3, 4, -100]),
        "weight": torch.rand(5, generator=generator) + 0.5,
        "tau": torch.rand(5, generator=generator) + 0.5,
        "label_smoothing": 0.3 * torch.rand(6, generator=generator),
        "sample_weight": torch.rand(6, generator=generator) + 0.1,
    }


def loss_of(case, reduction="mean"):
    case = dict(case)
    terms = [ClassTemperature(case.pop("tau"))]
    return fusedloss.cross_entropy(**case, terms=terms, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", list(logits_case()))
def test_a_wrapper_subclass_in_any_argument(name, reduction):
    case = logits_case()
    expected = loss_of(case, reduction)
    case[name] = Wrapped(case[name])
    torch.testing.assert_close(plain(loss_of(case, reduction)), expected)


@pytest.mark.parametrize("name", ["input", "linear_weight", "target", "linear_bias", "weight"])
def test_a_wrapper_subclass_in_any_argument_of_a_linear_head(name):
    case = {
        "input": torch.randn(6, 3),
        "linear_weight": torch.randn(5, 3),
        "target": torch.tensor([0, 1, 2, 3, 4, -100]),
        "linear_bias": torch.randn(5),
        "weight": torch.rand(5) + 0.5,
    }
    expected = fusedloss.linear_cross_entropy(**case)
    case[name] = Wrapped(case[name])
    torch.testing.assert_close(plain(fusedloss.linear_cross_entropy(**case)), expected)


def test_gradients_reach_a_subclass():
    case = logits_case()
    leaf = Wrapped(case["input"].clone().requires_grad_())
    case["input"] = leaf
    loss_of(case).backward()
    expected = logits_case()
    expected["input"].requires_grad_()
    loss_of(expected).backward()
    torch.testing.assert_close(plain(leaf.grad), expected["input"].grad)


@pytest.fixture
def distributed(tmp_path):
    """What makes a tensor a DTensor on a mesh of this process alone."""
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("torch without torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda tensor: distribute_tensor(tensor, mesh, [Replicate()])
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_a_dtensor_in_any_argument_is_never_taken_for_a_plain_tensor(distributed):
    """Torch refuses it by the operation's name; the reference's formulas take DTensors."""
    for name in logits_case():
        case = logits_case()
        case[name] = distributed(case[name])
        with pytest.raises(RuntimeError, match="and DTensor"):
            loss_of(case)
    with pytest.raises(RuntimeError, match="and DTensor"):
        fusedloss.linear_cross_entropy(torch.randn(6, 3), distributed(torch.randn(5, 3)), logits_case()["target"])
    every = {name: distributed(value) for name, value in logits_case().items() if name in ("input", "target")}
    with pytest.raises(NotImplementedError, match="softmax_ce"):
        fusedloss.cross_entropy(**every)
    with fusedloss.backend("reference"):
        found = fusedloss.cross_entropy(**every)
    expected = F.cross_entropy(*(logits_case()[name] for name in every))
    torch.testing.assert_close(found.full_tensor(), expected)


def negative(tensor):
    """The same numbers behind the negative bit."""
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg()
    torch.testing.assert_close(view.clone(), tensor)
    return view


@pytest.mark.parametrize("name", ["input", "weight", "tau", "label_smoothing", "sample_weight"])
def test_the_negative_bit_is_honoured(name):
    case = logits_case()
    expected = loss_of(case)
    case[name] = negative(case[name])
    torch.testing.assert_close(loss_of(case), expected)


def test_the_negative_bit_in_a_linear_head():
    x, w, y = torch.randn(6, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 4, 0])
    terms = [AngularMargin(0.3), Scale(8.0)]
    expected = fusedloss.linear_cross_entropy(x, w, y, normalize=True, terms=terms)
    found = fusedloss.linear_cross_entropy(negative(x), negative(w), y, normalize=True, terms=terms)
    torch.testing.assert_close(found, expected)


def strided(tensor):
    """The same numbers, not contiguous."""
    return torch.stack([tensor, tensor + 100], -1)[..., 0]


@pytest.mark.parametrize("make", [strided, lambda t: t[:1].expand(t.shape)], ids=["strided", "expanded"])
@pytest.mark.parametrize("name", ["weight", "tau", "label_smoothing", "sample_weight"])
def test_strides_of_the_smaller_arguments_are_honoured(name, make):
    case = logits_case()
    case[name] = make(case[name])
    expected = loss_of({**case, name: case[name].clone(memory_format=torch.contiguous_format)})
    torch.testing.assert_close(loss_of(case), expected)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("make", [strided, lambda t: t[:1].expand(t.shape)], ids=["strided", "expanded"])
@pytest.mark.parametrize("terms", [(), (Scale(2.0),), (Prior(torch.randn(5)),)], ids=["bare", "scale", "prior"])
def test_a_linear_bias_that_is_not_contiguous(terms, make, normalize):
    x, w, y = torch.randn(6, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 4, -100])
    bias = make(torch.randn(5)).requires_grad_()
    dense = bias.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    found = fusedloss.linear_cross_entropy(x, w, y, linear_bias=bias, terms=terms, normalize=normalize)
    expected = fusedloss.linear_cross_entropy(x, w, y, linear_bias=dense, terms=terms, normalize=normalize)
    torch.testing.assert_close(found, expected)
    ours, theirs = torch.autograd.grad(found, bias)[0], torch.autograd.grad(expected, dense)[0]
    torch.testing.assert_close(ours, theirs)


class Counting(TorchDispatchMode):
    """A mode that sees every operation."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_a_mode_sees_the_operations():
    with Counting() as mode:
        loss_of(logits_case())
    assert "fusedloss::softmax_ce" in mode.names


@pytest.mark.parametrize("how", ["context", "default"])
def test_cpu_tensors_under_another_default_device(how):
    case = logits_case()
    case["input"].requires_grad_()
    expected = loss_of(case)
    x, w, y = torch.randn(6, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 4, 0])
    terms = [AngularMargin(0.3), Scale(8.0)]
    head = fusedloss.linear_cross_entropy(x, w, y, normalize=True, terms=terms)

    def run():
        for reduction in ("mean", "none"):
            found = loss_of(case, reduction)
            found.sum().backward()
        torch.testing.assert_close(loss_of(case), expected)
        torch.testing.assert_close(fusedloss.linear_cross_entropy(x, w, y, normalize=True, terms=terms), head)
        statistics = fusedloss.cross_entropy(case["input"], case["target"], return_stats=True)[1]
        assert statistics.prediction.device.type == "cpu"

    if how == "context":
        with torch.device("meta"):
            run()
        return
    torch.set_default_device("meta")
    try:
        run()
    finally:
        torch.set_default_device(None)


def test_meta_tensors_have_shapes():
    loss = fusedloss.cross_entropy(torch.empty(6, 5, device="meta"), torch.empty(6, dtype=torch.int64, device="meta"))
    assert loss.shape == () and loss.device.type == "meta"


@needs_kernels
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_is_refused():
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(RuntimeError, match=r"torch.jit.trace can't record .*torch.export"):
        torch.jit.trace(lambda a: fusedloss.cross_entropy(a, y), (x,))


@needs_kernels
def test_batched_upstream_gradients_are_right_or_a_sentence():
    case = logits_case()
    case["input"].requires_grad_()
    loss = loss_of(case)
    many = torch.tensor([1.0, 2.0, -0.5])
    (grads,) = torch.autograd.grad(loss, case["input"], many, is_grads_batched=True)
    (one,) = torch.autograd.grad(loss_of(case), case["input"])
    torch.testing.assert_close(grads, many[:, None, None] * one)
    rows = loss_of(case, "none")
    with pytest.raises(RuntimeError, match=r"one upstream gradient at a time.*backend\('reference'\)"):
        torch.autograd.grad(rows, case["input"], torch.eye(6), is_grads_batched=True)


class TestBackendBlocks:
    @needs_kernels
    def test_threads_do_not_disturb_each_other(self):
        inside, done, seen = threading.Event(), threading.Event(), []

        def other():
            inside.wait()
            seen.append(backends.resolve_backend("cpu"))
            with fusedloss.backend("cpp"):
                done.set()
                seen.append(backends.resolve_backend("cpu"))

        thread = threading.Thread(target=other)
        thread.start()
        with fusedloss.backend("reference"):
            inside.set()
            done.wait()
            assert backends.resolve_backend("cpu") == "reference"
        thread.join()
        assert seen == ["cpp", "cpp"]
        assert backends.forced() is None

    def test_interleaved_blocks_leave_nothing_forced(self):
        one, two = fusedloss.backend("reference"), fusedloss.backend("reference")
        before = backends.forced()
        one.__enter__()
        two.__enter__()
        one.__exit__(None, None, None)
        assert backends.forced() == "reference"
        two.__exit__(None, None, None)
        assert backends.forced() == before

    @needs_kernels
    @pytest.mark.parametrize("inside", ["cpp", "reference"])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_a_backward_in_another_block_than_its_forward(self, reduction, inside):
        outside = "reference" if inside == "cpp" else "cpp"
        case = logits_case()
        case["input"].requires_grad_()
        with fusedloss.backend(outside):
            loss = loss_of(case, reduction).sum()
        with fusedloss.backend(inside):
            for _ in range(2):
                (grad,) = torch.autograd.grad(loss, case["input"], retain_graph=True)
        torch.testing.assert_close(grad, torch.autograd.grad(loss_of(case, reduction).sum(), case["input"])[0])

    @needs_kernels
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_a_backward_of_a_head_in_the_reference(self, reduction):
        x, w, y = torch.randn(6, 3, requires_grad=True), torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 4, -100])
        terms = [AngularMargin(0.3), Scale(8.0)]
        loss = fusedloss.linear_cross_entropy(x, w, y, normalize=True, terms=terms, reduction=reduction).sum()
        (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
        with fusedloss.backend("reference"):
            (grad,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(grad, expected)


MODEL = """
import sys, torch, fusedloss
from fusedloss import backends

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(7, 5)
        self.cross_entropy = fusedloss.CrossEntropyLoss(label_smoothing=0.1, focal_gamma=2.0)
        self.rows = fusedloss.CrossEntropyLoss(reduction="none")
        self.head = fusedloss.ArcFaceLoss(7, 5)

    def forward(self, x, y):
        logits = self.layer(x)
        return self.cross_entropy(logits, y) + self.rows(logits, y).square().mean() + self.head(x, y)

generator = torch.Generator().manual_seed(1)
x, y = torch.randn(9, 7, generator=generator), torch.randint(5, (9,), generator=generator)

def step(model):
    loss = model(x, y)
    loss.backward()
    # Strict export in torch 2.8 changes the order of parameters.
    grads = [parameter.grad.clone() for _, parameter in sorted(model.named_parameters())]
    model.zero_grad()
    return loss, grads
"""


@needs_kernels
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_gradients_and_runs_by_plain_pytorch_too(strict, tmp_path):
    names = {}
    exec(MODEL, names)
    model, step = names["Model"](), names["step"]
    batch = torch.export.Dim("batch", min=2)
    given = (torch.randn(6, 7), torch.randint(5, (6,)))
    program = torch.export.export(model, given, dynamic_shapes=({0: batch}, {0: batch}), strict=strict)
    operations = {str(node.target) for node in program.graph.nodes if "fusedloss" in str(node.target)}
    assert operations == {
        f"fusedloss.{name}.default"
        for name in ("softmax_ce", "softmax_stats", "linear_ce", "row_norms", "target_products")
    }
    expected, grads = step(model)
    found, exported_grads = step(program.module())
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(exported_grads, grads, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save([expected.detach(), *grads], tmp_path / "expected.pt")
    code = (
        f"{MODEL}\nassert backends.resolve_backend('cpu') == 'reference'\n"
        "found, grads = step(torch.export.load(sys.argv[1]).module())\n"
        "for ours, theirs in zip([found.detach(), *grads], torch.load(sys.argv[2]), strict=True):\n"
        "    torch.testing.assert_close(ours, theirs)\n"
    )
    environment = {**os.environ, "FUSEDLOSS_BACKEND": "reference", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path / "program.pt2"), str(tmp_path / "expected.pt")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_vmap_over_terms_and_margins():
    x, y = torch.randn(4, 6, 5), torch.randint(5, (4, 6))
    scale = torch.rand(4) + 1.0

    def loss(logits, target, s):
        return fusedloss.cross_entropy(logits, target, terms=[AngularMargin(0.3), Scale(s)])

    cosines = x.tanh()
    found = torch.func.vmap(loss)(cosines, y, scale)
    expected = torch.stack([loss(*each) for each in zip(cosines, y, scale, strict=True)])
    torch.testing.assert_close(found, expected)


def test_grad_of_grad_of_margin_logits_is_right():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 3, 4])
    assert torch.autograd.gradgradcheck(lambda a, b: fusedloss.margin_logits(a, b, labels, scale=4.0), (x, w))


def test_matches_torch_under_functionalization():
    x, y = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, -100])
    found = torch.func.functionalize(lambda a: fusedloss.cross_entropy(a, y))(x)
    torch.testing.assert_close(found, F.cross_entropy(x, y))
