"""Contrast in the trainer: the auxiliary loss, prototypes and class-balanced batches."""

import numpy as np
import pytest
import torch

from fusedloss.features import FeatureBank
from fusedloss.train import Recipe, fit
from fusedloss.train.order import RowOrder


def bank():
    generator = np.random.RandomState(0)
    labels = np.repeat(np.arange(4), (60, 30, 20, 10))
    features = generator.randn(4, 12)[labels] + generator.randn(len(labels), 12)
    return FeatureBank.from_arrays(features.astype(np.float32), labels)


def recipe(**changes):
    return Recipe(head="mlp", hidden=(16, 8), epochs=4, batch_size=32, lr=(3e-3,), seed=1).replace(**changes)


CONTRAST = {"supcon": 0.5, "supcon_projection": 8}


@pytest.mark.parametrize("changes", [
    CONTRAST, {**CONTRAST, "supcon_prototypes": True}, {**CONTRAST, "loss": "fedlas", "balanced_batches": True},
    {"head": "linear", "balanced_batches": True},
])  # fmt: skip
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, changes):
    class Killed(Exception):
        pass

    def kill(lr, row):
        if row["epoch"] == 2:
            raise Killed

    whole = fit(bank(), recipe(**changes), device="cpu")
    with pytest.raises(Killed):
        fit(bank(), recipe(**changes), folder=tmp_path / "run", device="cpu", pictures=False, on_epoch=kill)
    resumed = fit(bank(), recipe(**changes), folder=tmp_path / "run", resume=True, device="cpu", pictures=False)
    assert [row["loss"] for row in resumed.history] == [row["loss"] for row in whole.history]
    for ours, theirs in zip(whole.predictor.head.parameters(), resumed.predictor.head.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_contrast_reaches_the_hidden_layers_and_prototypes_the_classifier():
    def weights(**changes):
        return [p.detach() for p in fit(bank(), recipe(epochs=1, **changes), device="cpu").predictor.head.parameters()]

    plain, contrast, prototypes = weights(), weights(**CONTRAST), weights(**CONTRAST, supcon_prototypes=True)
    assert not torch.equal(plain[0], contrast[0]) and not torch.equal(contrast[0], prototypes[0])
    assert sum(map(torch.numel, plain)) == sum(map(torch.numel, contrast))


def test_rows_in_order():
    labels = torch.tensor([0] * 900 + [5] * 90 + [2] * 10)
    each_once = RowOrder(labels, 0, balanced=False)
    assert torch.equal(each_once.epoch().sort().values, torch.arange(1000))
    balanced = RowOrder(labels, 0, balanced=True)
    drawn = labels[torch.cat([balanced.epoch() for _ in range(9)])]
    shares = torch.bincount(drawn, minlength=6) / len(drawn)
    torch.testing.assert_close(shares[[0, 2, 5]], torch.full((3,), 1 / 3), rtol=0, atol=0.02)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="head must be mlp for supcon, which trains hidden layers; got 'linear'"):
        Recipe(supcon=0.1)
    with pytest.raises(ValueError, match="supcon must be above 0 for supcon_prototypes"):
        recipe(supcon_prototypes=True)
    with pytest.raises(ValueError, match="supcon_temperature must be positive"):
        recipe(**CONTRAST, supcon_temperature=0.0)


def test_fused_and_eager_learn_alike():
    from bench.frozen import frozen
    from bench.supcon_learning import compare

    data = frozen(bank())
    for layers in (1, 2):
        found = compare(data, layers, torch.float64, steps=15, batch_size=64)
        assert found["last loss"] < found["first loss"]
        assert found["fused to eager"] < 1e-9
        assert found["Recall@1, fused"] == found["Recall@1, eager"]
