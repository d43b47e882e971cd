"""Judging and predicting in blocks: the numbers of all rows at once, and memory that does not grow with the rows."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fusedloss.calibration import calibration_error
from fusedloss.cli.main import run
from fusedloss.features import FeatureBank
from fusedloss.metrics import classification_report
from fusedloss.train import Predictor, Recipe, fit
from fusedloss.train import predictor as predictor_module
from fusedloss.train.evaluate import evaluate_run
from fusedloss.train.judge import judge
from fusedloss.train.predict import predict_inputs

RECIPE = Recipe(epochs=2, batch_size=32, lr=3e-2)


def bank_of(noise=2.0, rows=400, classes=6, width=8, seed=0):
    random = np.random.RandomState(seed)
    labels = np.arange(rows) % classes
    features = (3 * np.eye(classes, width)[labels] + noise * random.randn(rows, width)).astype(np.float32)
    return FeatureBank.from_arrays(features, labels, groups=np.arange(rows) // 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A bank on disk and a run on it."""
    root = tmp_path_factory.mktemp("streaming")
    bank = bank_of().save(root / "bank")
    fit(bank, RECIPE, folder=root / "run", device="cpu", pictures=False)
    return root


def call(*arguments):
    return run([str(argument) for argument in arguments])


def test_blocks_are_judged_as_all_rows_are(trained, monkeypatch):
    bank, predictor = FeatureBank.open(trained / "bank"), Predictor.load(trained / "run")
    rows = np.random.RandomState(1).permutation(len(bank))[:123]
    logits, labels = predictor.logits(np.asarray(bank.features)[rows]), bank.labels[rows]
    monkeypatch.setattr(predictor_module, "CHUNK_ROWS", 17)
    judged = judge(predictor, bank.features, rows, labels)
    report = classification_report(logits, labels, bank.class_names, train_counts=predictor.train_counts)
    assert judged.report.pop("per_class") == report.pop("per_class")
    assert judged.report == pytest.approx(report, rel=1e-6, nan_ok=True)
    probs = torch.softmax(logits.double(), 1)
    assert np.array_equal(judged.predicted, probs.argmax(1).numpy())
    assert np.array_equal(judged.top_class, probs.topk(5, dim=1).indices.numpy())
    temperature = predictor.calibration["temperature"]
    expected = calibration_error(torch.softmax(logits.double() / temperature, 1), labels)
    assert judged.scaled_ece == pytest.approx(expected, rel=1e-5)


def test_a_temperature_without_an_optimum_is_refused(tmp_path, capsys):
    bank = bank_of(noise=0.05).save(tmp_path / "bank")
    result = fit(bank, RECIPE.replace(epochs=6), folder=tmp_path / "run", device="cpu", pictures=False)
    assert result.predictor.calibration["converged"] is False and np.isnan(result.row["T"])
    with pytest.raises(ValueError, match=r"temperature did not converge: .* the search ended at 0\.01"):
        result.predictor.probabilities(bank.features, calibrated=True)
    for command in (["evaluate", tmp_path / "run"], ["predict", tmp_path / "run", tmp_path / "bank"]):
        assert call(*command, "--calibrated", "--device", "cpu") == 2
        assert "temperature did not converge" in capsys.readouterr().err


def test_evaluate_says_what_was_done_to_the_logits(trained, capsys):
    assert call("evaluate", trained / "run", "--device", "cpu") == 0
    assert "not calibrated, prior not adjusted" in capsys.readouterr().out
    assert call("evaluate", trained / "run", "--calibrated", "--adjust-prior", "0.5", "--device", "cpu") == 0
    temperature = json.loads((trained / "run" / "head.json").read_text())["calibration"]["temperature"]
    assert f"calibrated (T = {temperature:.4g}), prior adjusted by 0.5" in capsys.readouterr().out


def test_a_bank_that_changed_is_not_judged_in_silence(tmp_path, capsys):
    bank_of().save(tmp_path / "bank")
    fit(FeatureBank.open(tmp_path / "bank"), RECIPE, folder=tmp_path / "run", device="cpu", pictures=False)
    (tmp_path / "bank").rename(tmp_path / "before")
    bank_of(seed=1).save(tmp_path / "bank")
    with pytest.raises(ValueError, match=r"bank must be as it was when .* changed since"):
        evaluate_run(tmp_path / "run", device="cpu")
    assert call("evaluate", tmp_path / "run", tmp_path / "bank", "--device", "cpu") == 2
    assert "changed since" in capsys.readouterr().err
    assert call("evaluate", tmp_path / "run", "--rows", "all", "--device", "cpu") == 0
    assert "has changed since the training" in capsys.readouterr().out
    # Another bank is judged whole, as before.
    assert evaluate_run(tmp_path / "run", FeatureBank.open(tmp_path / "before"), device="cpu").rows == "test"
    assert evaluate_run(tmp_path / "run", bank_of(seed=2), device="cpu").rows == "all"


def test_scores_survive_a_retrieval_that_fails(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fusedloss.retrieval._PAIRS_AT_MOST", 10)
    command = ["evaluate", trained / "run", "--retrieval", "--output", tmp_path / "scores.json", "--device", "cpu"]
    assert call(*command) == 2
    shown = capsys.readouterr()
    assert "retrieval was not measured" in shown.err and "at most 10 pairs" in shown.err
    assert "top-1" in shown.out and "top1" in json.loads((tmp_path / "scores.json").read_text())


def test_predict_reads_the_arrays_that_import_reads(trained, tmp_path):
    bank = FeatureBank.open(trained / "bank")
    expected = Predictor.load(trained / "run").probabilities(bank.features).numpy()
    np.savez(tmp_path / "a.npz", features=bank.features, labels=bank.labels, paths=[f"p{i}" for i in range(len(bank))])
    header = [f"f{i}" for i in range(bank.in_features)]
    lines = [",".join(map(repr, row)) for row in np.asarray(bank.features).tolist()]
    (tmp_path / "a.csv").write_text("\n".join([",".join(header), *lines]))
    torch.save(torch.from_numpy(np.array(bank.features)), tmp_path / "a.pt")
    for name in ("a.npz", "a.csv", "a.pt"):
        found = predict_inputs(trained / "run", tmp_path / name, device="cpu")
        assert np.allclose(found.probabilities, expected, atol=1e-6)
        assert found.names[3] == ("p3" if name == "a.npz" else "3")
    whole = np.arange(16).reshape(2, 8)
    np.save(tmp_path / "integers.npy", whole)
    found = predict_inputs(trained / "run", tmp_path / "integers.npy", device="cpu")
    assert np.allclose(found.probabilities, Predictor.load(trained / "run").probabilities(whole).numpy())
    np.savez(tmp_path / "b.npz", x=whole, y=whole)
    with pytest.raises(ValueError, match=r"must hold features, or one array; got x, y"):
        predict_inputs(trained / "run", tmp_path / "b.npz", device="cpu")


def test_a_failing_prediction_leaves_the_old_table(trained, tmp_path, monkeypatch):
    (tmp_path / "out.csv").write_text("before")
    features = np.zeros((40, 8), np.float32)
    features[33] = np.nan
    np.save(tmp_path / "x.npy", features)
    monkeypatch.setattr(predictor_module, "CHUNK_ROWS", 10)
    assert call("predict", trained / "run", tmp_path / "x.npy", "-o", tmp_path / "out.csv", "--device", "cpu") == 2
    assert (tmp_path / "out.csv").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "x.npy"]


SCRIPT = """
import resource, sys
from fusedloss.cli.main import run
assert run(["predict", sys.argv[1], sys.argv[2], "-o", sys.argv[3], "--device", "cpu"]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_predictions_take_no_memory_of_all_rows(tmp_path):
    random = np.random.RandomState(0)
    bank = FeatureBank.from_arrays(random.randn(1600, 8).astype(np.float32), np.arange(1600) % 800)
    fit(bank, Recipe(epochs=1), folder=tmp_path / "run", device="cpu", pictures=False)
    peaks = []
    for rows in (8192, 32768):
        np.save(tmp_path / f"{rows}.npy", random.randn(rows, 8).astype(np.float32))
        command = [sys.executable, "-c", SCRIPT, tmp_path / "run", tmp_path / f"{rows}.npy", tmp_path / "out.csv"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.splitlines()[-1]))
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 32769
    # KiB; the probabilities of the further rows alone are 79000.
    assert peaks[1] - peaks[0] < 45000
