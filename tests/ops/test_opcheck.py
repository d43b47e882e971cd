"""torch's own checks of every operation: schema, tracing, autograd registration, AOT with dynamic shapes."""

import itertools

import pytest
import torch
from torch.library import opcheck

import fusedloss
from fusedloss.backends.cpp import unavailable_reason
from fusedloss.core.operands import LinearMask, SoftmaxMask
from fusedloss.core.row_loss import RowOptions

OPS = torch.ops.fusedloss
CPP = pytest.param("cpp", marks=pytest.mark.skipif(unavailable_reason("cpu") is not None, reason="no compiled module"))
OPTIONS = list(RowOptions(0.1, 2.0, 0.5, 0.01, 0.5, 0.2, 0.25, 1.0))
PLAIN = list(RowOptions())
MASKS = [list(mask) for mask in ((True,) * 5, (True, *(False,) * 4), (False, True, False, True, False), (False,) * 5)]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


@pytest.fixture(params=["reference", CPP], autouse=True)
def backend(request):
    with fusedloss.backend(request.param):
        yield request.param


def logit_inputs(inner=(), dtype=torch.float32, soft=False, bare=False, requires_grad=True):
    """The nine arguments of LogitInputs, and one value per row."""
    generator = torch.Generator().manual_seed(1)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    rows = (6, *inner)
    logits = torch.randn((6, 7, *inner), generator=generator).to(dtype).requires_grad_(requires_grad)
    target = logits.detach().softmax(1) if soft else torch.randint(7, rows, generator=generator)
    per_class = [torch.rand(7, generator=generator, dtype=computed) + 0.5 for _ in range(3)]
    per_row = 0.5 * torch.rand(rows, generator=generator, dtype=computed)
    scale, bias, weight = (None,) * 3 if bare else per_class
    if not bare and requires_grad:
        scale.requires_grad_(), bias.requires_grad_()
    override = None if bare or soft else per_row.clone().requires_grad_(requires_grad)
    override_grad = None if override is None else per_row.clone()
    return (logits, target, scale, bias, weight, override, override_grad, 0.0 if bare else 3.0, -100), per_row


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("inner", [(), (3,)])
@pytest.mark.parametrize("mask", MASKS)
def test_softmax_ce(mask, inner, dtype):
    inputs, per_row = logit_inputs(inner, dtype)
    arguments = (*inputs, per_row, per_row + 1, per_row, OPTIONS, False, mask, 1.0)
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    opcheck(OPS.softmax_ce.default, arguments, test_utils=utils)
    bare, _ = logit_inputs(inner, dtype, bare=True)
    opcheck(
        OPS.softmax_ce.default, (*bare, None, None, None, PLAIN, True, [mask[0], *MASKS[3][1:]], 1.0), test_utils=utils
    )
    soft, _ = logit_inputs(inner, dtype, soft=True)
    opcheck(
        OPS.softmax_ce.default,
        (*soft, None, None, None, PLAIN, True, [*mask[:2], *MASKS[3][2:]], 1.0),
        test_utils=utils,
    )


@pytest.mark.parametrize("mask", [MASKS[0], MASKS[3]])
def test_softmax_ce_traced(mask):
    """The mask of what was recorded need not be that of what is asked for."""
    inputs, per_row = logit_inputs()
    rows = [per_row.clone().requires_grad_() for _ in range(3)]
    opcheck(OPS.softmax_ce.default, (*inputs, *rows, OPTIONS, True, mask, 1.0))


@pytest.mark.parametrize("inner", [(), (3,)])
@pytest.mark.parametrize("smooth, prediction", list(itertools.product([False, True], repeat=2)))
def test_softmax_stats(smooth, prediction, inner):
    inputs, per_row = logit_inputs(inner)
    opcheck(OPS.softmax_stats.default, (*inputs, 0.5, smooth, True, prediction))
    detached = [value.detach() if isinstance(value, torch.Tensor) else value for value in inputs]
    row_max, row_sum, _, _, _, _, one_minus_pt, *_ = OPS.softmax_stats.default(*detached, 0.5, smooth, True, prediction)
    grads = (per_row, None, per_row, per_row if smooth else None, per_row, per_row)
    saved = (row_max, row_sum, one_minus_pt)
    opcheck(OPS.softmax_stats_backward.default, (*detached, *saved, 0.5, *grads, [True, True, True, False, False]))


def linear_inputs(normalize, margin, requires_grad=True):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 5, generator=generator).requires_grad_(requires_grad)
    w = torch.randn(7, 5, generator=generator).requires_grad_(requires_grad)
    target = torch.randint(7, (6,), generator=generator)
    norms = tuple(OPS.row_norms(rows.detach()) if normalize else None for rows in (x, w))
    scale, bias = (torch.rand(7, generator=generator).requires_grad_(requires_grad) for _ in range(2))
    override = override_grad = product = None
    if margin:
        product = OPS.target_products(x.detach(), w.detach(), target, *norms, -100)
        override, override_grad = (product.float() - 0.1).requires_grad_(requires_grad), torch.full_like(product, 0.9)
    return (x, w, target, *norms, scale, bias, None, override, override_grad, product, 0.0, -100)


@pytest.mark.parametrize("normalize, margin", [(False, False), (True, False), (True, True), (False, True)])
def test_linear(normalize, margin):
    inputs = linear_inputs(normalize, margin)
    mask = list(LinearMask(True, True, True, True, margin, False, False))
    opcheck(OPS.linear_ce.default, (*inputs, None, None, None, PLAIN, True, mask))
    opcheck(OPS.linear_stats.default, (*inputs, 0.0, True, False, False))
    detached = [value.detach() if isinstance(value, torch.Tensor) else value for value in inputs]
    row_max, row_sum, _, _, _, _, one_minus_pt, *_ = OPS.linear_stats.default(*detached, 0.0, False, False, False)
    grads = (None, None, torch.ones(6), None, None, None)
    saved = (row_max, row_sum, one_minus_pt)
    opcheck(OPS.linear_stats_backward.default, (*detached, *saved, 0.0, *grads, mask))


def test_norms_and_products():
    rows = torch.randn(4, 3, requires_grad=True)
    opcheck(OPS.row_norms.default, (rows,))
    rows, weight, target = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 4, -100, 2])
    opcheck(OPS.target_products.default, (rows, weight, target, None, None, -100))
    assert torch.autograd.gradcheck(
        OPS.row_norms.default, (torch.randn(4, 3, dtype=torch.float64, requires_grad=True),)
    )


def test_recorded_without_gradients_differentiated_with_them():
    """What an exported program recorded where nothing required a gradient gives gradients where something does."""
    inputs, _ = logit_inputs()
    arguments = (*inputs, None, None, None, PLAIN, True, MASKS[3], 1.0)
    loss = OPS.softmax_ce.default(*arguments)[0]
    grads = torch.autograd.grad(loss, (inputs[0], inputs[2], inputs[5]))
    mask = list(SoftmaxMask(True, True, True))
    expected = OPS.softmax_ce.default(
        *(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments[:-2]), mask, 1.0
    )[2]
    for ours, theirs in zip(grads, (expected[0], expected[1], expected[3]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_second_derivative_through_the_dispatcher_is_refused():
    inputs, _ = logit_inputs()
    mask = list(SoftmaxMask(True, True, True))
    loss = OPS.softmax_ce.default(*inputs, None, None, None, PLAIN, True, mask, 1.0)[0]
    (grad,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(grad.sum(), inputs[0])
    statistics = OPS.softmax_stats.default(*inputs, 0.0, False, False, False)
    (grad,) = torch.autograd.grad(statistics[4].square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(grad.sum(), inputs[0])


WRONG = [
    ("logits", 0, lambda t: t[0]),
    ("target", 1, lambda t: t[:2]),
    ("target", 1, lambda t: t.int()),
    ("scale", 2, lambda t: t[:2]),
    ("scale", 2, lambda t: t.double()),
    ("bias", 3, lambda t: t[:2]),
    ("class_weight", 4, lambda t: t[:2]),
    ("target_override", 5, lambda t: t[:2]),
    ("target_override_grad", 6, lambda t: t[:2]),
    ("row label_smoothing", 9, lambda t: t[:2]),
    ("row sample_weight", 10, lambda t: t[:2]),
    ("row penalty_strength", 11, lambda t: t.double()),
]


@pytest.mark.parametrize("name, place, change", WRONG)
def test_tensors_that_do_not_fit_are_errors(name, place, change):
    inputs, per_row = logit_inputs(requires_grad=False)
    arguments = [*inputs, per_row, per_row, per_row, OPTIONS, True, MASKS[3], 1.0]
    arguments[place] = change(arguments[place])
    with pytest.raises((ValueError, TypeError), match=f"^{name} must .*; got "):
        OPS.softmax_ce.default(*arguments)


@pytest.mark.parametrize(
    "name, place, change",
    [
        ("target", 2, lambda t: t[:2]),
        ("weight", 1, lambda t: t[:, :2]),
        ("input_norm", 3, lambda t: t.float()),
        ("class_norm", 4, lambda t: t[:2]),
        ("target_product", 10, lambda t: t[:2]),
    ],
)
def test_linear_tensors_that_do_not_fit_are_errors(name, place, change):
    arguments = [*linear_inputs(True, True, requires_grad=False), None, None, None, PLAIN, True, [False] * 7]
    arguments[place] = change(arguments[place])
    with pytest.raises((ValueError, TypeError), match=f"^{name} must .*; got "):
        OPS.linear_ce.default(*arguments)
