"""Modules: registered tensors, folding, the never-stepped warning, and VACELoss against its written-out definition."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedloss
from fusedloss import ClassTemperature, CrossEntropyLoss, Prior, Scale, VACELoss


def data(rows=40, width=6, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, width, generator=generator) * torch.linspace(0.5, 2.0, rows).unsqueeze(1)
    return features, torch.randn(rows, classes, generator=generator), torch.arange(rows) % classes


class TestCrossEntropyLoss:
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_takes_the_place_of_torchs(self, reduction):
        _, logits, labels = data()
        weight = torch.rand(5)
        arguments = {"weight": weight, "ignore_index": 2, "reduction": reduction, "label_smoothing": 0.1}
        torch.testing.assert_close(
            CrossEntropyLoss(**arguments)(logits, labels), nn.CrossEntropyLoss(**arguments)(logits, labels)
        )
        assert list(CrossEntropyLoss(weight).state_dict()) == list(nn.CrossEntropyLoss(weight).state_dict())
        with pytest.raises(ValueError, match="size_average"):
            CrossEntropyLoss(None, True)

    def test_term_tensors_are_registered(self):
        tau = nn.Parameter(torch.full((5,), 2.0))
        loss = CrossEntropyLoss(terms=[ClassTemperature(tau), Prior(torch.full((5,), 0.2).log()), Scale(3.0)])
        assert list(loss.state_dict()) == ["terms.0.tau", "terms.1.log_prior"]
        assert [name for name, _ in loss.named_parameters()] == ["terms.0.tau"]
        assert next(loss.parameters()) is tau
        _, logits, labels = data()
        loss(logits, labels).backward()
        assert tau.grad is not None and tau.grad.abs().sum() > 0
        for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            torch.testing.assert_close(twin(logits, labels), loss(logits, labels))
        moved = copy.deepcopy(loss).double()
        assert moved.terms[1].log_prior.dtype == torch.float64

    def test_an_optimizer_moves_a_registered_temperature(self):
        tau = nn.Parameter(torch.full((5,), 2.0))
        loss = CrossEntropyLoss(terms=[ClassTemperature(tau)])
        optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
        _, logits, labels = data()
        before = loss(logits, labels)
        before.backward()
        optimizer.step()
        after = loss(logits, labels)
        assert after < before
        torch.testing.assert_close(after, F.cross_entropy(logits / tau, labels))

    def test_a_temperature_that_became_negative_is_refused(self):
        tau = nn.Parameter(torch.ones(5))
        loss = CrossEntropyLoss(terms=[ClassTemperature(tau)])
        with torch.no_grad():
            tau[3] = -1.0
        with pytest.raises(ValueError, match=r"tau must be positive.*-1.0 for class 3"):
            loss(torch.randn(2, 5), torch.tensor([0, 1]))

    def test_fold_into(self):
        layer, x = nn.Linear(6, 5), torch.randn(7, 6)
        tau, prior = torch.rand(5) + 0.5, torch.rand(5).log_softmax(0)
        loss = CrossEntropyLoss(terms=[ClassTemperature(tau), Scale(2.0), Prior(prior, 0.7)])
        before = layer.weight.clone()
        torch.testing.assert_close(loss.fold_into(layer)(x), layer(x) / tau * 2 + 0.7 * prior)
        torch.testing.assert_close(loss.fold_into(layer, prior=False)(x), layer(x) / tau * 2)
        assert torch.equal(layer.weight, before)
        bare = nn.Linear(6, 5, bias=False)
        torch.testing.assert_close(loss.fold_into(bare)(x), bare(x) / tau * 2 + 0.7 * prior)
        with pytest.raises(TypeError, match=r"linear must be an nn\.Linear"):
            loss.fold_into(nn.Conv2d(1, 1, 1))
        with pytest.raises(ValueError, match=r"shape \(3,\)"):
            loss.fold_into(nn.Linear(6, 3))

    def test_says_once_when_its_parameters_are_never_stepped(self):
        model = nn.Linear(6, 5)
        loss = CrossEntropyLoss(terms=[ClassTemperature(nn.Parameter(torch.ones(5)))])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        features, _, labels = data()

        def step():
            optimizer.zero_grad()
            loss(model(features), labels).backward()
            optimizer.step()

        with pytest.warns(UserWarning, match="never stepped") as caught:
            for _ in range(8):
                step()
        assert len(caught) == 1
        assert caught[0].filename == __file__

    @pytest.mark.parametrize("kind", ["rare steps", "learning rate 0", "a frozen group"])
    def test_says_nothing_where_an_optimizer_has_them(self, kind):
        model = nn.Linear(6, 5)
        tau = nn.Parameter(torch.ones(5), requires_grad=kind != "a frozen group")
        loss = CrossEntropyLoss(terms=[ClassTemperature(tau)])
        often = torch.optim.SGD(model.parameters(), lr=0.1)
        own = torch.optim.SGD(loss.parameters(), lr=0.0 if kind == "learning rate 0" else 0.1)
        features, _, labels = data()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(8):
                often.zero_grad()
                loss(model(features), labels).backward()
                often.step()
                if kind != "rare steps" or step == 7:
                    own.step()

    def test_an_optimizer_of_another_model_does_not_count_while_gradients_accumulate(self):
        model, other = nn.Linear(6, 5), nn.Linear(6, 5)
        loss = CrossEntropyLoss(terms=[ClassTemperature(nn.Parameter(torch.ones(5)))])
        optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
        unrelated = torch.optim.SGD(other.parameters(), lr=0.1)
        features, _, labels = data()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(8):
                loss(model(features), labels).backward()
                F.cross_entropy(other(features), labels).backward()
                unrelated.step()
            optimizer.step()

    def test_says_nothing_when_they_are(self):
        model = nn.Linear(6, 5)
        loss = CrossEntropyLoss(terms=[ClassTemperature(nn.Parameter(torch.ones(5)))])
        optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
        features, _, labels = data()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(8):
                optimizer.zero_grad()
                for _ in range(3):  # gradient accumulation
                    loss(model(features), labels).backward()
                optimizer.step()


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
        with pytest.raises(ValueError, match="in_features=6 but the layer takes 4"):
            VACELoss(6, 5).watch(nn.Linear(4, 5))
        with pytest.raises(TypeError, match=r"layer must be an nn\.Module; got tuple"):
            VACELoss(6, 5).watch((nn.Linear(6, 5), nn.Linear(6, 5)))

    def test_errors_name_the_argument(self):
        features, logits, labels = data()
        logits.requires_grad_()
        with pytest.raises(ValueError, match="pre_logits=True"):
            VACELoss(6, 5)(logits, labels, features[:, :3])
        with pytest.raises(ValueError, match=r"features: got None and no statistics"):
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
        whole = torch.compile(compiled, fullgraph=torch.__version__ >= (2, 15))
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
        watching(torch.compile(model)(features), labels).backward()
        assert int(watching.updates) == 1


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nan_logits_of_an_ignored_row_do_nothing(reduction):
    logits = torch.randn(3, 4)
    logits[1] = float("nan")
    logits.requires_grad_()
    labels = torch.tensor([0, -100, 2])
    fusedloss.cross_entropy(logits, labels, reduction=reduction).sum().backward()
    assert torch.isfinite(logits.grad).all() and (logits.grad[1] == 0).all()
