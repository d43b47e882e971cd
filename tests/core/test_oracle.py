"""The oracle against torch's own losses, finite differences and numbers worked out by hand."""

import ast
import math
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import Case
from softmax_battery import everything, random_case

DOUBLE = torch.float64


def test_the_oracle_shares_no_code_with_the_package():
    tree = ast.parse(Path(oracle.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"torch", "torch.nn.functional", "dataclasses", "math"}


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 3), (2, 5, 2, 3)])
def test_the_written_out_formula_is_torchs_where_torch_has_one(shape, reduction, smoothing, soft):
    case = random_case(shape[0], *shape[1:], dtype=DOUBLE, soft=soft, reduction=reduction, label_smoothing=smoothing)
    case.weight = torch.rand(5, dtype=DOUBLE)
    expected = F.cross_entropy(case.input, case.target, case.weight, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(oracle.written_out(case, case.input), expected, rtol=1e-13, atol=0)


def test_a_row_worked_out_by_hand():
    # p = (3/4, 1/4); label 0; smoothing 0.2, gamma 2, z_loss 0.5, class weights 2 and 1, sample weight 3.
    case = Case(torch.tensor([[math.log(3.0), 0.0]], dtype=DOUBLE), torch.tensor([0]))
    case.weight = torch.tensor([2.0, 1.0], dtype=DOUBLE)
    case.label_smoothing, case.focal_gamma, case.z_loss = 0.2, 2.0, 0.5
    case.sample_weight = torch.tensor([3.0], dtype=DOUBLE)
    hard, uniform = 2 * math.log(4 / 3), 2 * math.log(4 / 3) + math.log(4)
    row = 0.25**2 * (0.8 * hard + 0.1 * uniform) + 0.5 * math.log(4) ** 2
    for reduction, expected in (("none", 3 * row), ("sum", 3 * row), ("mean", row / 2)):
        found = oracle.eager(replace(case, reduction=reduction))
        assert found.flatten().tolist() == pytest.approx([expected], rel=1e-14)


def test_terms_in_their_order():
    z = torch.tensor([[1.0, 2.0]], dtype=DOUBLE)
    tau, prior = torch.tensor([2.0, 4.0], dtype=DOUBLE), torch.tensor([0.5, 1.0], dtype=DOUBLE)
    terms = (("prior", prior, 2.0), ("temperature", tau), ("scale", 3.0))
    assert oracle.apply_terms(z, terms).tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize("soft", [False, True])
def test_the_oracles_gradients_are_finite_differences(soft):
    case = oracle.cast(everything(random_case(3, 4, dtype=DOUBLE, spread=1.0, soft=soft)), DOUBLE)
    tensors = [case.tensors()[name] for name in case.learned]

    def loss_of(*values):
        given = dict(zip(case.learned, values, strict=True))
        terms = tuple((t[0], given[f"term{i}"], *t[2:]) for i, t in enumerate(case.terms))
        fields = {name: given[name] for name in ("input", "label_smoothing", "sample_weight")}
        return oracle.eager(replace(case, terms=terms, **fields))

    assert torch.autograd.gradcheck(loss_of, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16, torch.float16])
def test_the_check_passes_eager_torch_and_fails_small_errors(dtype):
    case = everything(random_case(6, 9, dtype=dtype, ignored=0.0))

    def eager_in_float32(c):
        computing = oracle.computing_dtype(dtype)
        return oracle.eager(replace(c, input=c.input.to(computing)))

    oracle.check(case, eager_in_float32)
    for wrong in (
        lambda c: eager_in_float32(c) * (1 + 1e-4),
        lambda c: eager_in_float32(replace(c, sample_weight=c.sample_weight.detach() + 1e-4 * c.sample_weight)),
        lambda c: eager_in_float32(c) * float("nan"),
        lambda c: eager_in_float32(c) + 0.03 * (c.input[0, 0] - c.input[0, 0].detach()),
    ):
        with pytest.raises(AssertionError, match="truth"):
            oracle.check(case, wrong)
