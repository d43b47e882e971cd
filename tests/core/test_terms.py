"""Margins, the soft cap and the margin penalty: values by acos and cos in float64, gradients by finite differences."""

import math

import pytest
import torch

import fusedloss
from fusedloss import AdditiveMargin, AngularMargin, ClassTemperature, CombinedMargin, MarginPenalty, Scale, SoftCap
from fusedloss.terms import MarginTerm

BACKENDS = ("reference", "cpp")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    if request.param != "reference":
        reason = fusedloss.backends.unavailable_reason(request.param, "cpu")
        if reason:
            pytest.skip(reason)
    with fusedloss.backend(request.param):
        yield request.param


def cosines(rows=6, num_classes=9, dtype=torch.float64):
    x = torch.rand(rows, num_classes, dtype=dtype) * 1.9 - 0.95
    return x, torch.randint(num_classes, (rows,))


def loss_of(x, target, change, scale=8.0):
    """Cross-entropy of `scale` times the cosines, the label's changed by `change(theta)`: by hand, in float64."""
    z = x.double()
    rows = torch.arange(len(z))
    changed = z.clone()
    changed[rows, target] = change(z[rows, target].acos())
    return torch.nn.functional.cross_entropy(scale * changed, target)


def arc_monotone(theta, m=0.5):
    return torch.where(theta + m < math.pi, (theta + m).cos(), theta.cos() - m * math.sin(m))


CHANGES = {
    "cosface": (AdditiveMargin(0.35), lambda theta: theta.cos() - 0.35),
    "arcface": (AngularMargin(0.5), arc_monotone),
    "arcface easy": (
        AngularMargin(0.5, fallback="easy"),
        lambda theta: torch.where(theta < math.pi / 2, (theta + 0.5).cos(), theta.cos()),
    ),
    "arcface none": (AngularMargin(0.5, fallback="none"), lambda theta: (theta + 0.5).cos()),
    "combined": (CombinedMargin(1.0, 0.3, 0.2), lambda theta: arc_monotone(theta, 0.3) - 0.2),
    "sphereface": (
        CombinedMargin(1.35, 0.0, 0.0),
        lambda theta: torch.where(1.35 * theta <= math.pi, (1.35 * theta).cos(), -2 - (1.35 * theta).cos()),
    ),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_margins_follow_their_formula(name):
    term, change = CHANGES[name]
    x, target = cosines(rows=40)
    x.requires_grad_()
    found = fusedloss.cross_entropy(x, target, terms=[term, Scale(8.0)])
    expected = loss_of(x, target, change)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, x)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("margin", ["per class", "per row", "learned"])
def test_margins_per_class_and_per_row(margin):
    x, target = cosines()
    values = 0.4 * torch.rand(9, dtype=torch.float64)
    if margin == "per row":
        each = 0.4 * torch.rand(6, dtype=torch.float64)
        value = each.unsqueeze(1)
    else:
        value, each = values, values[target]
    if margin == "learned":
        value.requires_grad_()
    found = fusedloss.cross_entropy(x, target, terms=[AngularMargin(value), Scale(8.0)])
    torch.testing.assert_close(found, loss_of(x, target, lambda theta: (theta + each).cos()))
    if margin == "learned":
        (gradient,) = torch.autograd.grad(found, value)
        each = values.detach().clone().requires_grad_()
        expected = loss_of(x, target, lambda theta: (theta + each[target]).cos())
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, each)[0])


def test_straight_through_passes_the_gradient_unchanged():
    x, target = cosines()
    x.requires_grad_()
    found = fusedloss.cross_entropy(x, target, terms=[AngularMargin(0.5, "none", "straight_through"), Scale(8.0)])
    (gradient,) = torch.autograd.grad(found, x)
    z = 8.0 * x.detach()
    rows = torch.arange(6)
    z[rows, target] = 8.0 * (x.detach()[rows, target].acos() + 0.5).cos()
    expected = z.softmax(1)
    expected[rows, target] -= 1
    torch.testing.assert_close(gradient, 8.0 * expected / 6)


SEQUENCES = {
    "margin, scale, temperature": lambda t: [AngularMargin(t[:, :1] * 0 + 0.4), Scale(t[0, 0]), ClassTemperature(t[0])],
    "scale, margin, scale": lambda t: [Scale(1 / 3), AdditiveMargin(t[0]), Scale(12.0)],
    "cap first": lambda t: [SoftCap(0.7), Scale(t[0]), AdditiveMargin(0.3)],
    "cap last": lambda t: [Scale(t[0]), SoftCap(2.0)],
    "two caps": lambda t: [
        SoftCap(0.9),
        ClassTemperature(t[0]),
        AdditiveMargin(t[1, :1, None] * t[:, :1]),
        SoftCap(3.0),
    ],
    "learned cap": lambda t: [SoftCap(t[1, 2]), Scale(5.0)],
    "two margins": lambda t: [AngularMargin(0.2), AdditiveMargin(t[1]), Scale(6.0)],
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", list(SEQUENCES))
def test_any_sequence_composes_with_gradients(name, reduction):
    x, target = cosines(rows=5, num_classes=4)
    target[1] = -100
    tensors = (torch.rand(5, 4, dtype=torch.float64) + 0.5).requires_grad_()
    x.requires_grad_()

    def loss(x, tensors):
        return fusedloss.cross_entropy(
            x, target, reduction=reduction, label_smoothing=0.1, terms=SEQUENCES[name](tensors), z_loss=0.01
        )

    assert torch.autograd.gradcheck(loss, (x, tensors))
    with fusedloss.backend("reference"):
        expected = loss(x, tensors)
    torch.testing.assert_close(loss(x, tensors), expected)


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("over", ["mean", "sum"])
@pytest.mark.parametrize("soft", [False, True])
def test_margin_penalty(mix, over, soft):
    logits = 3 * torch.randn(7, 11, dtype=torch.float64)
    target = torch.randn(7, 11, dtype=torch.float64).softmax(1) if soft else torch.randint(11, (7,))
    strength = torch.rand(7, dtype=torch.float64, requires_grad=True)
    logits.requires_grad_()
    penalty = MarginPenalty(1.5, strength, over, mix)
    found = fusedloss.cross_entropy(logits, target, margin_penalty=penalty)
    gaps = (logits.max(1).values[:, None] - logits - 1.5).clamp(min=0)
    penalties = gaps.mean(1) if over == "mean" else gaps.sum(1)
    rows = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    expected = (((1 - strength) if mix else 1.0) * rows + strength * penalties).mean()
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, (logits, strength)), torch.autograd.grad(expected, (logits, strength)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_a_penalty_on_many_classes_and_tied_maxima():
    logits = torch.randn(3, 9001)
    logits[:, 5000] = logits[:, 17] = 6.0
    target = torch.tensor([5000, 17, 9000])
    logits.requires_grad_()
    found = fusedloss.cross_entropy(logits, target, margin_penalty=MarginPenalty(2.0, 0.5, "sum"), reduction="sum")
    gaps = (logits.max(1, keepdim=True).values - logits - 2.0).clamp(min=0)
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="sum") + 0.5 * gaps.sum()
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_with_probabilities(gamma):
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    q = torch.randn(6, 5, dtype=torch.float64).softmax(1)
    weight = torch.rand(5, dtype=torch.float64)
    found = fusedloss.cross_entropy(logits, q, weight, label_smoothing=0.1, focal_gamma=gamma)
    p = logits.softmax(1)
    expected = -(weight * (0.9 * q + 0.1 / 5) * (1 - p) ** gamma * p.log()).sum(1).mean()
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)
    certain = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    fusedloss.cross_entropy(certain, torch.tensor([[1.0, 0.0]]), focal_gamma=gamma).backward()
    assert torch.equal(certain.grad, torch.zeros(1, 2))


def test_predictions_leave_margins_out():
    x = torch.tensor([[0.9, 0.8, -0.2], [0.1, 0.2, 0.9]], requires_grad=True)
    target = torch.tensor([0, 0])
    _, stats = fusedloss.cross_entropy(
        x, target, terms=[AdditiveMargin(0.5), Scale(4.0)], return_stats=True, reduction="none"
    )
    plain = (4 * x).softmax(1)
    assert stats.prediction.tolist() == [0, 2]
    torch.testing.assert_close(stats.confidence, plain.max(1).values.detach())
    torch.testing.assert_close(stats.target_logit, torch.tensor([1.6, -1.6]))


def test_a_margin_far_below_keeps_its_digits():
    x = torch.full((1, 3), -1.0)
    x[0, 1] = 1.0
    loss = fusedloss.cross_entropy(x, torch.tensor([1]), terms=[AdditiveMargin(2.0), Scale(64.0)])
    torch.testing.assert_close(loss, torch.tensor(math.log(3.0)))
    extreme = x.clone().requires_grad_()
    fusedloss.cross_entropy(extreme, torch.tensor([1]), terms=[AngularMargin(0.5), Scale(64.0)]).backward()
    assert torch.isfinite(extreme.grad).all()


def test_a_margin_of_ones_own():
    class Halved(MarginTerm):
        def label(self, z, classes):
            return 0.5 * z, 0.5

    x, target = cosines()
    x.requires_grad_()
    found = fusedloss.cross_entropy(x, target, terms=[Halved(), Scale(8.0)])
    expected = loss_of(x, target, lambda theta: theta.cos() / 2)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value, x)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)


X, Y = torch.zeros(3, 5), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    "error, pattern, call",
    [
        (ValueError, "AngularMargin: margin .*radians.*28.6.*degrees", lambda: AngularMargin(28.6)),
        (ValueError, "AngularMargin: margin .*28.6", lambda: AngularMargin(torch.tensor([0.1, 28.6]))),
        (ValueError, "AngularMargin: margin .*nan", lambda: AngularMargin(math.nan)),
        (
            ValueError,
            "AngularMargin: fallback must be 'monotone', 'easy' or 'none'; got 'hard'",
            lambda: AngularMargin(0.5, fallback="hard"),
        ),
        (
            ValueError,
            "AngularMargin: gradient must be 'exact' or 'straight_through'; got 'ste'",
            lambda: AngularMargin(0.5, gradient="ste"),
        ),
        (ValueError, "CombinedMargin: m1 .*above 0.*0", lambda: CombinedMargin(0.0, 0.1, 0.1)),
        (ValueError, "CombinedMargin: m2 .*radians", lambda: CombinedMargin(1.0, 20.0, 0.1)),
        (
            ValueError,
            "AdditiveMargin: margin must be finite; got nan for class 0",
            lambda: AdditiveMargin(torch.tensor([math.nan])),
        ),
        (ValueError, "SoftCap: cap must be finite and above 0; got -1", lambda: SoftCap(-1.0)),
        (ValueError, "SoftCap: cap .*0-dim.*\\(5,\\)", lambda: SoftCap(torch.ones(5))),
        (ValueError, "MarginPenalty: margin .*-1", lambda: MarginPenalty(-1.0, 0.1)),
        (
            ValueError,
            r"MarginPenalty: strength must be in \[0, 1\]; got 1.5",
            lambda: MarginPenalty(1.0, 1.5, mix=True),
        ),
        (ValueError, "MarginPenalty: over must be 'mean' or 'sum'; got 'max'", lambda: MarginPenalty(1.0, 0.5, "max")),
        (
            TypeError,
            "margin_penalty .*MarginPenalty.*float",
            lambda: fusedloss.cross_entropy(X, Y, margin_penalty=0.1),
        ),
        (
            ValueError,
            "strength must have shape \\(3,\\)",
            lambda: fusedloss.cross_entropy(X, Y, margin_penalty=MarginPenalty(1.0, torch.ones(2))),
        ),
        (
            ValueError,
            "margin must have shape \\(5,\\)",
            lambda: fusedloss.cross_entropy(X, Y, terms=[AdditiveMargin(torch.ones(4))]),
        ),
        (
            ValueError,
            "margin must have shape \\(3, 1\\)",
            lambda: fusedloss.cross_entropy(X, Y, terms=[AdditiveMargin(torch.ones(4, 1))]),
        ),
        (
            ValueError,
            "target must hold labels with AdditiveMargin, which changes the labelled class .*mixup",
            lambda: fusedloss.cross_entropy(X, torch.rand(3, 5), terms=[AdditiveMargin(0.5)]),
        ),
        (
            ValueError,
            "AngularMargin: input must hold cosines.*1.5",
            lambda: fusedloss.cross_entropy(X + 1.5, Y, terms=[AngularMargin(0.5)]),
        ),
    ],
)
def test_bad_arguments(error, pattern, call):
    with pytest.raises(error, match=pattern):
        call()


OF_A_VECTOR = {
    "additive": lambda v: [AdditiveMargin(v), Scale(4.0)],
    "angular": lambda v: [AngularMargin(v), Scale(4.0)],
    "straight through": lambda v: [AngularMargin(v, gradient="straight_through"), Scale(4.0)],
    "combined": lambda v: [CombinedMargin(v + 0.5, v, v)],
    "temperature": lambda v: [ClassTemperature(v + 0.5)],
    "prior": lambda v: [fusedloss.Prior(v, 0.5)],
    "cap": lambda v: [SoftCap(v[0] + 0.1)],
}


@pytest.mark.parametrize("name", OF_A_VECTOR)
class TestUnderTransforms:
    """``torch.func`` and batched gradients over a term's own tensor: the same as a loop."""

    def functions(self, name):
        x, target = cosines(6, 5)
        z = x.gather(1, target.unsqueeze(1)).squeeze(1)

        def applied(v):
            logits = x
            for term in OF_A_VECTOR[name](v):
                logits = term.apply(logits, target)
            return logits.sum(1)

        return (
            applied,
            lambda v: fusedloss.terms.label_chain(z, target, OF_A_VECTOR[name](v))[0],
            lambda v: fusedloss.cross_entropy(x, target, terms=OF_A_VECTOR[name](v), reduction="none"),
        )

    def test_vmap(self, name):
        values = torch.rand(3, 5, dtype=torch.float64)
        for function in self.functions(name):
            expected = torch.stack([function(value) for value in values])
            torch.testing.assert_close(torch.vmap(function)(values), expected)

    def test_gradients(self, name, backend):
        value = torch.rand(5, dtype=torch.float64)
        # An operation's backward over a batch of gradients is tested with the operations.
        for function in self.functions(name)[: 3 if backend == "reference" else 2]:
            leaf = value.clone().requires_grad_()
            rows = function(leaf)
            each = [torch.autograd.grad(row, leaf, retain_graph=True)[0] for row in rows]
            expected = torch.stack(each)
            torch.testing.assert_close(torch.func.jacrev(function)(value), expected)
            eye = torch.eye(6, dtype=torch.float64)
            batched = torch.autograd.grad(rows, leaf, eye, is_grads_batched=True)[0]
            torch.testing.assert_close(batched, expected)


def test_terms_of_fake_tensors_are_not_read():
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = torch.full((5,), 0.5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for make in OF_A_VECTOR.values():
            make(torch.full((5,), 0.5))
        ClassTemperature(real)


@pytest.mark.parametrize("kind", [AdditiveMargin, ClassTemperature, Scale, SoftCap, AngularMargin])
def test_numbers_of_numpy_are_taken_as_floats(kind):
    import numpy as np

    term = kind(np.float32(0.5))
    assert all(type(value) is not np.float32 for value in vars(term).values())
    with pytest.raises(TypeError, match="must be a float or a tensor; got bool"):
        kind(np.bool_(True))


def test_a_row_without_any_class_has_no_confidence():
    logits = torch.full((1, 5), -math.inf)
    _, stats = fusedloss.cross_entropy(logits, torch.tensor([0]), return_stats=True)
    assert math.isnan(float(stats.confidence))
