"""unit_rows: lengths of any size, derivatives of any order, transforms and graphs."""

import pytest
import torch

from fusedloss.core.normalize import unit_rows
from fusedloss.functional import margin_logits
from fusedloss.terms import AdditiveMargin

# torch compiles its own formulas of forward derivatives with torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning:torch")
COMPILER_NOISE = "ignore:::torch"


def exact(rows):
    """In float64, scaled first, so that no square leaves its range."""
    rows = rows.double()
    largest = rows.abs().amax(1, keepdim=True)
    scaled = torch.where(largest > 0, rows / largest, 0.0)
    length = scaled.norm(dim=1, keepdim=True)
    return torch.where(length > 0, scaled / length, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rows_of_any_length(dtype):
    limits, epsilon = torch.finfo(dtype), torch.finfo(dtype).eps
    rows = torch.rand(6, 50).double() * 2 - 1
    for length in (limits.smallest_normal / 64, limits.smallest_normal, 1e-25, 1e-3, 1.0, 1e20, limits.max):
        scaled = (rows * min(max(length, limits.smallest_normal / 64), limits.max)).to(dtype)
        # In float64 the truth has roundings of its own.
        tolerance = (4 if dtype == torch.float64 else 1.5) * epsilon
        torch.testing.assert_close(unit_rows(scaled).double(), exact(scaled), rtol=tolerance, atol=0)
        assert unit_rows(scaled).dtype == dtype
    full = torch.full((2, 4096), limits.max, dtype=dtype)
    assert (unit_rows(full) == 1 / 64).all()


@pytest.mark.parametrize("length", [1e-25, 1e20])
def test_the_gradient_of_short_and_long_rows(length):
    rows, grad = (torch.randn(4, 9) * length).requires_grad_(), torch.randn(4, 9)
    (found,) = torch.autograd.grad(unit_rows(rows), rows, grad)
    wide = rows.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(wide / wide.norm(dim=1, keepdim=True), wide, grad.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6 / length)


def test_a_row_of_zeros_stays_and_gets_no_gradient():
    rows = torch.randn(3, 4)
    rows[1] = 0
    rows.requires_grad_()
    unit = unit_rows(rows)
    (grad,) = torch.autograd.grad(unit, rows, torch.randn(3, 4), create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), rows)
    assert not unit[1].any() and not grad[1].any() and not second[1].any()
    assert torch.isfinite(second).all() and grad[0].any() and second[0].any()
    assert unit_rows(torch.zeros(0, 4)).shape == (0, 4) and unit_rows(torch.zeros(3, 0)).shape == (3, 0)


def test_derivatives_of_every_order():
    rows = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit_rows, rows, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(unit_rows, rows)


def test_second_derivatives_through_margin_logits():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    for labels in (None, torch.tensor([0, 2, 1, 0])):

        def logits(x, w, labels=labels):
            return margin_logits(x, w, labels, margin=AdditiveMargin(0.3), scale=4.0)

        assert torch.autograd.gradcheck(logits, (x, w))
        assert torch.autograd.gradgradcheck(logits, (x, w))


def test_the_first_derivative_keeps_no_more_than_the_result():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        unit_rows(torch.randn(64, 100, requires_grad=True))
    assert sum(kept) <= 64 * 100 + 2 * 64


def test_torch_func():
    batch = torch.randn(3, 6, 5, dtype=torch.float64)

    def loss(rows):
        return (unit_rows(rows)[:, 0] ** 3).sum()

    torch.testing.assert_close(torch.func.vmap(unit_rows)(batch), torch.stack([unit_rows(rows) for rows in batch]))
    expected = torch.stack([torch.autograd.functional.hessian(loss, rows) for rows in batch])
    for outer in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(torch.func.vmap(outer(torch.func.grad(loss)))(batch), expected)


@pytest.mark.filterwarnings(COMPILER_NOISE)
def test_compiled_and_exported():
    def step(rows):
        unit = unit_rows(rows)
        return (unit @ unit.t()).square().sum()

    class Step(torch.nn.Module):
        def forward(self, rows):
            return step(rows)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    shapes = {"rows": {0: torch.export.Dim("rows", min=2)}}
    exported = torch.export.export(Step(), (torch.randn(4, 3),), dynamic_shapes=shapes).module()
    for count in (3, 5, 9):
        rows = torch.randn(count, 3)
        rows[1] = 0
        rows.requires_grad_()
        (expected,) = torch.autograd.grad(step(rows), rows)
        for function in (compiled, exported):
            torch.testing.assert_close(torch.autograd.grad(function(rows), rows)[0], expected)
