"""The losses on logits in the trainer: what a recipe's loss computes, its resume, its schedule, and its prior."""

import functools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fusedloss
from fusedloss.cli.main import run as command_line
from fusedloss.features import FeatureBank
from fusedloss.longtail import effective_number_weights, ldam_margins, log_prior
from fusedloss.train import Recipe, fit
from fusedloss.train.data import TrainingData
from fusedloss.train.evaluate import evaluate_run
from fusedloss.train.heads import build_head
from fusedloss.train.objectives import OBJECTIVES, build_objective
from fusedloss.train.step import gradient_step

QUICK = Recipe(epochs=4, batch_size=32, lr=5e-2)
LOSSES = [
    {"loss": "focal"},
    {"loss": "balanced"},
    {"loss": "ldam", "head": "cosine", "class_weights": "effective", "reweight_epoch": 2},
    {"loss": "mbls", "margin": 1.0},
    {"loss": "fedlas"},
    {"loss": "fedlas", "fedlas_base": "margin", "fedlas_gate": "positive", "head": "mlp", "hidden": (8,)},
    {"loss": "fedlas", "head": "cosine", "class_weights": "inverse", "reweight_epoch": 1, "reweight_ramp": 2},
]


@pytest.fixture(scope="module")
def bank():
    random = np.random.RandomState(0)
    labels = np.repeat(np.arange(6), [160, 80, 40, 20, 10, 6])
    features = random.randn(len(labels), 10) + 2 * random.randn(6, 10)[labels]
    return FeatureBank.from_arrays(features.astype(np.float32), labels, groups=np.arange(len(labels)) // 2)


def head_bits(result):
    return {name: tensor.clone() for name, tensor in result.predictor.head.state_dict().items()}


def batch_of(bank, recipe):
    features, labels = torch.from_numpy(bank.features), torch.from_numpy(bank.labels)
    data = TrainingData(features, labels, torch.bincount(labels, minlength=bank.num_classes))
    return data, build_head(recipe, bank.in_features, bank.num_classes), build_objective(recipe, data)


@pytest.mark.parametrize("settings", LOSSES, ids=str)
def test_every_loss_learns_and_resumes_to_the_bit(bank, settings, tmp_path):
    recipe = QUICK.replace(**settings)
    whole = fit(bank, recipe, device="cpu")
    losses = [row["loss"] for row in whole.history]
    assert min(losses) < losses[0] or recipe.reweight_epoch
    assert whole.report["top1"] > 0.4

    def stop(epoch, lr, row):
        if row["epoch"] == epoch:
            raise KeyboardInterrupt

    options = {"folder": tmp_path / "run", "resume": True, "device": "cpu", "pictures": False}
    for epoch in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            fit(bank, recipe, on_epoch=functools.partial(stop, epoch), **options)
    resumed = head_bits(fit(bank, recipe, **options))
    expected = head_bits(whole)
    assert resumed.keys() == expected.keys() and all(torch.equal(resumed[name], expected[name]) for name in resumed)


def test_what_a_recipes_loss_computes(bank):
    prior, counts = log_prior, torch.bincount(torch.from_numpy(bank.labels))

    def found(**settings):
        data, _, objective = batch_of(bank, QUICK.replace(**settings))
        torch.manual_seed(1)
        logits = torch.randn(len(data.labels), len(counts))
        return objective.loss(logits, data.labels), logits, data.labels

    value, logits, labels = found(loss="focal", focal_gamma=1.5)
    torch.testing.assert_close(value, fusedloss.FocalLoss(1.5)(logits, labels))
    value, logits, labels = found(loss="balanced")
    torch.testing.assert_close(value, F.cross_entropy(logits + prior(counts), labels))
    value, logits, labels = found(loss="balanced", prior_strength=0.5)
    torch.testing.assert_close(value, F.cross_entropy(logits + 0.5 * prior(counts), labels))
    value, logits, labels = found(loss="mbls", margin=1.0, penalty=0.2)
    torch.testing.assert_close(value, fusedloss.MbLSLoss(1.0, 0.2)(logits, labels))
    value, logits, labels = found(loss="ldam", head="cosine", cosine_scale=16.0, max_margin=0.3)
    lowered = logits - 16.0 * ldam_margins(counts, 0.3)[labels].unsqueeze(1) * F.one_hot(labels)
    torch.testing.assert_close(value, F.cross_entropy(lowered, labels))


@pytest.mark.parametrize("head", ["linear", "cosine", "mlp"])
def test_fedlas_sees_what_the_last_layer_reads(bank, head):
    recipe = QUICK.replace(loss="fedlas", head=head, hidden=(7,), dropout=0.0)
    data, network, objective = batch_of(bank, recipe)
    step = gradient_step(network, objective, 64)
    step(data.features[:64], data.labels[:64])
    read = network[:-1](data.features[:64]) if head == "mlp" else data.features[:64]
    torch.testing.assert_close(objective.loss.statistics.mean, read.abs().sum(1).mean())
    assert objective.loss.gate[0].weight.grad.abs().sum() > 0


def test_the_weights_of_an_epoch(bank):
    recipe = QUICK.replace(class_weights="effective", reweight_epoch=2, reweight_ramp=2)
    data, _, objective = batch_of(bank, recipe)
    final = effective_number_weights(data.counts)
    for epoch, share in ((0, 0.0), (1, 0.0), (2, 0.5), (3, 1.0)):
        objective.begin_epoch(epoch)
        torch.testing.assert_close(objective.loss.weight, torch.ones(6).lerp(final, share))


def test_balanced_softmax_finds_more_of_the_tail(bank):
    recipe = QUICK.replace(epochs=20, lr=1e-2)
    recalls = []
    for loss in ("ce", "balanced"):
        report = fit(bank, recipe.replace(loss=loss), device="cpu").report
        recalls.append(np.nanmean([row["recall"] for row in report["per_class"][3:]]))
    assert recalls[1] > recalls[0]


class TestPrior:
    def test_a_trained_head_records_it_and_refuses_a_second_one(self, bank, tmp_path):
        bank = bank.save(tmp_path / "bank")
        plain = fit(bank, QUICK, folder=tmp_path / "plain", device="cpu", pictures=False).predictor
        for name, settings in (("balanced", {"loss": "balanced"}), ("half", {"prior_strength": 0.5})):
            run = tmp_path / name
            predictor = fit(bank, QUICK.replace(**settings), folder=run, device="cpu", pictures=False).predictor
            strength = 1.0 if name == "balanced" else 0.5
            assert json.loads((run / "head.json").read_text())["prior"] == {"applied": "training", "strength": strength}
            message = rf"trained with {strength:g} \* log_prior added, or the prior is applied twice"
            with pytest.raises(ValueError, match=message):
                predictor.logits(bank.features, adjust_prior=1.0)
            with pytest.raises(ValueError, match=message):
                evaluate_run(run, adjust_prior=0.5, device="cpu")
        assert plain.prior == {"applied": "none", "strength": 0.0}
        raw, adjusted = plain.logits(bank.features), plain.logits(bank.features, adjust_prior=1.0)
        prior = log_prior(torch.tensor(plain.train_counts), floor=1.0)
        torch.testing.assert_close(adjusted, raw - prior)

    def test_on_the_command_line(self, bank, tmp_path, capsys):
        bank = bank.save(tmp_path / "bank")
        fit(bank, QUICK, folder=tmp_path / "plain", device="cpu", pictures=False)
        fit(bank, QUICK.replace(loss="balanced"), folder=tmp_path / "balanced", device="cpu", pictures=False)
        np.save(tmp_path / "features.npy", bank.features)

        def call(*arguments):
            code = command_line([str(argument) for argument in arguments])
            return code, capsys.readouterr()

        scores = tmp_path / "scores.json"
        code, _ = call("evaluate", tmp_path / "plain", "--adjust-prior", "1.0", "--output", scores)
        assert code == 0 and json.loads(scores.read_text())["adjust_prior"] == 1.0
        code, shown = call("predict", tmp_path / "plain", tmp_path / "features.npy", "--adjust-prior", "1")
        assert code == 0 and len(shown.out.splitlines()) == len(bank) + 1
        for arguments in (("evaluate", tmp_path / "balanced"), ("predict", tmp_path / "balanced", "features.npy")):
            if arguments[0] == "predict":
                arguments = (*arguments[:2], tmp_path / "features.npy")
            code, shown = call(*arguments, "--adjust-prior", "1")
            assert code == 2 and "is applied twice" in shown.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "ldam"}, "head must be cosine for loss ldam.*; got 'linear'"),
        ({"focal_gamma": 0.2}, "focal_gamma must be 0, or finite and at least 0.5"),
        ({"max_margin": 0.0}, "max_margin must be positive"),
        ({"margin": -1.0}, "margin must be at least 0"),
        ({"penalty": float("nan")}, "penalty must be at least 0"),
        ({"fedlas_strength": 0.7}, r"fedlas_strength must be in \[0, 0.5\]"),
        ({"fedlas_gate": "fixed"}, "fedlas_gate must be one of learned, positive"),
        ({"fedlas_base": "focal"}, "fedlas_base must be one of smoothing, margin"),
        (
            {"reweight_epoch": 3},
            "class_weights must be effective or inverse for reweight_epoch",
        ),
        ({"reweight_epoch": -1, "class_weights": "inverse"}, "reweight_epoch must be at least 0"),
    ],
    ids=str,
)
def test_recipes_refuse_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe().replace(**change)


def test_the_help_names_every_loss():
    names = Recipe.__dataclass_fields__["loss"].metadata["meaning"]
    assert all(name in names for name in OBJECTIVES)
