"""The upstream gradient that a forward expects: a right guess, a wrong one and none give the same bits."""

import pytest
import torch

import fusedloss
from fusedloss.core.row_loss import RowOptions
from fusedloss.ops import upstream
from fusedloss.terms import AdditiveMargin, ClassTemperature


@pytest.fixture(autouse=True)
def nothing_expected(monkeypatch):
    monkeypatch.setattr(upstream, "_seen", {})


class _Inputs:
    """Leaves of every gradient that leaves with the forward."""

    def __init__(self, dtype=torch.float32, columns=40):
        generator = torch.Generator().manual_seed(3)
        self.logits = (3 * torch.randn(6, columns, generator=generator)).to(dtype).requires_grad_()
        self.target = torch.randint(columns, (6,), generator=generator)
        self.tau = (torch.rand(columns, generator=generator) + 0.5).requires_grad_()
        self.margin = (-torch.rand(columns, generator=generator)).requires_grad_()
        self.smoothing = (0.3 * torch.rand(6, generator=generator)).requires_grad_()

    def loss(self):
        terms = [ClassTemperature(self.tau), AdditiveMargin(self.margin)]
        return fusedloss.cross_entropy(self.logits, self.target, label_smoothing=self.smoothing, terms=terms)

    def expected(self):
        """What the next forward of this loss multiplies its gradients by."""
        return upstream.expected_upstream((self.logits.shape[1], self.logits.dtype, RowOptions()))

    def gradients(self, factor, loss=None):
        leaves = (self.logits, self.tau, self.margin, self.smoothing)
        loss = self.loss() if loss is None else loss
        return torch.autograd.grad(loss * factor, leaves, retain_graph=True)


def _equal(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.25, 65536.0, -2.0, 1 / 3])
def test_every_backward_gives_the_bits_of_the_first(dtype, factor):
    inputs = _Inputs(dtype)
    first = inputs.gradients(factor)
    for _ in range(4):
        assert _equal(inputs.gradients(factor), first)


def test_a_power_of_two_is_expected_once_seen_twice():
    inputs = _Inputs()
    expected = []
    for factor in (0.25, 0.25, 0.25, 1.0, 1.0, 0.5, 0.25, 3.0, 3.0, 0.0, 0.0):
        inputs.gradients(factor)
        expected.append(inputs.expected())
    assert expected == [1.0, 0.25, 0.25, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -1.0, 2.0**40])
def test_what_can_not_be_multiplied_exactly_is_not_expected(factor):
    inputs = _Inputs()
    for _ in range(3):
        inputs.gradients(factor)
    assert inputs.expected() == 1.0


def test_a_wrong_guess_and_two_losses_alive_at_once():
    inputs, other = _Inputs(), _Inputs(columns=50)
    wanted, wanted_of_other = inputs.gradients(3.0), other.gradients(0.5)
    for _ in range(2):
        inputs.gradients(0.25)
    assert inputs.expected() == 0.25
    one, two = inputs.loss(), other.loss()
    found_of_other = other.gradients(0.5, two)
    assert _equal(found_of_other, wanted_of_other)
    for found, right in zip(inputs.gradients(3.0, one), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=3e-7, atol=0)


def test_a_second_backward_through_a_kept_graph():
    inputs = _Inputs()
    for _ in range(2):
        inputs.gradients(0.25)
    loss = inputs.loss()
    assert _equal(inputs.gradients(0.25, loss), inputs.gradients(0.25, loss))
    wanted = _Inputs().gradients(1.0)
    assert _equal(inputs.gradients(1.0, loss), wanted)


def test_the_loss_itself_is_not_multiplied():
    inputs = _Inputs()
    first = inputs.loss()
    for _ in range(3):
        inputs.gradients(0.125)
    assert inputs.expected() == 0.125
    assert torch.equal(inputs.loss(), first)


def test_a_loss_of_other_classes_type_or_options_is_another_one():
    inputs, others = _Inputs(), [_Inputs(columns=41), _Inputs(torch.float64)]
    for _ in range(3):
        inputs.gradients(0.25)
    assert inputs.expected() == 0.25
    assert all(other.expected() == 1.0 for other in others)
    for other in others:
        other.gradients(1.0)
    assert inputs.expected() == 0.25
