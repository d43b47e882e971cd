"""VACELoss against its written-out definition, and what its statistics are safe from."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedloss
from fusedloss import Prior, VACELoss


def data(rows=40, width=6, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, width, generator=generator) * torch.linspace(0.5, 2.0, rows).unsqueeze(1)
    return features, torch.randn(rows, classes, generator=generator), torch.arange(rows) % classes


def written_out_temperature(features, labels, classes, strength=0.5, a=1.0, bounds=(0.5, 2.0)):
    scatter = torch.zeros(classes, dtype=torch.float64)
    count = torch.bincount(labels, minlength=classes)
    for c in range(classes):
        rows = features[labels == c].double()
        if len(rows):
            scatter[c] = (rows - rows.mean(0)).square().sum(1).mean()
    mean = scatter[count >= 2].mean()
    scatter = torch.where(count >= 2, scatter, mean)
    return (a + strength / mean * scatter).clamp(*bounds).float()


class TestVACELoss:
    def test_fitted_temperatures_and_loss(self):
        features, logits, labels = data()
        loss = VACELoss(6, 5).fit_statistics(features, labels)
        expected = written_out_temperature(features, labels, 5)
        torch.testing.assert_close(loss.temperature, expected)
        assert expected.unique().numel() > 1
        torch.testing.assert_close(loss(logits, labels), F.cross_entropy(logits / expected, labels))
        torch.testing.assert_close(loss.scaled_logits(logits), logits / expected)

    def test_unseen_and_single_classes_get_the_mean_scatter(self):
        features, _, labels = data()
        labels = labels.clamp(max=2)
        labels[0] = 3
        loss = VACELoss(6, 5).fit_statistics(features, labels)
        torch.testing.assert_close(loss.temperature, written_out_temperature(features, labels, 5))
        assert loss.temperature[3] == loss.temperature[4] == 1.5

    def test_before_any_statistics_the_temperature_is_a_clipped(self):
        assert torch.equal(VACELoss(6, 5, a=3.0).temperature, torch.full((5,), 2.0))
        loss = VACELoss(6, 5).eval()
        _, logits, labels = data()
        torch.testing.assert_close(loss(logits, labels), F.cross_entropy(logits, labels))

    def test_the_slope_stays_after_warm_up(self):
        loss = VACELoss(6, 5, warmup_steps=2, momentum=0.5)
        slopes = []
        for seed in range(4):
            features, logits, labels = data(seed=seed)
            loss(logits.requires_grad_(), labels, features * (1 + seed))
            slopes.append(float(loss.slope))
        assert slopes[0] != slopes[1] and slopes[1] == slopes[2] == slopes[3]
        assert int(loss.updates) == 4

    def test_a_given_b_replaces_the_slope(self):
        features, _, labels = data()
        loss = VACELoss(6, 5, b=0.01).fit_statistics(features, labels)
        scatter = loss.statistics.scatter
        torch.testing.assert_close(loss.temperature, (1 + 0.01 * scatter).clamp(0.5, 2).float())

    def test_mean_temperature_one(self):
        features, _, labels = data()
        loss = VACELoss(6, 5, a=0.5, strength=0.5).fit_statistics(features, labels)
        torch.testing.assert_close(loss.temperature.mean(), torch.tensor(1.0))

    def test_statistics_move_only_in_training_with_gradients_and_labels(self):
        features, logits, labels = data()
        logits.requires_grad_()
        loss = VACELoss(6, 5)
        with torch.no_grad():
            loss(logits, labels, features)
        with torch.inference_mode():
            loss(logits, labels, features)
        loss(logits, torch.softmax(logits.detach(), 1), features)
        loss.eval()(logits, labels, features)
        assert int(loss.updates) == 0
        loss.train()(logits, labels, features)
        assert int(loss.updates) == 1

    def test_ignored_rows_leave_the_statistics_alone(self):
        features, logits, labels = data()
        labels[::2] = -100
        loss = VACELoss(6, 5)
        loss(logits.requires_grad_(), labels, features)
        assert int(loss.statistics.count.sum()) == 20

    def test_two_live_losses_keep_their_temperatures(self):
        loss = VACELoss(6, 5, momentum=1.0)
        values, inputs = [], []
        for seed in range(2):
            features, logits, labels = data(seed=seed)
            logits.requires_grad_()
            values.append(loss(logits, labels, features))
            inputs.append((logits, labels, loss.temperature.clone()))
        for value in values:
            value.backward(retain_graph=True)
            value.backward()
        for logits, labels, tau in inputs:
            twin = logits.detach().clone().requires_grad_()
            F.cross_entropy(twin / tau, labels).backward()
            torch.testing.assert_close(logits.grad, 2 * twin.grad)

    def test_watch_takes_the_layers_input(self):
        model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 5))
        watching, given = VACELoss(4, 5), VACELoss(4, 5)
        watching.watch(model[2])
        features, _, labels = data()
        hidden = model[1](model[0](features))
        watching(model(features), labels).backward()
        given(model[2](hidden), labels, hidden)
        for name, tensor in given.state_dict().items():
            assert torch.equal(watching.state_dict()[name], tensor), name
        logits = model(features)
        watching(logits, labels)
        watching(logits, labels)
        assert int(watching.updates) == 2

    def test_watching_survives_copies_and_dies_with_the_loss(self):
        model = nn.Sequential(nn.Linear(6, 5))
        loss = VACELoss(6, 5).watch(model[0])
        features, _, labels = data()
        twin = copy.deepcopy(model)
        pickle.loads(pickle.dumps(model))(features)
        twin(features)
        loss(model(features).detach().requires_grad_(), labels)
        assert int(loss.updates) == 1
        again = pickle.loads(pickle.dumps(loss))
        assert torch.equal(again.temperature, loss.temperature)
        del loss
        gc.collect()
        assert torch.isfinite(model(features)).all()

    def test_watch_refuses_what_does_not_fit(self):
        with pytest.raises(ValueError, match="in_features=6 of this loss; got one that takes 4"):
            VACELoss(6, 5).watch(nn.Linear(4, 5))
        with pytest.raises(TypeError, match=r"layer must be an nn\.Module; got tuple"):
            VACELoss(6, 5).watch((nn.Linear(6, 5), nn.Linear(6, 5)))

    def test_errors_name_the_argument(self):
        features, logits, labels = data()
        logits.requires_grad_()
        with pytest.raises(ValueError, match="pre_logits=True"):
            VACELoss(6, 5)(logits, labels, features[:, :3])
        with pytest.raises(ValueError, match=r"features must be given before there are statistics"):
            VACELoss(6, 5)(logits, labels)
        for arguments, name in (
            ({"a": float("nan")}, "a must be finite"),
            ({"strength": -1.0}, "strength"),
            ({"tau_min": 0.0}, "tau_min"),
            ({"tau_min": 3.0}, "tau_min"),
            ({"warmup_steps": -1}, "warmup_steps"),
            ({"momentum": 2.0}, "momentum"),
        ):
            with pytest.raises(ValueError, match=name):
                VACELoss(6, 5, **arguments)

    @pytest.mark.parametrize("center", [False, True])
    def test_fold_into_equals_scaled_logits(self, center):
        features, _, labels = data()
        layer = nn.Linear(6, 5)
        loss = VACELoss(6, 5, center=center).fit_statistics(features, labels)
        torch.testing.assert_close(loss.fold_into(layer)(features), loss.scaled_logits(layer(features)))

    def test_centring_makes_it_shift_invariant(self):
        features, logits, labels = data()
        for center in (False, True):
            loss = VACELoss(6, 5, center=center).fit_statistics(features, labels).eval()
            moved = (loss(logits + 10, labels) - loss(logits, labels)).abs()
            assert (moved < 1e-4) == center

    def test_resume_is_bit_exact(self):
        def run(loss, seeds):
            for seed in seeds:
                features, logits, labels = data(seed=seed)
                loss(logits.requires_grad_(), labels, features)

        whole, first = VACELoss(6, 5, warmup_steps=3), VACELoss(6, 5, warmup_steps=3)
        run(whole, range(6))
        run(first, range(2))
        second = VACELoss(6, 5, warmup_steps=3)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        run(second, range(2, 6))
        for name, tensor in whole.state_dict().items():
            assert torch.equal(second.state_dict()[name], tensor), name

    def test_state_keeps_its_types(self):
        loss = VACELoss(6, 5, weight=torch.ones(5)).half()
        kinds = {name: tensor.dtype for name, tensor in loss.state_dict().items()}
        assert kinds.pop("weight") == torch.float16
        assert kinds == {
            "temperature": torch.float32,
            "slope": torch.float64,
            "updates": torch.int64,
            "statistics.count": torch.int64,
            "statistics.mean": torch.float32,
            "statistics.scatter": torch.float64,
        }
        features, logits, labels = data()
        value = loss.to(torch.bfloat16)(logits.bfloat16().requires_grad_(), labels, features.bfloat16())
        assert value.dtype == torch.float32 and torch.isfinite(value)

    def test_further_terms_apply_after_the_temperature(self):
        features, logits, labels = data()
        prior = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1]).log()
        loss = VACELoss(6, 5, terms=[Prior(prior)], label_smoothing=0.1).fit_statistics(features, labels)
        expected = F.cross_entropy(logits / loss.temperature + prior, labels, label_smoothing=0.1)
        torch.testing.assert_close(loss(logits, labels), expected)

    @pytest.mark.parametrize("backend", ["reference", "cpp"])
    def test_gradients_on_each_backend(self, backend):
        features, logits, labels = data()
        loss = VACELoss(6, 5).fit_statistics(features, labels).eval()
        with fusedloss.backend(backend):
            assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits.double().requires_grad_())

    @pytest.mark.filterwarnings("ignore")
    def test_compiles_whole_and_watches_a_compiled_model(self):
        compiled, plain = VACELoss(6, 5), VACELoss(6, 5)
        whole = torch.compile(compiled, fullgraph=True, backend="aot_eager")
        for seed in range(2):
            features, logits, labels = data(seed=seed)
            inputs = [logits.clone().requires_grad_() for _ in range(2)]
            values = [loss(z, labels, features) for loss, z in zip((whole, plain), inputs, strict=True)]
            torch.testing.assert_close(*values)
            for value in values:
                value.backward()
            torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
            torch.testing.assert_close(compiled.temperature, plain.temperature)
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5))
        watching = VACELoss(6, 5).watch(model[1])
        watching(torch.compile(model, backend="aot_eager")(features), labels).backward()
        assert int(watching.updates) == 1


def state(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def unchanged(module, before):
    return all(torch.equal(before[name], buffer) for name, buffer in module.named_buffers())


class TestStatistics:
    """What they are safe from."""

    @pytest.mark.parametrize("started", [False, True])
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"logits": torch.zeros(40, 4)}, ValueError, r"logits must have shape \(B, 5\); got \(40, 4\)"),
            ({"logits": torch.zeros(40)}, ValueError, r"logits must have shape \(B, 5\)"),
            ({"logits": torch.zeros(40, 5).long()}, TypeError, "logits must be a floating-point tensor"),
            ({"logits": [[0.0] * 5] * 40}, TypeError, "logits must be a floating-point tensor; got list"),
            ({"logits": None}, TypeError, "logits must be a floating-point tensor; got NoneType"),
            ({"target": torch.zeros(39).long()}, ValueError, "target must have shape"),
            ({"target": torch.full((40,), 5)}, IndexError, r"target must lie in .*; got label 5 at row 0"),
            ({"target": torch.full((40,), -1)}, IndexError, r"target must lie in .*; got label -1 at row 0"),
            ({"target": "labels"}, TypeError, "target must be a tensor"),
            ({"target": None}, TypeError, "target must be a tensor"),
            ({"target": torch.zeros(40, 4)}, ValueError, "target must have"),
            ({"features": torch.zeros(40, 7)}, ValueError, r"features must have shape \(40, 6\)"),
            ({"features": torch.zeros(39, 6)}, ValueError, r"features must have shape \(40, 6\)"),
            ({"features": torch.zeros(6)}, ValueError, r"features must have shape \(40, 6\)"),
            ({"features": torch.zeros(40, 6).long()}, TypeError, "features must be a floating-point tensor"),
            ({"features": torch.zeros(40, 6).numpy()}, TypeError, "features must be a floating-point tensor"),
            ({"features": torch.zeros(40, 6, device="meta")}, ValueError, "features must be on the device of"),
            ({"sample_weight": torch.zeros(3)}, ValueError, "sample_weight must have shape"),
        ],
    )
    def test_a_wrong_call_leaves_them_as_they_were(self, change, error, message, started):
        features, logits, labels = data()
        loss = VACELoss(6, 5, weight=torch.ones(5))
        if started:
            loss(logits, labels, features)
        before = state(loss)
        with pytest.raises(error, match=message):
            loss(**({"logits": logits, "target": labels, "features": features} | change))
        assert unchanged(loss, before)

    def test_rows_that_are_not_finite_do_not_enter(self):
        features, logits, labels = data()
        loss, clean = VACELoss(6, 5), VACELoss(6, 5)
        for seed in range(3):
            features, logits, labels = data(seed=seed)
            dirty = features.clone()
            dirty[3], dirty[7, 2] = float("nan"), float("inf")
            kept = torch.ones(40, dtype=torch.bool)
            kept[[3, 7]] = False
            if seed == 0:
                with pytest.warns(RuntimeWarning, match="2 of the rows have features that are not finite"):
                    loss(logits, labels, dirty)
            else:
                loss(logits, labels, dirty)
            clean(logits[kept], labels[kept], features[kept])
        assert loss.statistics.skipped == 6
        torch.testing.assert_close(loss.temperature, clean.temperature)

    @pytest.mark.parametrize("determinism", ["default", "none"])
    @pytest.mark.parametrize("early_stop", [True, False])
    @pytest.mark.parametrize("nested", [False, True])
    def test_move_once_where_a_checkpoint_repeats_the_forward(self, nested, early_stop, determinism):
        from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

        features, _, labels = data()
        model, loss, plain = nn.Linear(6, 5), VACELoss(6, 5), VACELoss(6, 5)
        loss.watch(model)
        twin = copy.deepcopy(model)
        ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()

        def step(x):
            return loss(model(x), labels).exp()

        def outer(x):
            return checkpoint(step, x, use_reentrant=False) * 2.0

        with set_checkpoint_early_stop(early_stop):
            for _ in range(2):
                value = checkpoint(outer if nested else step, ours, use_reentrant=False, determinism_check=determinism)
                value.sum().backward()
                expected = plain(twin(theirs), labels, theirs).exp() * (2.0 if nested else 1.0)
                expected.sum().backward()
                torch.testing.assert_close(value, expected)
        assert int(loss.updates) == 2
        torch.testing.assert_close(loss.temperature, plain.temperature)
        torch.testing.assert_close(ours.grad, theirs.grad)

    def test_features_of_a_repeated_forward_serve_no_later_loss(self):
        from torch.utils.checkpoint import checkpoint

        features, _, labels = data()
        model, loss = nn.Linear(6, 5), VACELoss(6, 5)
        loss.watch(model)
        loss(checkpoint(model, features.requires_grad_(), use_reentrant=False), labels).backward()
        assert int(loss.updates) == 1
        loss(torch.zeros(40, 5), labels)
        assert int(loss.updates) == 1

    def test_move_in_the_second_forward_of_a_reentrant_checkpoint(self):
        from torch.utils.checkpoint import checkpoint

        features, logits, labels = data()
        loss = VACELoss(6, 5)
        checkpoint(lambda z: loss(z, labels, features), logits.requires_grad_(), use_reentrant=True).backward()
        assert int(loss.updates) == 1

    def test_under_torch_func(self):
        features, logits, labels = data()
        loss = VACELoss(6, 5)
        with pytest.raises(RuntimeError, match=r"VACELoss: running statistics can't move .* call .eval\(\)"):
            torch.func.grad(lambda z: loss(z, labels, features))(logits)
        assert int(loss.updates) == 0
        loss.fit_statistics(features, labels).eval()
        expected = torch.autograd.grad(loss(logits.requires_grad_(), labels), logits)[0]
        logits = logits.detach()
        torch.testing.assert_close(torch.func.grad(lambda z: loss(z, labels, features))(logits), expected)
        each = torch.func.vmap(torch.func.grad(lambda z, y: loss(z.unsqueeze(0), y.unsqueeze(0))))(logits, labels)
        torch.testing.assert_close(each / 40, expected)

    def test_second_derivatives_are_right_or_refused(self):
        features, logits, labels = data()
        loss = VACELoss(6, 5).fit_statistics(features, labels)
        logits.requires_grad_()
        (grad,) = torch.autograd.grad(loss(logits, labels), logits, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.square().sum().backward()
        with fusedloss.backend("reference"):
            (grad,) = torch.autograd.grad(loss(logits, labels), logits, create_graph=True)
            (found,) = torch.autograd.grad(grad.square().sum(), logits)
        twin = logits.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(twin / loss.temperature, labels), twin, create_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(grad.square().sum(), twin)[0])

    def test_another_default_device_and_fake_tensors(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        features, logits, labels = data()
        loss, plain = VACELoss(6, 5), VACELoss(6, 5)
        expected = plain(logits, labels, features)
        with torch.device("meta"):
            found = loss(logits, labels, features)
        assert torch.equal(found, expected) and torch.equal(loss.temperature, plain.temperature)
        with FakeTensorMode() as mode:
            value = VACELoss(6, 5)(*(mode.from_tensor(part) for part in (logits, labels, features)))
            assert value.shape == ()


def test_importing_the_package_does_not_import_the_compiler():
    import subprocess
    import sys

    code = "import sys, torch, fusedloss; print([m for m in sys.modules if m.startswith(('torch._dynamo', 'triton'))])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_repr():
    assert repr(VACELoss(6, 5)) == "VACELoss(in_features=6, num_classes=5)"
    loss = VACELoss(6, 5, a=0.5, momentum=None, center=True, label_smoothing=0.1)
    shown = "VACELoss(in_features=6, num_classes=5, a=0.5, momentum=None, center=True, label_smoothing=0.1)"
    assert repr(loss) == shown
    with pytest.raises(TypeError, match=r"VACELoss.__init__\(\) got an unexpected keyword argument 'gamma'"):
        VACELoss(6, 5, gamma=1.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_features": 0}, ValueError, "in_features must be at least 1; got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an integer; got float"),
        ({"a": "1"}, TypeError, "a must be a number; got str"),
        ({"b": float("inf")}, ValueError, "b must be finite; got inf"),
        ({"tau_max": None}, TypeError, "tau_max must be a number; got NoneType"),
        ({"warmup_steps": 1.5}, TypeError, "warmup_steps must be an integer; got float"),
        ({"center": 1}, TypeError, "center must be True or False; got int"),
    ],
)
def test_bad_settings_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        VACELoss(**({"in_features": 6, "num_classes": 5} | arguments))
