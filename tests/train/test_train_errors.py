"""Wrong arguments of the public functions of fusedloss.train: each is an error that names the argument."""

import json
import re

import numpy as np
import pytest
import torch

from fusedloss.features import FeatureBank
from fusedloss.train import Predictor, Recipe, fit, split_rows
from fusedloss.train.evaluate import evaluate_run
from fusedloss.train.fit import load_result
from fusedloss.train.predict import Predictions, predict_inputs, write_predictions
from fusedloss.train.report import collect_rows
from fusedloss.train.sweep import sweep

ROWS, WIDTH, CLASSES = 60, 6, 3
LABELS, GROUPS = np.arange(ROWS) % CLASSES, np.arange(ROWS) // 2
QUICK = Recipe(epochs=1, batch_size=32)
NOT_ARRAYS = [None, "abc", b"abc", {"a": 1}, {1, 2}, object()]
COLUMNS = [[[0], [1, 2]], [], 3, np.zeros((ROWS, 2), int), np.zeros(ROWS), np.full(ROWS, np.nan), [True] * ROWS]
PATHS = [3, 2.5, [], b"a", {"a": 1}, "null\0character"]
WORDS = ["abc", None, [], {}, (1, "a"), object()]


def small_bank():
    features = np.random.RandomState(0).randn(ROWS, WIDTH) + LABELS[:, None]
    return FeatureBank.from_arrays(features, LABELS, groups=GROUPS)


@pytest.fixture(scope="module")
def bank():
    return small_bank()


@pytest.fixture(scope="module")
def run(tmp_path_factory, bank):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("errors") / "run"
    fit(bank, QUICK, folder=folder, device="cpu", pictures=False)
    return folder


def cases(**wrong):
    return [
        pytest.param(name, value, id=f"{name}-{number}")
        for name, values in wrong.items()
        for number, value in enumerate(values)
    ]


def refuses(call, name):
    """The call raises what a user can understand: the argument's name, what it must be, and what came."""
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    message = str(caught.value)
    assert re.search(rf"\b{name}\b.* must .*; got ", message, re.S), message
    assert len(message) < 800


@pytest.mark.parametrize(
    ("name", "value"),
    cases(
        bank=[None, "bank", [[0.0]], np.zeros((3, 2))],
        recipe=[None, "ce", {"loss": "ce"}],
        folder=PATHS,
        device=[None, 0, "abacus", "meta", ["cpu"]],
        on_epoch=["print", 3, []],
    ),
)
def test_fit(bank, name, value):
    given = {"bank": bank, "recipe": QUICK, "device": "cpu", name: value}
    refuses(lambda: fit(given.pop("bank"), given.pop("recipe"), **given), name)


@pytest.mark.parametrize(
    ("name", "value"),
    cases(
        labels=[*NOT_ARRAYS, *COLUMNS],
        groups=[value for value in NOT_ARRAYS if value is not None] + [*COLUMNS, GROUPS[1:]],
        test_fraction=[None, "0.2", -0.1, 1.0, float("nan"), [0.2], True],
        val_fraction=[None, "0.2", -0.1, 0.85, float("nan")],
        seed=[None, "1", 1.5, -1, 2**32, float("nan")],
    ),
)
def test_split_rows(name, value):
    given = {"labels": LABELS, "groups": GROUPS, name: value}
    refuses(lambda: split_rows(given.pop("labels"), given.pop("groups"), **given), name)


def test_splits_take_lists_and_names():
    expected = split_rows(LABELS, None, seed=2**32 - 1)
    names = [f"class {label}" for label in LABELS]
    for labels in (LABELS.tolist(), torch.tensor(LABELS), names):
        split = split_rows(labels, None, seed=2**32 - 1)
        assert all(np.array_equal(getattr(split, part), getattr(expected, part)) for part in ("train", "val", "test"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, id=f"{name}-{number}")
        for name, default in Recipe().to_dict().items()
        for number, value in enumerate(
            WORDS[1:] if isinstance(default, str) else [*WORDS, float("nan"), float("inf"), 10**400, -(10**400)]
        )
        # Seeds, widths and numbers of epochs may be as large as anybody likes.
        if not (value == 10**400 and isinstance(default, int | list) and not isinstance(default, bool))
    ],
)
def test_recipes(name, value):
    refuses(lambda: Recipe(**{name: value}), name)
    refuses(lambda: Recipe().replace(**{name: value}), name)


@pytest.mark.parametrize("value", [None, "loss", 3, [("loss", "ce")]])
def test_recipes_from_other_things(tmp_path, value):
    refuses(lambda: Recipe.from_dict(value), "values")
    (tmp_path / "recipe.json").write_text(json.dumps(value))
    refuses(lambda: Recipe.from_file(tmp_path / "recipe.json"), "recipe")
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": value}))
    refuses(lambda: Recipe.from_file(tmp_path / "recipe.json"), "recipe")


@pytest.mark.parametrize("value", [None, *PATHS])
def test_paths(bank, run, value):
    refuses(lambda: Recipe.from_file(value), "path")
    for read in (Predictor.load, load_result, evaluate_run):
        refuses(lambda read=read: read(value), "folder")
    refuses(lambda: predict_inputs(value, "a"), "folder")
    refuses(lambda: predict_inputs(run, value, device="cpu"), "inputs")
    refuses(lambda: sweep(bank, {"a": QUICK}, [0], value), "folder")


@pytest.mark.parametrize(
    "value",
    [
        *NOT_ARRAYS,
        3,
        [],
        np.zeros(WIDTH),
        np.zeros((2, WIDTH + 1)),
        np.zeros((2, 2, WIDTH)),
        np.full((2, WIDTH), np.nan),
        np.full((2, WIDTH), 1e39),
        np.zeros((2, WIDTH), complex),
        [["a"] * WIDTH],
        [[0.0], [1.0, 2.0]],
        torch.zeros(2, WIDTH, dtype=torch.complex64),
        torch.full((2, WIDTH), float("inf")),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_predictions(run, value):
    predictor = Predictor.load(run)
    for method in (predictor.logits, predictor.probabilities, predictor.embeddings):
        refuses(lambda method=method: method(value), "features")


def test_predictions_take_lists_and_any_real_tensor(run):
    predictor, rows = Predictor.load(run), np.arange(2.0 * WIDTH).reshape(2, WIDTH)
    expected = predictor.logits(rows)
    for given in (rows.tolist(), torch.tensor(rows).half(), torch.tensor(rows).long(), rows.astype(np.int16)):
        torch.testing.assert_close(predictor.logits(given), expected)
    assert predictor.embeddings(np.zeros((0, WIDTH))).shape == (0, WIDTH)


@pytest.mark.parametrize(
    ("name", "value"),
    cases(
        recipe=[None, {}],
        transform=[None, torch.nn.Identity()],
        head=[None, torch.nn.Identity()],
        source=[None, "timm:a"],
        train_counts=[[1]],
    ),
)
def test_predictor(run, name, value):
    given = {**vars(Predictor.load(run)), name: value}
    refuses(lambda: Predictor(**given), name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None])
def test_a_prior_that_is_no_number(run, value):
    refuses(lambda: Predictor.load(run).logits(np.zeros((2, WIDTH)), adjust_prior=value), "adjust_prior")


@pytest.mark.parametrize(
    ("name", "value"),
    cases(
        bank=[None, "bank"],
        rows=[None, [], "CE", {}, {"CE": None}, {"a b": QUICK, "a-b": QUICK}],
        seeds=[None, "0", [], [0, 0], [0.5], ["0"], [-1]],
        splits=["0", [], [1, 1], [0.5], ["0"], [-1], [2**32]],
        lr_per=[None, "seed", ["row"]],
    ),
)
def test_sweep(tmp_path, bank, name, value):
    given = {"bank": bank, "rows": {"a": QUICK}, "seeds": [0], "folder": tmp_path, "device": "cpu", name: value}
    refuses(lambda: sweep(**given), name)


@pytest.mark.parametrize(
    ("name", "value"), cases(bank=["bank", 3], rows=[None, "some", ["test"]], device=["abacus", None])
)
def test_evaluate(run, bank, name, value):
    given = {"folder": run, "bank": bank, "device": "cpu", name: value}
    refuses(lambda: evaluate_run(**given), name)


@pytest.mark.parametrize(
    ("name", "value"),
    cases(
        predictions=[None, [["a", 0.5]]],
        abstain_below=[None, "0.5", -0.1, 1.5, float("nan")],
        top=[None, "1", 0, 3, 1.5],
    ),
)
def test_write_predictions(name, value):
    given = {"predictions": Predictions(["x"], ["a", "b"], np.array([[0.25, 0.75]])), name: value}
    refuses(lambda: write_predictions(given.pop("predictions"), **given), name)


@pytest.mark.parametrize("value", ["folder", None, 3])
def test_reports_want_a_list_of_folders(value):
    refuses(lambda: collect_rows(value), "folders")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("head.json", "[]"),
        ("head.json", "{}"),
        ("head.json", '{"recipe": 3}'),
        ("head.json", "{"),
        ("head.safetensors", "x"),
        ("config.json", "[]"),
        ("config.json", '{"bank": {}}'),
        ("result.json", "[]"),
        ("metrics.jsonl", "{"),
    ],
)
def test_damaged_run_folders_are_named(tmp_path, bank, file, content):
    fit(bank, QUICK, folder=tmp_path, device="cpu", pictures=False)
    (tmp_path / file).write_text(content)
    with pytest.raises(OSError, match=file):
        load_result(tmp_path)
        evaluate_run(tmp_path, bank, device="cpu")
