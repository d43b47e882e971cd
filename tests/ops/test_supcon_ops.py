"""The operations of supervised contrast as torch sees them: opcheck, shapes, graphs, exports, subclasses and modes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from wrapped import Wrapped

import fusedloss
from fusedloss.backends.cpp import unavailable_reason
from fusedloss.core.normalize import unit_rows

needs_kernels = pytest.mark.skipif(unavailable_reason("cpu") is not None, reason="no compiled module")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]
ROWS, ANCHORS = 12, 8
STATS, BACKWARD = torch.ops.fusedloss.supcon_stats.default, torch.ops.fusedloss.supcon_backward.default


def arguments(with_mask=False, with_weights=False, dtype=torch.float32, requires_grad=True, **changed):
    """Those of supcon_stats, by name."""
    given = {
        "features": torch.randn(ROWS, 4, dtype=dtype, requires_grad=requires_grad),
        "codes": (torch.arange(ROWS) % 3).int(),
        "mask": torch.rand(4, 4) < 0.5 if with_mask else None,
        "weights": torch.rand(3, ROWS, dtype=dtype) + 0.5 if with_weights else None,
        "per_positive": torch.full((ANCHORS,), 0.5, dtype=dtype),
        "temperature": torch.tensor(0.3, dtype=dtype, requires_grad=requires_grad),
        "num_grad_rows": 10,
        "normalized": False,
        "norms": None,
    }
    return {**given, **changed}


def half_arguments(dtype=torch.bfloat16, **changed):
    """The same with 16-bit rows, whose directions are meant."""
    given = arguments(**changed)
    features = given["features"].detach().to(dtype).requires_grad_(given["features"].requires_grad)
    norms = torch.linalg.vector_norm(features.detach().double(), dim=1)
    return {**given, "features": features, "normalized": True, "norms": norms}


@pytest.mark.parametrize(
    "options", [{}, {"with_mask": True}, {"with_weights": True}, {"dtype": torch.float64}], ids=str
)
def test_opcheck(options):
    opcheck(STATS, tuple(arguments(**options).values()))
    given = arguments(**options, requires_grad=False)
    row = torch.full_like(given["per_positive"], 0.5)
    for mask in ([True, True], [True, False], [False, True]):
        opcheck(BACKWARD, (*given.values(), row, row, row, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_opcheck_of_16_bit_rows(dtype):
    opcheck(STATS, tuple(half_arguments(dtype).values()))
    given = half_arguments(dtype, requires_grad=False)
    row = torch.full_like(given["per_positive"], 0.5)
    for mask in ([True, True], [True, False], [False, True]):
        opcheck(BACKWARD, (*given.values(), row, row, row, mask))


@pytest.mark.parametrize("options", [{}, {"with_mask": True}, {"with_weights": True}], ids=str)
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_kernels)])
def test_16_bit_rows_stand_for_their_directions(backend, options):
    given = half_arguments(**options)
    given["features"].data[3], given["norms"][3] = 0, torch.inf
    wide = given["features"].detach().float().requires_grad_()
    temperature = given["temperature"].detach().clone().requires_grad_()
    same = {**given, "features": unit_rows(wide), "temperature": temperature, "norms": None}
    with fusedloss.backend(backend):
        got, expected = STATS(*given.values()), STATS(*same.values())
        torch.testing.assert_close(got, expected)
        grads = torch.autograd.grad(got[0].sum(), (given["features"], given["temperature"]))
        truth = torch.autograd.grad(expected[0].sum(), (wide, temperature))
    assert grads[0].dtype == torch.bfloat16
    torch.testing.assert_close(grads[0], truth[0].bfloat16())
    torch.testing.assert_close(grads[1], truth[1])
    assert (grads[0][3] == 0).all() and (grads[0][given["num_grad_rows"] :] == 0).all()


def test_norms_need_directions():
    with pytest.raises(ValueError, match="normalized must be True with norms; got False"):
        STATS(*{**half_arguments(requires_grad=False), "normalized": False}.values())
    given = {**half_arguments(requires_grad=False), "norms": torch.ones(ROWS)}
    with pytest.raises(TypeError, match=r"norms must be torch\.float64; got torch\.float32"):
        STATS(*given.values())


@pytest.mark.parametrize("name, value, error, words", [
    ("features", torch.ones(ROWS), ValueError, r"features must have shape \(M, D\); got \(12,\)"),
    ("features", torch.ones(ROWS, 4).int(), TypeError, "features must be float32 or float64, or 16 bits with"),
    ("features", torch.ones(ROWS, 4).half(), ValueError, "norms must be given with 16-bit features alone; got None"),
    ("norms", torch.ones(ROWS).double(), ValueError, "norms must be given with 16-bit features alone; got a tens"),
    ("codes", torch.zeros(3).int(), ValueError, r"codes must have shape \(12,\); got \(3,\)"),
    ("codes", torch.zeros(ROWS).long(), TypeError, "codes must be torch.int32; got torch.int64"),
    ("per_positive", torch.ones(ROWS + 1), ValueError, r"per_positive must have shape \(A,\) with A at most 12"),
    ("per_positive", torch.ones(2, 2), ValueError, r"per_positive must have shape \(A,\)"),
    ("weights", torch.ones(2, ROWS), ValueError, r"weights must have shape \(3, 12\); got \(2, 12\)"),
    ("weights", torch.ones(3, ROWS).double(), TypeError, "weights must be torch.float32; got torch.float64"),
    ("mask", torch.ones(4, 3).bool(), ValueError, r"mask must have shape \(4, 4\); got \(4, 3\)"),
    ("mask", torch.ones(5, 5).bool(), ValueError, r"mask must have shape \(B, B\) where .*; got \(5, 5\)"),
    ("mask", torch.ones(0, 0).bool(), ValueError, r"mask must have shape \(B, B\) where .*; got \(0, 0\)"),
    ("mask", torch.ones(4, 4), TypeError, "mask must be torch.bool; got torch.float32"),
    ("temperature", torch.ones(2), ValueError, r"temperature must have shape \(\); got \(2,\)"),
    ("num_grad_rows", 13, ValueError, "num_grad_rows must be between 0 and 12; got 13"),
    ("codes", torch.zeros(ROWS, device="meta").int(), ValueError, "codes must be on cpu; got meta"),
])  # fmt: skip
def test_shapes_are_checked_at_the_entry(name, value, error, words):
    given = arguments(requires_grad=False, **{name: value})
    row = torch.full((ANCHORS,), 0.5)
    with pytest.raises(error, match=words):
        STATS(*given.values())
    with pytest.raises(error, match=words):
        BACKWARD(*given.values(), row, row, row, [True, True])


@pytest.mark.parametrize("place, name", list(enumerate(("row_shift", "row_sum", "grad_loss"))))
def test_rows_of_the_backward_are_checked(place, name):
    rows = [torch.full((ANCHORS,), 0.5) for _ in range(3)]
    rows[place] = rows[place][:5]
    with pytest.raises(ValueError, match=rf"{name} must have shape \(8,\); got \(5,\)"):
        BACKWARD(*arguments(requires_grad=False).values(), *rows, [True, True])


def test_strides_and_negative_views():
    given = arguments(with_weights=True, requires_grad=False)
    expected = STATS(*given.values())
    negative = torch.complex(torch.zeros(ROWS, 4), -given["features"]).conj().imag
    assert negative.is_neg()
    others = {
        "features": (given["features"].t().contiguous().t(), negative),
        "codes": (given["codes"].repeat_interleave(2)[::2],),
        "weights": (given["weights"].t().contiguous().t(),),
        "per_positive": (given["per_positive"].repeat_interleave(2)[::2], torch.full((1,), 0.5).expand(ANCHORS)),
    }
    row = torch.full((ANCHORS,), 0.7)
    gradient = BACKWARD(*given.values(), *expected[1:], row, [True, True])
    for name, values in others.items():
        for value in values:
            changed = {**given, name: value}
            torch.testing.assert_close(STATS(*changed.values()), expected)
            torch.testing.assert_close(BACKWARD(*changed.values(), *expected[1:], row, [True, True]), gradient)
    masked = arguments(with_mask=True, requires_grad=False)
    for flipped in (masked, {**masked, "mask": masked["mask"].t().contiguous().t()}):
        torch.testing.assert_close(STATS(*flipped.values()), STATS(*masked.values()))


def test_second_derivatives_are_refused():
    given = arguments()
    loss = STATS(*given.values())[0].sum()
    (gradient,) = torch.autograd.grad(loss, given["features"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_batched_gradients_are_refused_and_the_reference_takes_them():
    features, labels = torch.randn(6, 4, requires_grad=True), torch.arange(6) % 2
    if unavailable_reason("cpu") is None:
        rows = fusedloss.supcon(features, labels, reduction="none")
        with pytest.raises(RuntimeError, match="one upstream gradient at a time"):
            torch.autograd.grad(rows, features, torch.eye(6), is_grads_batched=True)
    with fusedloss.backend("reference"):
        rows = fusedloss.supcon(features, labels, reduction="none")
        (batched,) = torch.autograd.grad(rows, features, torch.eye(6), is_grads_batched=True, retain_graph=True)
        one_by_one = [torch.autograd.grad(row, features, retain_graph=True)[0] for row in rows]
    torch.testing.assert_close(batched, torch.stack(one_by_one))


class Views(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.loss = fusedloss.SupConLoss(**options)

    def forward(self, x, y):
        return self.loss(x, y)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", [
    {}, {"learn_temperature": True}, {"class_balance": True, "reduction": "none"},
    {"contrast_mode": "one", "focal_gamma": 1.0},
], ids=str)  # fmt: skip
def test_export_carries_gradients_and_a_dynamic_batch(options, strict):
    module, batch = Views(**options), torch.export.Dim("batch", min=2)

    def made(samples):
        return torch.randn(samples, 2, 6, requires_grad=True), torch.arange(samples) % 3

    program = torch.export.export(module, made(8), dynamic_shapes={"x": {0: batch}, "y": {0: batch}}, strict=strict)
    exported = program.module()
    for samples in (8, 5, 30):
        x, y = made(samples)
        expected = module(x, y)
        (grad,) = torch.autograd.grad(expected.sum(), x)
        loss = exported(x, y)
        torch.testing.assert_close((loss, torch.autograd.grad(loss.sum(), x)[0]), (expected, grad))
        # The graph runs where there are no kernels, and where they come or go between forward and backward.
        with fusedloss.backend("reference"):
            loss = exported(x, y)
            torch.testing.assert_close(
                (loss, torch.autograd.grad(loss.sum(), x, retain_graph=True)[0]), (expected, grad)
            )
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), x)[0], grad)
        loss = exported(x, y)
        with fusedloss.backend("reference"):
            torch.testing.assert_close(torch.autograd.grad(loss.sum(), x)[0], grad)


@needs_kernels
@pytest.mark.parametrize("options", [
    {}, {"normalize": False}, {"class_balance": True}, {"contrast_mode": "one", "reduction": "none"},
    {"mask": True}, {"prototypes": True}, {"contrast": True}, {"labels": False},
], ids=str)  # fmt: skip
@pytest.mark.slow
def test_at_most_two_graphs_over_ten_batch_sizes(options):
    from torch._dynamo.testing import CompileCounterWithBackend

    options = dict(options)
    centres, bias = torch.randn(4, 8, dtype=torch.float64), torch.tensor([0.0, -torch.inf, 0.3, 0.1])
    extra = {}
    if options.pop("prototypes", False):
        extra = {"prototypes": centres, "prototype_labels": torch.arange(4), "prototype_bias": bias, "focal_gamma": 1.0}
    if options.pop("contrast", False):
        extra = {"contrast": centres, "contrast_labels": torch.arange(4), "class_weight": bias.exp() + 1}
    by_mask, labelled = options.pop("mask", False), options.pop("labels", True)

    def step(x, y, t, mask):
        return fusedloss.supcon(x, y, mask=mask, temperature=t, **options, **extra)

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for samples in (12, 20, 33, 7, 64, 5, 90, 17, 41, 28):
        x = torch.randn(samples, 2, 8, dtype=torch.float64, requires_grad=True)
        y = torch.randint(4, (samples,)) if labelled and not by_mask else None
        mask = torch.rand(samples, samples) < 0.3 if by_mask else None
        t = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        results = []
        for function in (step, compiled):
            loss = function(x, y, t, mask)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), (x, t))))
        torch.testing.assert_close(*results)
    assert counter.frame_count <= 2


@needs_kernels
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_is_refused():
    labels = torch.arange(4) % 2
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace can't record"):
        torch.jit.trace(lambda x: fusedloss.supcon(x, labels), (torch.randn(4, 3),))


def test_fake_tensors():
    with FakeTensorMode():
        x, y = torch.randn(8, 6, requires_grad=True), torch.arange(8) % 2
        temperature = torch.tensor(0.2, requires_grad=True)
        for loss in (
            fusedloss.supcon(x, y, temperature=temperature, class_balance=True),
            fusedloss.supcon(x, mask=torch.ones(8, 8)),
            fusedloss.supcon(x, y, class_weight=torch.ones(2), prototypes=x[:1], prototype_labels=y[:1],
                             prototype_bias=torch.zeros(1)),
            fusedloss.PrototypeLoss(6, 3, separation=0.1)(x, y),
        ):  # fmt: skip
            assert loss.shape == () and torch.autograd.grad(loss, x)[0].shape == x.shape


@pytest.mark.parametrize("name", ["reference", pytest.param("cpp", marks=needs_kernels)])
def test_cpu_tensors_under_another_default_device(name):
    x, y = torch.randn(8, 6, requires_grad=True), torch.tensor([0, 1, 0, 1, 0, 1, 0, -100])
    mask, bias, centre_loss = torch.rand(8, 8) < 0.3, torch.tensor([0.0, -torch.inf]), fusedloss.PrototypeLoss(6, 3)

    def losses():
        yield fusedloss.supcon(x, y, focal_gamma=1.0)
        yield fusedloss.supcon(x, mask=mask)
        yield fusedloss.supcon(x, temperature=0.001)
        yield fusedloss.supcon(x, y, prototypes=x[:2], prototype_labels=y[:2], prototype_bias=bias, contrast=x)
        yield centre_loss(x, y)

    def results():
        return [(loss.detach(), torch.autograd.grad(loss, x)[0]) for loss in losses()]

    with fusedloss.backend(name):
        expected = results()
        with torch.device("meta"):
            under = results()
        torch.set_default_device("meta")
        try:
            default = results()
        finally:
            torch.set_default_device(None)
    torch.testing.assert_close(under, expected)
    torch.testing.assert_close(default, expected)


@pytest.mark.parametrize("name", ["features", "labels", "temperature", "class_weight", "prototypes", "prototype_bias"])
def test_a_subclass_in_any_argument(name):
    given = {
        "features": torch.randn(8, 6),
        "labels": torch.arange(8) % 2,
        "temperature": torch.tensor(0.3),
        "class_weight": torch.tensor([1.0, 2.0]),
        "prototypes": torch.randn(2, 6),
        "prototype_labels": torch.arange(2),
        "prototype_bias": torch.tensor([0.1, -0.3]),
    }
    expected = fusedloss.supcon(
        given["features"].requires_grad_(), **{k: v for k, v in given.items() if k != "features"}
    )
    (grad,) = torch.autograd.grad(expected, given["features"])
    given[name] = Wrapped(given[name])
    features = given.pop("features")
    loss = fusedloss.supcon(features, **given)
    (found,) = torch.autograd.grad(loss, features)
    plain = [value.inner if isinstance(value, Wrapped) else value.detach() for value in (loss, found)]
    torch.testing.assert_close(plain, [expected.detach(), grad])


def test_torch_func():
    features, labels = torch.randn(3, 8, 6, dtype=torch.float64), torch.arange(8) % 2
    temperatures = torch.tensor([0.2, 0.5], dtype=torch.float64)

    def loss(x, t=0.3):
        return fusedloss.supcon(x, labels, temperature=t)

    torch.testing.assert_close(torch.func.vmap(loss)(features), torch.stack([loss(x) for x in features]))
    grads = torch.func.vmap(torch.func.grad(loss))(features)
    for x, grad in zip(features, grads, strict=True):
        x = x.clone().requires_grad_()
        torch.testing.assert_close(grad, torch.autograd.grad(loss(x), x)[0])
    by_temperature = torch.func.vmap(lambda t: loss(features[0], t))(temperatures)
    torch.testing.assert_close(by_temperature, torch.stack([loss(features[0], t) for t in temperatures]))
