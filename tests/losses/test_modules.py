"""Modules: registered tensors, folding and the never-stepped warning."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedloss
from fusedloss import ClassTemperature, CrossEntropyLoss, Prior, Scale


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


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nan_logits_of_an_ignored_row_do_nothing(reduction):
    logits = torch.randn(3, 4)
    logits[1] = float("nan")
    logits.requires_grad_()
    labels = torch.tensor([0, -100, 2])
    fusedloss.cross_entropy(logits, labels, reduction=reduction).sum().backward()
    assert torch.isfinite(logits.grad).all() and (logits.grad[1] == 0).all()
