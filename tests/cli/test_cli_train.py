"""The training commands as a user types them, in this process."""

import csv
import json

import numpy as np
import pytest

from fusedloss.cli.main import run
from fusedloss.features import FeatureBank
from fusedloss.train import Predictor, Recipe, fit
from fusedloss.train.report import collect_rows, difference

QUICK = ["--epochs", "2", "--batch-size", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bank, and a run on it."""
    root = tmp_path_factory.mktemp("cli")
    random = np.random.RandomState(0)
    labels = np.repeat(np.arange(5), [80, 60, 40, 30, 15])
    features = random.randn(225, 8) + 2 * np.eye(5, 8)[labels]
    names = ["ash", "birch", "cedar", "elm", "fir"]
    bank = FeatureBank.from_arrays(features, labels, groups=np.arange(225) // 3, class_names=names)
    bank.save(root / "bank")
    assert call("train", root / "bank", root / "run", *QUICK, "--lr", "1e-2,3e-2") == 0
    return root


def call(*arguments):
    return run([str(argument) for argument in arguments])


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "sweep", "report"])
def test_help_has_examples(command, capsys):
    assert call(command, "--help") == 0
    shown = capsys.readouterr().out
    assert f"fusedloss {command} " in shown.split("Examples:")[1]


def test_every_setting_has_an_option_with_help_and_default(capsys):
    call("train", "--help")
    shown = " ".join(capsys.readouterr().out.split())
    for name, value in Recipe().to_dict().items():
        text = ",".join(map(str, value)) if isinstance(value, list) else value
        flag = "--" + name.replace("_", "-")
        assert flag in shown and f"[default: {text}]" in shown.split(flag, 1)[1]


def test_train_prints_scores_and_the_chosen_rate(folder, tmp_path, capsys):
    assert (
        call(
            "train",
            folder / "bank",
            tmp_path / "run",
            *QUICK,
            "--lr",
            "1e-2,3e-2",
            "--loss",
            "vace",
            "--uniform",
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "chosen by validation macro_f1_fg" in shown and "balanced accuracy" in shown
    assert f"picture: {tmp_path / 'run' / 'reliability.png'}" in shown
    assert json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]["uniform"] is True


def test_a_config_is_a_recipe_that_options_override(folder, tmp_path):
    options = [
        "--recipe",
        folder / "run" / "config.json",
        "--seed",
        "3",
        "--device",
        "cpu",
        "-q",
        "--no-pictures",
    ]
    assert call("train", folder / "bank", tmp_path / "run", *options) == 0
    recipe = Predictor.load(tmp_path / "run").recipe
    assert recipe == Predictor.load(folder / "run").recipe.replace(seed=3)


def test_train_resumes_overwrites_and_refuses(folder, tmp_path, capsys):
    target = [folder / "bank", tmp_path / "run", *QUICK, "-q", "--no-pictures"]
    assert call("train", *target, "--resume") == 0
    assert call("train", *target) == 2
    assert "folder must be new, or its run resumed" in capsys.readouterr().err
    assert call("train", *target, "--resume", "--seed", "1") == 2
    assert "seed was 0 and is now 1" in capsys.readouterr().err
    assert call("train", *target, "--overwrite", "--seed", "1") == 0
    assert Predictor.load(tmp_path / "run").recipe.seed == 1


@pytest.mark.parametrize(("arguments", "message"), [
    (["train", "{root}/nowhere", "{tmp}/r"], "path must be a feature bank, a folder"),
    (["train", "{root}/bank", "{tmp}/r", "--loss", "hinge"], "loss must be one of ce, "),
    (["train", "{root}/bank", "{tmp}/r", "--lr", "fast"], "lr must be float; got 'fast'"),
    (["train", "{root}/bank", "{tmp}/r", "--device", "tpu9"], "device must be"),
    (["train", "{root}/bank", "{root}/bank"], "folder must be a run folder, new or empty"),
    (["train", "{root}/bank", "{root}/bank", "--overwrite"], "folder must be a run folder; got"),
    (["evaluate", "{root}/bank"], "folder must hold a trained head"),
    (["evaluate", "{root}/run", "--rows", "some"], "rows must be one of"),
    (["predict", "{root}/run", "{root}/bank", "--abstain-below", "1.5"], "abstain_below must be in [0, 1]; got 1.5"),
    (["predict", "{root}/run", "{root}/bank", "--top", "9"], "top must be in [1, 6); got 9"),
    (["predict", "{root}/run", "{root}/missing.csv"], "does not exist"),
    (["sweep", "{root}/bank", "{tmp}/s", "--row", "CE"], "row must be 'NAME: setting=value ...'; got 'CE'"),
    (["sweep", "{root}/bank", "{tmp}/s", "--row", "A: losss=ce"], "got 'losss' (did you mean 'loss'?)"),
    (["sweep", "{root}/bank", "{tmp}/s", "--grid", "loss"], "grid must be"),
    (["sweep", "{root}/bank", "{tmp}/s", "--seeds", "a"], "seeds must be whole numbers"),
    (["sweep", "{root}/bank", "{tmp}/s", "--seeds", "0,0"], "seeds must differ"),
    (["report", "{tmp}"], "folders must hold finished runs; got none"),
    (["report", "{root}/run", "--metrics", "top9"], "metrics must be among"),
    (["report", "{root}/run", "--baseline", "B"], "baseline must be one of run; got 'B'"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_mistakes_are_one_clear_line(folder, tmp_path, capsys, arguments, message):
    assert call(*(text.format(root=folder, tmp=tmp_path) for text in arguments)) == 2
    shown = capsys.readouterr().err
    assert message in shown and len(shown.strip().splitlines()) == 1


def test_images_for_a_head_on_brought_features_are_refused(folder, tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert call("predict", folder / "run", tmp_path / "a.png") == 2
    assert "no backbone is known" in capsys.readouterr().err


def test_evaluate_retrieval(folder, tmp_path, capsys):
    assert call("evaluate", folder / "run", "--retrieval", "--output", tmp_path / "scores.json") == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "scores.json").read_text())["retrieval"]
    assert 0 <= found["map_at_r"] <= found["recall_at_1"] + 1e-9 <= 1 + 1e-9
    assert f"{found['recall_at_1']:.4f}" in shown


def test_evaluate_writes_the_scores(folder, tmp_path, capsys):
    assert call("evaluate", folder / "run", "--output", tmp_path / "scores.json", "--calibrated") == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert f"{scores['n']} rows (test)" in capsys.readouterr().out
    assert scores["per_class"][4]["name"] == "fir"
    stored = json.loads((folder / "run" / "result.json").read_text())
    assert scores["top1"] == stored["report"]["top1"]
    assert scores["ece15"] == pytest.approx(stored["row"]["ece15_ts"])


def test_predict_writes_a_table_with_abstentions(folder, tmp_path, capsys):
    bank = FeatureBank.open(folder / "bank")
    np.save(tmp_path / "new.npy", bank.features[:50])
    options = ["--abstain-below", "0.6", "--top", "2", "--output", tmp_path / "out.csv"]
    assert call("predict", folder / "run", tmp_path / "new.npy", *options) == 0
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    probs = Predictor.load(folder / "run").probabilities(bank.features[:50])
    best = probs.max(1)
    assert [float(row["probability"]) for row in rows] == pytest.approx(best.values.tolist(), abs=1e-6)
    names = [bank.class_names[k] if p >= 0.6 else "" for k, p in zip(best.indices, best.values, strict=True)]
    assert [row["class"] for row in rows] == names and "" in names
    assert all((row["abstained"] == "true") == (row["class"] == "") for row in rows)
    assert set(rows[0]) == {"input", "class", "probability", "abstained", "class_2", "probability_2"}
    capsys.readouterr()
    assert call("predict", folder / "run", folder / "bank") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(bank)


def test_a_sweep_prints_one_table_and_goes_on_where_it_stopped(folder, tmp_path, capsys):
    arguments = [
        "sweep",
        folder / "bank",
        tmp_path / "s",
        *QUICK,
        "--lr",
        "1e-2,3e-2",
        "-q",
        "--row",
        "CE:",
        "--row",
        "VACE: loss=vace strength=0.3",
        "--row",
        "again: seed=5",
    ]
    assert call(*arguments) == 0
    first = capsys.readouterr().out
    assert "difference to CE" in first and "VACE against CE:" in first
    assert "Tested on one split" in first
    assert (tmp_path / "s" / "table.md").exists()
    lines = list(csv.DictReader((tmp_path / "s" / "table.csv").read_text().splitlines()))
    assert len(lines) == 9 and {line["row"] for line in lines} == {"CE", "VACE", "again"}
    for row in ("CE", "VACE"):
        assert len({line["lr"] for line in lines if line["row"] == row}) == 1
    written = (tmp_path / "s" / "VACE" / "seed-1" / "result.json").stat().st_mtime_ns
    (tmp_path / "s" / "VACE" / "seed-2" / "result.json").unlink()
    assert call(*arguments) == 0
    assert (tmp_path / "s" / "VACE" / "seed-1" / "result.json").stat().st_mtime_ns == written
    assert capsys.readouterr().out == first


def test_a_grid_names_its_rows(folder, tmp_path, capsys):
    arguments = [
        "sweep",
        folder / "bank",
        tmp_path / "s",
        *QUICK,
        "-q",
        "--seeds",
        "0",
        "--loss",
        "vace",
        "--grid",
        "strength=0,0.5",
        "--grid",
        "uniform=true,false",
        "--baseline",
        "strength=0.0 uniform=True",
    ]
    assert call(*arguments) == 0
    shown = capsys.readouterr().out
    assert "strength=0.5-uniform=False" in shown and "too little to judge top-1" in shown
    assert "needs 3 seeds (has 1) or 3 splits." in shown


def test_identical_rows_differ_by_nothing(folder, tmp_path, capsys):
    bank = FeatureBank.open(folder / "bank")
    for name in ("a", "b"):
        for seed in (0, 1, 2):
            strength = 0.0 if name == "a" else 0.5  # plays no part in CE
            recipe = Recipe(epochs=1, batch_size=64, seed=seed, strength=strength)
            fit(bank, recipe, folder=tmp_path / name / f"seed-{seed}", device="cpu", pictures=False)
    rows = collect_rows([tmp_path])
    assert [row.name for row in rows] == ["a", "b"]
    found = difference(rows[1], rows[0], "top1")
    assert (found.comparison.mean, found.comparison.p, found.comparison.pairs, found.verdict) == (0.0, 1.0, 3, "=")
    assert call("report", tmp_path, "--baseline", "b", "--metrics", "top1,nll", "--output", tmp_path / "out") == 0
    assert "a against b: not told apart in top-1, nll." in capsys.readouterr().out


def test_runs_without_groups_are_still_reported(folder, tmp_path, capsys):
    bank = FeatureBank.open(folder / "bank")
    for name, lr in (("a", 1e-2), ("b", 3e-2)):
        for seed in range(3):
            place = tmp_path / name / f"seed-{seed}"
            fit(bank, Recipe(epochs=1, seed=seed, lr=lr), folder=place, device="cpu", pictures=False)
            with np.load(place / "predictions.npz") as archive:
                older = {key: archive[key] for key in archive if key not in ("group", "label_nll")}
            if name == "b":
                np.savez(place / "predictions.npz", **older)
    assert call("report", tmp_path, "--metrics", "top1,nll", "--output", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "b against a: too little to judge top-1, nll." in shown
    assert "holds no groups of its rows (written by an older version)" in shown
    lines = list(csv.DictReader((tmp_path / "out" / "differences.csv").read_text().splitlines()))
    assert [line["verdict"] for line in lines] == ["?", "?"] and "older version" in lines[0]["needed"]
    (tmp_path / "b" / "seed-0" / "predictions.npz").write_bytes(b"PK")
    assert call("report", tmp_path, "--metrics", "top1") == 0
    assert "predictions.npz cannot be read" in capsys.readouterr().out


def test_splits_of_a_sweep_are_pooled(folder, tmp_path, capsys):
    rows = ["--row", "CE:", "--row", "focal: loss=focal", "--seeds", "0,1", "--splits", "1,2,3"]
    assert call("sweep", folder / "bank", tmp_path / "s", *QUICK, "-q", *rows) == 0
    shown = capsys.readouterr().out
    assert "Tested over 3 splits" in shown and "cells of the table" in shown
    lines = list(csv.DictReader((tmp_path / "s" / "table.csv").read_text().splitlines()))
    assert [(line["split_seed"], line["seed"]) for line in lines[:6]] == [(p, s) for p in "123" for s in "01"]
    assert sorted(path.name for path in (tmp_path / "s" / "CE").iterdir()) == [
        f"split-{p}-seed-{s}" for p in "123" for s in "01"
    ]
    assert call("report", tmp_path / "s", "--family", "row") == 0
    assert "cells of its row" in capsys.readouterr().out
    assert call("sweep", folder / "bank", tmp_path / "t", *QUICK, "-q", "--splits", "1,1") == 2
    assert "splits must differ and be at least one; got [1, 1]" in capsys.readouterr().err
    assert call("sweep", folder / "bank", tmp_path / "t", *QUICK, "-q", "--splits", "a") == 2
    assert "splits must be whole numbers separated by commas; got 'a'" in capsys.readouterr().err
    assert call("report", tmp_path / "s", "--family", "cell") == 2
    assert "family must be one of table, row; got 'cell'" in capsys.readouterr().err


def test_runs_on_other_data_are_not_compared(folder, tmp_path):
    random = np.random.RandomState(1)
    other = FeatureBank.from_arrays(random.randn(60, 8), np.arange(60) % 3)
    fit(other, Recipe(epochs=1), folder=tmp_path / "run", device="cpu", pictures=False)
    with pytest.raises(OSError, match="another bank or share"):
        collect_rows([folder / "run", tmp_path / "run"])


def test_bench_says_where_the_benchmarks_are(monkeypatch, capsys):
    monkeypatch.setattr("fusedloss.cli.bench.importlib.util.find_spec", lambda name: None)
    assert call("bench", "--quick") == 2
    assert "part of the repository" in capsys.readouterr().err
