import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fusedloss.atomic_io import StorageError
from fusedloss.features import FeatureBank, FeatureSource
from fusedloss.train import Predictor, Recipe, fit, split_rows
from fusedloss.train.data import TrainingData
from fusedloss.train.evaluate import evaluate_run
from fusedloss.train.fit import load_result
from fusedloss.train.heads import HEADS, Head, build_head, build_transform, head
from fusedloss.train.objectives import OBJECTIVES, Objective, build_objective, objective
from fusedloss.train.run_folder import RunFolder
from fusedloss.train.step import gradient_step, schedule


def long_tailed_bank(classes=8, width=12, seed=0, **options):
    """Gaussian classes of 120, 84, ... samples in groups of two."""
    random = np.random.RandomState(seed)
    counts = (120 * 0.7 ** np.arange(classes)).astype(int) + 4
    labels = np.repeat(np.arange(classes), counts)
    centers = random.randn(classes, width) * 2
    features = (centers[labels] + random.randn(len(labels), width) * (1 + labels[:, None] / classes)).astype(np.float32)
    return FeatureBank.from_arrays(features, labels, groups=np.arange(len(labels)) // 2, **options)


@pytest.fixture(scope="module")
def bank():
    return long_tailed_bank()


QUICK = Recipe(epochs=4, batch_size=32, lr=5e-2)


def weights(result):
    return {name: tensor.clone() for name, tensor in result.predictor.head.state_dict().items()}


def same_bits(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"head": "cosine"},
        {"head": "mlp", "hidden": (16,)},
        {"loss": "vace"},
        {"loss": "vace", "uniform": True},
        {"class_weights": "effective"},
        {"class_weights": "inverse"},
        {"label_smoothing": 0.1},
        {"prior_strength": 1.0},
        {
            "loss": "vace",
            "head": "mlp",
            "hidden": (8, 8),
            "class_weights": "effective",
            "label_smoothing": 0.1,
        },
        {"normalize": True},
        {"standardize": False},
        {"keep": "best"},
        {"val_fraction": 0.0},
    ],
    ids=str,
)
def test_every_recipe_learns_and_repeats_to_the_bit(bank, settings):
    recipe = QUICK.replace(**settings)
    result = fit(bank, recipe, device="cpu")
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert result.report["top1"] > 0.4
    assert same_bits(weights(result), weights(fit(bank, recipe, device="cpu")))


def test_seeds_differ_and_the_global_generator_is_left_alone(bank):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = fit(bank, QUICK.replace(head="mlp", hidden=(8,)), device="cpu")
    assert torch.equal(before, torch.get_rng_state())
    assert not same_bits(
        weights(first), weights(fit(bank, QUICK.replace(head="mlp", hidden=(8,), seed=1), device="cpu"))
    )


def test_a_linear_head_follows_a_plain_loop(bank):
    """The same steps with a DataLoader-free textbook loop: torch's cross-entropy and an unfused AdamW."""
    recipe = QUICK.replace(standardize=False, val_fraction=0.0, warmup=0.0, epochs=2)
    result = fit(bank, recipe, device="cpu")
    rows = split_rows(bank.labels, bank.groups, val_fraction=0.0).train
    features, labels = torch.from_numpy(bank.features[rows]), torch.from_numpy(bank.labels[rows])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        head = torch.nn.Linear(bank.in_features, bank.num_classes)
    groups = [{"params": [head.weight]}, {"params": [head.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr[0], weight_decay=recipe.weight_decay)
    order = torch.Generator().manual_seed(recipe.seed)
    steps, total = 0, recipe.epochs * math.ceil(len(rows) / recipe.batch_size)
    for _ in range(recipe.epochs):
        for batch in torch.randperm(len(rows), generator=order).split(recipe.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr[0] * 0.5 * (1 + math.cos(math.pi * steps / total))
            optimizer.zero_grad()
            F.cross_entropy(head(features[batch]), labels[batch]).backward()
            optimizer.step()
            steps += 1
    torch.testing.assert_close(result.predictor.head.state_dict(), dict(head.state_dict()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", ["ce", "vace"])
def test_buffered_gradients_are_autograds(bank, loss):
    recipe = QUICK.replace(loss=loss, class_weights="effective", prior_strength=0.5)
    features, labels = torch.from_numpy(bank.features[:100]), torch.from_numpy(bank.labels[:100])
    data = TrainingData(features, labels, torch.bincount(labels, minlength=bank.num_classes))
    head, built = build_head(recipe, bank.in_features, bank.num_classes), build_objective(recipe, data)
    step = gradient_step(head, built, 64)
    for start in (0, 64):
        x, y = features[start : start + 64], labels[start : start + 64]
        expected = torch.autograd.grad(built.loss(head(x), y), list(head.parameters()))
        value = step(x, y)
        torch.testing.assert_close(value, built.loss(head(x), y).detach())
        torch.testing.assert_close([p.grad for p in head.parameters()], list(expected))


def test_the_schedule_rises_then_falls_to_zero():
    factors = [schedule(step, 100, 0.1) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == factors[9] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True) and factors[100] == pytest.approx(0)
    assert schedule(0, 1, 1.0) == 1.0


def test_the_learning_rate_is_chosen_on_validation_rows(bank):
    recipe = QUICK.replace(lr=(1e-6, 1e-2), epochs=3)
    result = fit(bank, recipe, device="cpu")
    assert result.lr == 1e-2 and [trial["lr"] for trial in result.trials] == [1e-6, 1e-2]
    alone = fit(bank, recipe.replace(lr=1e-2), device="cpu")
    assert same_bits(weights(result), weights(alone))


def test_test_labels_take_no_part_in_the_choice(bank):
    recipe = QUICK.replace(lr=(1e-3, 1e-2), epochs=2)
    rows = split_rows(bank.labels, bank.groups).test
    scrambled = bank.labels.copy()
    scrambled[rows] = np.random.RandomState(3).permutation(scrambled[rows])
    other = FeatureBank.from_arrays(bank.features, scrambled, groups=bank.groups)
    first, second = fit(bank, recipe, device="cpu"), fit(other, recipe, device="cpu")
    assert first.trials == second.trials and same_bits(weights(first), weights(second))


def test_a_diverging_rate_loses_and_alone_is_an_error(bank):
    bad = FeatureBank.from_arrays(bank.features * 1e3, bank.labels, groups=bank.groups)
    recipe = QUICK.replace(standardize=False, lr=(1e-2, 1e38), epochs=2)
    result = fit(bad, recipe, device="cpu")
    assert result.lr == 1e-2 and [trial["diverged"] for trial in result.trials] == [False, True]
    with pytest.raises(ValueError, match=r"lr must be lower for this bank; got a loss that is not finite at lr 1e\+38"):
        fit(bad, recipe.replace(lr=1e38), device="cpu")


def test_the_best_epoch_is_kept_when_asked(bank):
    result = fit(bank, QUICK.replace(keep="best", epochs=6, lr=0.3), device="cpu")
    scores = [row["val_macro_f1_fg"] for row in result.history]
    assert result.predictor.epoch == 1 + scores.index(max(scores))


def test_splits_keep_groups_together_and_repeat():
    labels, groups = np.arange(200) % 4, np.arange(200) // 3
    split = split_rows(labels, groups, seed=5)
    parts = [split.train, split.val, split.test]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(200))
    sides = [set(groups[part]) for part in parts]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert len(sides[2]) == pytest.approx(0.2 * 67, abs=1) and len(sides[1]) == pytest.approx(0.1 * 67, abs=1)
    again = split_rows(labels, groups, seed=5, val_fraction=0.3)
    assert np.array_equal(again.test, split.test)
    assert not np.array_equal(split_rows(labels, groups, seed=6).test, split.test)


def test_without_groups_every_class_stays_in_training():
    labels = np.repeat([0, 1, 2], [100, 5, 1])
    for seed in range(20):
        split = split_rows(labels, None, seed=seed)
        assert set(labels[split.train]) == {0, 1, 2}
        assert 19 <= (labels[split.test] == 0).sum() <= 21
        assert len(np.unique(np.concatenate([split.train, split.val, split.test]))) == 106


def test_one_group_cannot_be_split():
    with pytest.raises(ValueError, match="groups must number at least one for each part"):
        split_rows(np.zeros(5, int), np.zeros(5, int))


def test_classes_without_training_rows_are_named_and_survive(bank):
    groups = bank.groups.copy()
    split = split_rows(bank.labels, groups)
    labels = bank.labels.copy()
    labels[split.test[:6]], labels[split.train[labels[split.train] == 7]] = 7, 6
    labels[split.val[labels[split.val] == 7]] = 6
    other = FeatureBank.from_arrays(bank.features, labels, groups=groups, class_names=list("abcdefgh"))
    for settings in (
        {"class_weights": "effective"},
        {"loss": "vace", "class_weights": "inverse"},
        {"prior_strength": 1.0, "label_smoothing": 0.1},
    ):
        with pytest.warns(UserWarning, match="1 of 8 classes have no sample in the training split .*: h"):
            result = fit(other, QUICK.replace(**settings), device="cpu")
        assert result.predictor.train_counts[7] == 0 and math.isfinite(result.history[-1]["loss"])
        assert all(torch.isfinite(tensor).all() for tensor in weights(result).values())


def test_a_bank_with_nan_rows_is_refused():
    features = np.zeros((6, 2), np.float32)
    features[4, 1] = np.nan
    with pytest.raises(ValueError, match="row 4"):
        fit(FeatureBank.from_arrays(features, np.arange(6) % 2), QUICK)


def test_standardisation_is_exact_far_from_zero_and_for_constant_features():
    values = np.random.RandomState(0).randn(500, 3).astype(np.float32)
    values[:, 1], values[:, 2] = values[:, 1] + 4096, 0.1
    transform = build_transform(Recipe(), 3)
    transform.standardize_by(torch.from_numpy(values))
    prepared = transform(torch.from_numpy(values)).double()
    assert prepared[:, :2].mean(0).abs().max() < 1e-3 and (prepared[:, :2].std(0) - 1).abs().max() < 2e-2
    assert prepared[:, 2].abs().max() < 1e-6


def test_the_uniform_control_has_one_temperature_the_mean_of_vaces(bank):
    recipe = QUICK.replace(loss="vace")
    per_class = fit(bank, recipe, device="cpu").predictor.temperature
    uniform = fit(bank, recipe.replace(uniform=True), device="cpu").predictor.temperature
    assert per_class.std() > 0.01
    torch.testing.assert_close(uniform, torch.full_like(uniform, float(per_class.mean())))


def test_a_loss_is_added_in_one_place(bank):
    @objective("squared")
    def squared(recipe, data):
        class Squared(torch.nn.Module):
            def forward(self, logits, labels):
                return (logits - F.one_hot(labels, len(data.counts))).square().mean()

        return Objective(Squared())

    try:
        assert fit(bank, QUICK.replace(loss="squared"), device="cpu").report["top1"] > 0.4
    finally:
        del OBJECTIVES["squared"]


def test_a_head_is_added_in_one_place(bank, tmp_path):
    @head("scaled")
    class ScaledHead(Head):
        """Logits of doubled features, which are all that the last layer reads."""

        def __init__(self, in_features, num_classes):
            super().__init__()
            self.last = torch.nn.Linear(in_features, num_classes, bias=False)

        @classmethod
        def build(cls, settings, in_features, num_classes):
            return cls(in_features, num_classes)

        @property
        def class_weight(self):
            return self.last.weight

        def hidden(self, features):
            return 2 * features

        def classify(self, hidden):
            return self.last(hidden)

    try:
        result = fit(bank, QUICK.replace(head="scaled", loss="fedlas"), folder=tmp_path / "run", device="cpu")
        loaded = Predictor.load(tmp_path / "run")
        assert result.report["top1"] > 0.4 and isinstance(loaded.head, ScaledHead)
        assert torch.equal(loaded.logits(bank.features), result.predictor.logits(bank.features))
        rows = loaded.transform(torch.from_numpy(bank.features))
        torch.testing.assert_close(loaded.embeddings(bank.features), 2 * rows)
    finally:
        del HEADS["scaled"]
    with pytest.raises(ValueError, match="head must be one of linear, cosine, mlp; got 'scaled'"):
        QUICK.replace(head="scaled")


def test_embeddings_are_what_the_last_layer_reads(bank):
    for settings in ({}, {"head": "cosine"}, {"head": "mlp", "hidden": (5,)}):
        predictor = fit(bank, QUICK.replace(epochs=1, **settings), device="cpu").predictor
        embeddings = predictor.embeddings(bank.features)
        assert embeddings.shape == (len(bank), predictor.head.class_weight.shape[1])
        assert torch.equal(predictor.head.classify(embeddings), predictor.logits(bank.features))
        assert predictor.embeddings(bank.features[:0]).shape == (0, embeddings.shape[1])


def test_a_run_folder_holds_everything_and_predicts_alone(bank, tmp_path):
    source = FeatureSource(backbone="timm:some_net", pooling="pre_logits")
    named = long_tailed_bank(class_names=[f"c{k}" for k in range(8)], source=source)
    recipe = QUICK.replace(loss="vace", prior_strength=0.5)
    result = fit(named, recipe, folder=tmp_path / "run", device="cpu")
    expected = {
        "config.json",
        "metrics.jsonl",
        "checkpoint.json",
        "checkpoint-00004.safetensors",
        "head.json",
        "head.safetensors",
        "predictions.npz",
        "result.json",
        "training_curves.png",
        "reliability.png",
        "recall_by_frequency.png",
    }
    assert {path.name for path in (tmp_path / "run").iterdir()} == expected
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4] and lines == result.history
    predictor = Predictor.load(tmp_path / "run")
    assert predictor.source == source and predictor.class_names == list(named.class_names)
    assert predictor.prior == {"applied": "training", "strength": 0.5}
    assert json.loads((tmp_path / "run" / "head.json").read_text())["prior"] == predictor.prior
    assert torch.equal(predictor.logits(named.features), result.predictor.logits(named.features))
    with np.load(tmp_path / "run" / "predictions.npz") as archive:
        stored = dict(archive)
    probs = predictor.probabilities(named.features[stored["row"]])
    assert np.array_equal(stored["predicted"], probs.argmax(1).numpy())
    np.testing.assert_allclose(stored["top_probability"][:, 0], probs.max(1).values.numpy(), rtol=1e-5)
    assert np.array_equal(stored["label"], named.labels[stored["row"]])
    # Without groups each row is its own.
    groups = stored["row"] if named.groups is None else named.groups[stored["row"]]
    assert np.array_equal(stored["group"], groups)
    assert stored["label_nll"].mean() == pytest.approx(result.report["nll"], rel=1e-5)
    found = RunFolder(tmp_path / "run").predictions().values
    assert found == pytest.approx({name: result.row[name] for name in found}, rel=1e-5, nan_ok=True)


def test_the_calibrated_probabilities_keep_the_prediction(bank, tmp_path):
    # So noisy that validation rows are mistaken: a temperature has an optimum.
    noisy = FeatureBank.from_arrays(
        bank.features + 4 * np.random.RandomState(1).randn(*bank.features.shape), bank.labels, groups=bank.groups
    )
    result = fit(noisy, QUICK, device="cpu")
    plain, scaled = (result.predictor.probabilities(bank.features, calibrated=c) for c in (False, True))
    assert torch.equal(plain.argmax(1), scaled.argmax(1)) and not torch.allclose(plain, scaled)
    without = fit(bank, QUICK.replace(val_fraction=0.0), device="cpu").predictor
    with pytest.raises(ValueError, match="without validation rows"):
        without.probabilities(bank.features, calibrated=True)


def test_evaluating_a_run_repeats_its_report(tmp_path):
    bank = long_tailed_bank().save(tmp_path / "bank")
    result = fit(bank, QUICK, folder=tmp_path / "run", device="cpu", pictures=False)
    found = evaluate_run(tmp_path / "run", device="cpu")
    assert found.rows == "test" and found.report["top1"] == result.report["top1"]
    assert found.report["nll"] == pytest.approx(result.report["nll"], rel=1e-5)
    other = long_tailed_bank(seed=1)
    assert evaluate_run(tmp_path / "run", other, device="cpu").rows == "all"
    with pytest.raises(ValueError, match="rows must be all or auto"):
        evaluate_run(tmp_path / "run", other, rows="test")
    with pytest.raises(ValueError, match=r"features of width 12.*got width 5"):
        evaluate_run(tmp_path / "run", long_tailed_bank(width=5))
    with pytest.raises(ValueError, match="the 8 classes of the head; got 9"):
        evaluate_run(tmp_path / "run", long_tailed_bank(classes=9))
    with pytest.raises(ValueError, match="backbone is 'timm:x'"):
        evaluate_run(tmp_path / "run", long_tailed_bank(source=FeatureSource(backbone="timm:x")))


def test_a_folder_is_never_mixed_up(bank, tmp_path):
    folder = tmp_path / "run"
    result = fit(bank, QUICK, folder=folder, device="cpu", pictures=False)
    with pytest.raises(StorageError, match="folder must be new, or its run resumed"):
        fit(bank, QUICK, folder=folder)
    with pytest.raises(StorageError, match=r"of the same recipe; got .*, where seed was 0 and is now 1"):
        fit(bank, QUICK.replace(seed=1), folder=folder, resume=True)
    with pytest.raises(StorageError, match="another bank"):
        fit(long_tailed_bank(seed=1), QUICK, folder=folder, resume=True)
    again = fit(bank, QUICK, folder=folder, resume=True)
    assert same_bits(weights(again), weights(result)) and again.history == result.history
    assert again.row == pytest.approx(result.row, nan_ok=True)
    for stored, row in zip(load_result(folder).report["per_class"], result.report["per_class"], strict=True):
        assert stored == pytest.approx(row, nan_ok=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="folder must be a run folder, new or empty"):
        fit(bank, QUICK, folder=tmp_path / "other")


@pytest.mark.parametrize(("change", "message"), [
    ({"epoch": 3}, "known settings; got 'epoch' .did you mean 'epochs'"),
    ({"head": "conv"}, "head must be one of linear, cosine, mlp; got 'conv'"),
    ({"epochs": 0}, "epochs must be at least 1"),
    ({"epochs": 1.5}, "epochs must be int"),
    ({"epochs": True}, "epochs must be int"),
    ({"lr": []}, "lr must be positive"),
    ({"lr": float("nan")}, "lr must be positive and finite"),
    ({"beta": 1.0}, r"beta must be in \[0, 1\)"),
    ({"label_smoothing": 1.1}, "label_smoothing must be in"),
    ({"tau_min": 3.0}, "tau_min must be at most tau_max, 2.0; got 3.0"),
    ({"test_fraction": 0.95}, "must be below 1, to leave rows to train on; got 0.95"),
    ({"val_fraction": 0.0, "lr": (1e-3, 1e-2)}, "val_fraction must be above 0"),
    ({"val_fraction": 0.0, "keep": "best"}, "val_fraction must be above 0"),
    ({"dropout": "much"}, "dropout must be float; got 'much'"),
], ids=str)  # fmt: skip
def test_recipes_refuse_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe().replace(**change)


def test_an_unknown_loss_is_refused(bank):
    with pytest.raises(ValueError, match=r"loss must be one of ce, .*vace.*; got 'hinge'"):
        fit(bank, QUICK.replace(loss="hinge"))


def test_recipes_are_json(tmp_path):
    recipe = Recipe(head="mlp", hidden=(3, 4), lr=(1e-3, 2e-3))
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.to_dict()))
    assert Recipe.from_file(path) == recipe
    path.write_text("{nope")
    with pytest.raises(ValueError, match="is not JSON"):
        Recipe.from_file(path)
    with pytest.raises(ValueError, match="cannot be read"):
        Recipe.from_file(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((3, 5), np.float32), r"must be \(N, 12\)"),
        (np.full((3, 12), np.nan, np.float32), r"rows \[0, 1, 2\]"),
    ],
)
def test_prediction_refuses_other_features(bank, features, message):
    predictor = fit(bank, QUICK.replace(epochs=1), device="cpu").predictor
    with pytest.raises(ValueError, match=message):
        predictor.probabilities(features)


def test_an_empty_set_of_inputs_gives_an_empty_answer(bank):
    predictor = fit(bank, QUICK.replace(epochs=1), device="cpu").predictor
    assert predictor.probabilities(np.empty((0, 12), np.float32)).shape == (0, 8)


def test_a_test_share_of_zero_reports_nothing(bank, tmp_path):
    result = fit(bank, QUICK.replace(test_fraction=0.0), folder=tmp_path / "run", device="cpu")
    assert result.report["n"] == 0 and math.isnan(result.row["top1"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_run_repeats_and_matches_the_cpu(bank):
    recipe = QUICK.replace(loss="vace")
    first, second = fit(bank, recipe, device="cuda"), fit(bank, recipe, device="cuda")
    assert same_bits(weights(first), weights(second))
    assert first.report["top1"] == pytest.approx(fit(bank, recipe, device="cpu").report["top1"], abs=0.05)
