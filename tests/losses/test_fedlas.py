"""FeDLaSLoss against the paper's formulas written out, its gates and indicators, and its state."""

import copy
import gc
import math
import os
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import fusedloss
from fusedloss import FeDLaSLoss

CLASSES, WIDTH = 5, 7


def data(rows=16, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    features = normal(rows, WIDTH) * torch.linspace(0.2, 3.0, rows, dtype=torch.float64).unsqueeze(1).to(dtype)
    return (4 * normal(rows, CLASSES)).requires_grad_(), torch.arange(rows) % CLASSES, features


class WrittenOut:
    """The paper's equations in float64: running statistics of L1 norms, the gate with a straight-through sign."""

    def __init__(self, base, strength, beta, margin=None, momentum=0.5, gate=None):
        self.base, self.strength, self.beta, self.margin, self.momentum = base, strength, beta, margin, momentum
        self.gate, self.mean, self.square = gate, None, None

    def __call__(self, logits, labels, features):
        kept = labels != -100
        norms = features.double().abs().sum(1)
        mean, spread = norms[kept].mean(), norms[kept].var(correction=0)
        if self.mean is None:
            self.mean, self.spread = mean, spread
        else:
            share, moved = self.momentum, mean - self.mean
            self.spread = (1 - share) * self.spread + share * spread + share * (1 - share) * moved**2
            self.mean = self.mean + share * moved
        g = (norms - self.mean) / (self.spread.sqrt() + 1e-3)
        psi = torch.ones(len(logits), dtype=torch.float64)
        if self.gate is not None:
            p = self.gate(logits.detach()).softmax(1)
            difference = p[:, 0] - p[:, 1]
            psi = difference + (torch.where(difference > 0, 1.0, -1.0) - difference).detach()
        alpha = 2 * self.strength * torch.sigmoid(self.beta * psi * g)
        log_p = logits.log_softmax(1)
        hard = -log_p.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
        if self.base == "smoothing":
            other = -log_p.mean(1)
        else:
            other = (logits.max(1, keepdim=True).values - logits - self.margin).relu().mean(1)
        rows = torch.where(kept, (1 - alpha) * hard + alpha * other, 0.0)
        return rows.sum() / kept.sum(), psi.detach(), alpha.detach()


BASES = {"smoothing": {}, "margin": {"margin": 2.0}}


@pytest.mark.parametrize("gate", ["learned", "positive"])
@pytest.mark.parametrize("base", BASES)
class TestAgainstThePaper:
    def test_value_gradients_and_state_over_steps(self, base, gate):
        loss = FeDLaSLoss(CLASSES, base, 0.2, 1.5, gate=gate, **BASES[base]).double()
        written = WrittenOut(base, 0.2, 1.5, gate=copy.deepcopy(loss.gate), **BASES[base])
        for seed in range(4):
            logits, labels, features = data(seed=seed)
            labels[seed] = -100
            found = loss(logits, labels, features)
            expected, psi, alpha = written(logits, labels, features)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(loss.last_gate, psi, rtol=0, atol=0)
            torch.testing.assert_close(loss.last_smoothing, alpha, rtol=1e-5, atol=1e-6)
            ours, truth = [logits], [logits]
            if loss.gate is not None:
                ours, truth = [*ours, *loss.gate.parameters()], [*truth, *written.gate.parameters()]
            for one, other in zip(torch.autograd.grad(found, ours), torch.autograd.grad(expected, truth), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)

    def test_reductions_weights_and_other_options(self, base, gate):
        logits, labels, features = data()
        weight = torch.rand(CLASSES, dtype=torch.float64)
        loss = FeDLaSLoss(CLASSES, base, gate=gate, reduction="none", weight=weight).double().eval()
        rows = loss(logits, labels, features)
        alpha = loss.last_smoothing
        if base == "smoothing":
            expected = fusedloss.cross_entropy(logits, labels, weight, reduction="none", label_smoothing=alpha)
        else:
            penalty = fusedloss.MarginPenalty(10.0, alpha, mix=True)
            expected = fusedloss.cross_entropy(logits, labels, weight, reduction="none", margin_penalty=penalty)
        torch.testing.assert_close(rows, expected)
        loss.reduction = "mean"
        torch.testing.assert_close(loss(logits, labels, features), rows.sum() / weight[labels].sum())
        share = torch.rand(16, dtype=torch.float64)
        found = loss(logits, labels, features, share)
        torch.testing.assert_close(found, (rows * share).sum() / (weight[labels] * share).sum())

    def test_smoothing_stays_in_its_bounds(self, base, gate):
        loss = FeDLaSLoss(CLASSES, base, 0.5, beta=100.0, gate=gate)
        logits, labels, features = data(dtype=torch.float32)
        assert torch.isfinite(loss(logits, labels, features * 1e6))
        assert (loss.last_smoothing >= 0).all() and (loss.last_smoothing <= 1).all()
        assert set(loss.last_gate.tolist()) <= {-1.0, 1.0}


def test_defaults_are_the_papers():
    smoothing, margin = FeDLaSLoss(10), FeDLaSLoss(10, "margin")
    assert (smoothing.strength, smoothing.beta, smoothing.margin) == (0.05, 4.0, None)
    assert (margin.strength, margin.beta, margin.margin) == (0.05, 0.5, 10.0)
    assert smoothing.statistics.momentum == 0.5 and smoothing.statistics.norm == 1.0
    assert [tuple(p.shape) for p in smoothing.gate.parameters()] == [(5, 10), (5,), (2, 5), (2,)]
    assert FeDLaSLoss(1).gate is not None and FeDLaSLoss(10, gate="positive").gate is None


def test_without_beta_it_is_the_base():
    logits, labels, features = data()
    smooth = FeDLaSLoss(CLASSES, strength=0.1, beta=0.0).double()
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(smooth(logits, labels, features), expected)


def test_larger_norms_are_smoothed_more():
    logits, labels, features = data()
    loss = FeDLaSLoss(CLASSES, gate="positive")
    loss(logits, labels, features)
    order = features.abs().sum(1).argsort()
    assert (loss.last_smoothing[order].diff() >= 0).all()


class TestGate:
    def test_zero_is_negative_and_the_sign_is_exact(self):
        loss = FeDLaSLoss(CLASSES)
        for parameter in loss.gate.parameters():
            nn.init.zeros_(parameter)
        logits, labels, features = data(dtype=torch.float32)
        loss(logits, labels, features)
        assert loss.last_gate.tolist() == [-1.0] * 16

    def test_swapping_the_last_layers_rows_flips_every_gate(self):
        """How weights of the reference code, whose sign is p_1 - p_0, are loaded."""
        loss = FeDLaSLoss(CLASSES)
        logits, labels, features = data(dtype=torch.float32)
        loss(logits, labels, features)
        before = loss.last_gate
        with torch.no_grad():
            for parameter in loss.gate[2].parameters():
                parameter.copy_(parameter.flip(0))
        loss(logits, labels, features)
        assert torch.equal(loss.last_gate, -before)

    def test_no_gradient_reaches_features_and_none_through_the_strength(self):
        logits, labels, features = data()
        features.requires_grad_()
        loss = FeDLaSLoss(CLASSES).double()
        found = loss(logits, labels, features)
        assert torch.autograd.grad(found, features, allow_unused=True, retain_graph=True) == (None,)
        (gradient,) = torch.autograd.grad(found, logits)
        frozen = fusedloss.cross_entropy(logits, labels, label_smoothing=loss.last_smoothing)
        torch.testing.assert_close(gradient, torch.autograd.grad(frozen, logits)[0])

    def test_training_with_its_parameters_moves_the_gate(self):
        loss = FeDLaSLoss(CLASSES)
        model = nn.Linear(WIDTH, CLASSES)
        loss.watch(model)
        optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.5)
        before = copy.deepcopy(loss.gate.state_dict())
        first = None
        for _ in range(20):
            _, labels, features = data(dtype=torch.float32)
            optimizer.zero_grad()
            value = loss(model(features), labels)
            value.backward()
            optimizer.step()
            first = first or value.item()
        assert value.item() < first
        assert not torch.equal(before["0.weight"], loss.gate[0].weight)


class TestIndicators:
    @pytest.mark.parametrize("norm", [1.0, 2.0, 3.0, math.inf])
    def test_norms(self, norm):
        logits, labels, features = data(dtype=torch.float32)
        loss = FeDLaSLoss(CLASSES, gate="positive", norm=norm)
        loss(logits, labels, features)
        norms = torch.linalg.vector_norm(features.double(), norm, dim=1)
        g = (norms - norms.mean()) / (norms.std(correction=0) + 1e-3)
        torch.testing.assert_close(loss.last_smoothing.double(), 0.1 * torch.sigmoid(4 * g), rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("indicator", ["probability", "logit"])
    def test_what_needs_no_features(self, indicator):
        logits, labels, _ = data(dtype=torch.float32)
        logits = logits.detach() - 9.0
        loss = FeDLaSLoss(CLASSES, gate="positive", indicator=indicator)
        loss(logits.requires_grad_(), labels)
        values = (logits.double().softmax(1) if indicator == "probability" else logits.double()).max(1).values.detach()
        g = (values - values.mean()) / (values.std(correction=0) + 1e-3)
        torch.testing.assert_close(loss.last_smoothing.double(), 0.1 * torch.sigmoid(4 * g), rtol=1e-4, atol=1e-6)


class TestStatistics:
    def test_move_in_training_with_gradients_on_alone(self):
        loss = FeDLaSLoss(CLASSES)
        logits, labels, features = data(dtype=torch.float32)
        loss(logits, labels, features)
        mean = loss.statistics.mean.clone()
        with torch.no_grad():
            loss(logits, labels, features * 3)
        loss.eval()(logits, labels, features * 3)
        assert torch.equal(loss.statistics.mean, mean)
        loss.train()(logits, labels, features * 3)
        assert not torch.equal(loss.statistics.mean, mean)

    def test_one_row_equal_norms_and_no_row_at_all(self):
        for rows in (1, 1, 4):
            loss = FeDLaSLoss(CLASSES, reduction="sum")
            logits = torch.randn(rows, CLASSES, requires_grad=True)
            labels = torch.zeros(rows, dtype=torch.int64)
            for _ in range(3):
                loss(logits, labels, torch.ones(rows, WIDTH)).backward()
                torch.testing.assert_close(loss.last_smoothing, torch.full((rows,), 0.05))
            assert torch.isfinite(logits.grad).all()
            assert loss(logits[:0], labels[:0], torch.ones(0, WIDTH)) == 0
        ignored = FeDLaSLoss(CLASSES)
        assert ignored(logits, torch.full((4,), -100), torch.ones(4, WIDTH)).isnan()
        assert int(ignored.statistics.count) == 0
        torch.testing.assert_close(ignored.last_smoothing, torch.full((4,), 0.05))

    def test_probability_targets(self):
        logits, labels, features = data()
        q = 0.7 * F.one_hot(labels, CLASSES).double() + 0.3 / CLASSES
        loss = FeDLaSLoss(CLASSES).double()
        expected = fusedloss.cross_entropy(logits, q, label_smoothing=_smoothing_of(loss, logits, q, features))
        torch.testing.assert_close(loss.eval()(logits, q, features), expected)

    def test_resume_is_bit_exact(self):
        def run(loss, seeds):
            optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
            for seed in seeds:
                logits, labels, features = data(seed=seed, dtype=torch.float32)
                optimizer.zero_grad()
                loss(logits, labels, features).backward()
                optimizer.step()

        whole = FeDLaSLoss(CLASSES)
        first = copy.deepcopy(whole)
        run(whole, range(6))
        run(first, range(2))
        second = FeDLaSLoss(CLASSES)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        run(second, range(2, 6))
        assert whole.state_dict().keys() == second.state_dict().keys()
        assert {"gate.0.weight", "statistics.statistics.mean"} <= whole.state_dict().keys()
        for name, tensor in whole.state_dict().items():
            assert torch.equal(second.state_dict()[name], tensor), name

    def test_half_precision_and_autocast_keep_weights_and_statistics(self):
        loss = FeDLaSLoss(CLASSES)
        logits, labels, features = data(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(logits.bfloat16(), labels, features.bfloat16())
        assert value.dtype == torch.float32 and loss.gate[0].weight.dtype == torch.float32
        value.backward()
        assert loss.gate[0].weight.grad.dtype == torch.float32
        assert loss.half().statistics.mean.dtype == torch.float32

    def test_two_processes_move_together(self, tmp_path):
        mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
        loss = FeDLaSLoss(CLASSES, gate="positive")
        for seed in range(3):
            logits, labels, features = data(seed=seed, dtype=torch.float32)
            loss(logits, labels, features)
        for rank in range(2):
            found = torch.load(tmp_path / f"rank{rank}.pt")
            for name, tensor in loss.state_dict().items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


def _smoothing_of(loss, logits, target, features):
    loss(logits, target, features)
    return loss.last_smoothing


def _rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    loss = FeDLaSLoss(CLASSES, gate="positive", group=dist.group.WORLD)
    for seed in range(3):
        logits, labels, features = data(seed=seed, dtype=torch.float32)
        loss(logits[rank::2], labels[rank::2], features[rank::2])
    torch.save(loss.state_dict(), os.path.join(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


class TestWatch:
    def test_equals_features_passed_in_training_and_evaluation(self):
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
        passed = FeDLaSLoss(CLASSES)
        watching = copy.deepcopy(passed).watch(model[1])
        _, labels, features = data(dtype=torch.float32)
        for mode in (True, False):
            passed.train(mode)
            watching.train(mode)
            expected = passed(model(features), labels, model[0](features))
            assert torch.equal(watching(model(features), labels), expected)
        with torch.no_grad():
            assert torch.equal(watching(model(features), labels), expected)
        with pytest.raises(ValueError, match=r"features must be given: pass them, or call watch.*; got None"):
            watching(model(features), labels) + watching(torch.randn(16, CLASSES), labels)

    def test_copies_carry_no_hook(self):
        model = nn.Linear(WIDTH, CLASSES)
        loss = FeDLaSLoss(CLASSES).watch(model)
        _, labels, features = data(dtype=torch.float32)
        loss(model(features), labels)
        twin = pickle.loads(pickle.dumps(loss))
        assert torch.equal(twin.eval()(model(features), labels, features), loss.eval()(model(features), labels))
        del loss
        gc.collect()
        assert torch.isfinite(model(features)).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", BASES)
def test_compiles_whole(base):
    plain = FeDLaSLoss(CLASSES, base)
    compiled = copy.deepcopy(plain)
    whole = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        logits, labels, features = data(seed=seed, dtype=torch.float32)
        inputs = [logits.detach().clone().requires_grad_() for _ in range(2)]
        values = [loss(z, labels, features) for loss, z in zip((whole, plain), inputs, strict=True)]
        torch.testing.assert_close(*values)
        for value in values:
            value.backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        torch.testing.assert_close(compiled.last_smoothing, plain.last_smoothing)
    torch.testing.assert_close(compiled.statistics.mean, plain.statistics.mean)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"base": "smooth"}, ValueError, "base must be 'smoothing' or 'margin'; got 'smooth'"),
        ({"gate": "fixed"}, ValueError, "gate must be .*; got 'fixed'"),
        ({"indicator": "entropy"}, ValueError, "indicator must be .*; got 'entropy'"),
        ({"strength": 0.6}, ValueError, r"strength must be in \[0, 0.5\]; got 0.6"),
        ({"strength": math.nan}, ValueError, r"strength must be in \[0, 0.5\]; got nan"),
        ({"beta": math.inf}, ValueError, "beta must be finite"),
        ({"margin": 6.0}, ValueError, "margin must be None with base='smoothing'; got 6.0"),
        ({"base": "margin", "margin": -1.0}, ValueError, "margin must be finite and at least 0"),
        ({"momentum": 2.0}, ValueError, "momentum"),
        ({"norm": 0.5}, ValueError, "norm"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1; got 0"),
        ({"label_smoothing": 0.1}, TypeError, r"FeDLaSLoss.* 'label_smoothing' \(strength is meant\?\)"),
        ({"margin_penalty": None}, TypeError, r"FeDLaSLoss.* 'margin_penalty' \(margin is meant\?\)"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        FeDLaSLoss(**({"num_classes": CLASSES} | arguments))


def test_bad_inputs_are_named():
    loss = FeDLaSLoss(CLASSES)
    logits, labels, features = data(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"features must have shape \(16, D\).*pre_logits=True.*got \(3, 7\)"):
        loss(logits, labels, features[:3])
    with pytest.raises(ValueError, match=r"logits must have shape \(B, 5\); got \(16, 4\)"):
        loss(logits[:, :4], labels, features)
    with pytest.raises(ValueError, match=r"logits must have shape \(B, 5\)"):
        loss(logits.unsqueeze(2), labels.unsqueeze(1), features)


class TestWrongCalls:
    @pytest.mark.parametrize("base", BASES)
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"logits": torch.zeros(16, 4)}, ValueError, r"logits must have shape \(B, 5\); got \(16, 4\)"),
            ({"logits": None}, TypeError, "logits must be a floating-point tensor; got NoneType"),
            ({"logits": torch.zeros(16, 5).numpy()}, TypeError, "logits must be a floating-point tensor; got ndarray"),
            ({"target": torch.zeros(15).long()}, ValueError, "target must have shape"),
            ({"target": torch.full((16,), 5)}, IndexError, r"target must lie in .*; got label 5 at row 0"),
            ({"target": [0] * 16}, TypeError, "target must be a tensor"),
            ({"target": torch.zeros(16, 4)}, ValueError, "target must have"),
            ({"target": torch.zeros(16, dtype=torch.bool)}, TypeError, "target must be"),
            ({"features": torch.zeros(3, 7)}, ValueError, r"features must have shape \(16, D\)"),
            ({"features": torch.zeros(16)}, ValueError, r"features must have shape \(16, D\)"),
            ({"features": "features"}, TypeError, "features must be a floating-point tensor; got str"),
            ({"sample_weight": torch.zeros(3)}, ValueError, "sample_weight must have shape"),
        ],
    )
    def test_leave_the_statistics_as_they_were(self, base, change, error, message):
        logits, labels, features = data(dtype=torch.float32)
        loss = FeDLaSLoss(CLASSES, base)
        loss(logits, labels, features)
        before, gate = copy.deepcopy(loss.state_dict()), loss.last_gate
        with pytest.raises(error, match=message):
            loss(**({"logits": logits, "target": labels, "features": 2 * features} | change))
        assert all(torch.equal(before[name], tensor) for name, tensor in loss.state_dict().items())
        assert loss.last_gate is gate


class TestSafety:
    @pytest.mark.parametrize("ignored", [False, True])
    @pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
    def test_rows_that_are_not_finite_do_not_enter(self, value, ignored):
        logits, labels, features = data(dtype=torch.float32)
        loss, clean = FeDLaSLoss(CLASSES, gate="positive"), FeDLaSLoss(CLASSES, gate="positive")
        kept = torch.ones(16, dtype=torch.bool)
        kept[3] = False
        features[3, 1] = value
        if ignored:
            labels[3] = -100
            loss(logits, labels, features)
        else:
            with pytest.warns(RuntimeWarning, match="1 of the rows have norms that are not finite"):
                result = loss(logits, labels, features)
            assert torch.isfinite(result)
        clean(logits[kept], labels[kept], features[kept])
        assert loss.statistics.skipped == (not ignored)
        torch.testing.assert_close(loss.state_dict(), clean.state_dict())
        torch.testing.assert_close(loss.last_smoothing[kept], clean.last_smoothing)
        if value != 1e30:
            torch.testing.assert_close(loss.last_smoothing[3], torch.tensor(0.05))

    @pytest.mark.parametrize("base", BASES)
    def test_move_once_where_a_checkpoint_repeats_the_forward(self, base):
        from torch.utils.checkpoint import checkpoint

        _, labels, features = data(dtype=torch.float32)
        loss = FeDLaSLoss(CLASSES, base)
        plain = copy.deepcopy(loss)
        model = nn.Linear(WIDTH, CLASSES)
        loss.watch(model)
        for _ in range(2):
            x = features.clone().requires_grad_()
            ours = checkpoint(lambda x: loss(model(x), labels).exp(), x, use_reentrant=False)
            ours.backward()
            twin = features.clone().requires_grad_()
            theirs = plain(F.linear(twin, model.weight, model.bias), labels, twin).exp()
            theirs.backward()
            torch.testing.assert_close(ours, theirs)
            torch.testing.assert_close(x.grad, twin.grad)
        torch.testing.assert_close(loss.state_dict(), plain.state_dict(), rtol=0, atol=0)
        assert loss.statistics.count == 32

    def test_under_torch_func(self):
        logits, labels, features = data(dtype=torch.float32)
        loss = FeDLaSLoss(CLASSES)
        with pytest.raises(RuntimeError, match=r"FeDLaSLoss: running statistics can't move .* call .eval\(\)"):
            torch.func.grad(lambda z: loss(z, labels, features))(logits.detach())
        loss(logits, labels, features)
        loss.eval()
        (expected,) = torch.autograd.grad(loss(logits, labels, features), logits)
        found = torch.func.grad(lambda z: loss(z, labels, features))(logits.detach())
        torch.testing.assert_close(found, expected)

        def one(z, y, f):
            return loss(z.unsqueeze(0), y.unsqueeze(0), f.unsqueeze(0))

        each = torch.func.vmap(torch.func.grad(one))(logits.detach(), labels, features)
        torch.testing.assert_close(each / 16, expected)

    def test_another_default_device_and_fake_tensors(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        logits, labels, features = data(dtype=torch.float32)
        loss = FeDLaSLoss(CLASSES)
        plain = copy.deepcopy(loss)
        with torch.device("meta"):
            found = loss(logits, labels, features)
        assert torch.equal(found, plain(logits, labels, features))
        detached = [part.detach() for part in (logits, labels, features)]
        with FakeTensorMode() as mode:
            given = [mode.from_tensor(part) for part in detached]
            assert FeDLaSLoss(CLASSES)(*given).shape == ()

    def test_repr(self):
        assert repr(FeDLaSLoss(5)) == "FeDLaSLoss(num_classes=5)"
        assert repr(FeDLaSLoss(5, "margin", margin=3.0)) == "FeDLaSLoss(num_classes=5, base='margin', margin=3.0)"
        shown = repr(
            FeDLaSLoss(5, strength=0.1, gate="positive", momentum=None, norm=2.0, indicator="logit", z_loss=0.1)
        )
        assert shown == (
            "FeDLaSLoss(num_classes=5, strength=0.1, momentum=None, gate='positive', indicator='logit', norm=2.0, "
            "z_loss=0.1)"
        )
