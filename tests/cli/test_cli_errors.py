"""Wrong values on the command line: one line that names the option or the setting, status 2, and no traceback."""

import re

import numpy as np
import pytest

from fusedloss.cli.main import run
from fusedloss.cli.sweep import parse_rows
from fusedloss.features import FeatureBank
from fusedloss.train import Recipe, fit

ROWS, WIDTH = 60, 6


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A bank, a run on it, and files of other kinds."""
    folder = tmp_path_factory.mktemp("cli_errors")
    labels = np.arange(ROWS) % 3
    features = np.random.RandomState(0).randn(ROWS, WIDTH) + labels[:, None]
    bank = FeatureBank.from_arrays(features, labels, groups=np.arange(ROWS) // 2).save(folder / "bank")
    fit(bank, Recipe(epochs=1), folder=folder / "run", device="cpu", pictures=False)
    (folder / "text.csv").write_text("text,label\nx,a\n")
    (folder / "list.json").write_text("[]")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    arrays = {
        "vector": np.zeros(WIDTH),
        "cube": np.zeros((2, 2, WIDTH)),
        "narrow": np.zeros((2, WIDTH - 1)),
        "nan": np.full((2, WIDTH), np.nan),
        "words": np.full((2, WIDTH), "a"),
        "integers": np.zeros((2, WIDTH), int),
        "labels": labels,
        "floats": np.zeros(ROWS),
        "empty": np.zeros((0, WIDTH)),
        "good": features,
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


@pytest.mark.parametrize(("line", "message"), [
    ("import {r}/vector.npy {t}/b --labels {r}/labels.npy", r"features must have shape \(N, D\) .*; got \(6,\)"),
    ("import {r}/cube.npy {t}/b --labels {r}/labels.npy", r"features must have shape \(N, D\) .*; got \(2, 2, 6\)"),
    ("import {r}/cube.npy {t}/b --labels {r}/labels.npy --dtype float16", r"features must have shape \(N, D\)"),
    ("import {r}/empty.npy {t}/b --labels {r}/labels.npy", r"features must have shape .*; got \(0, 6\)"),
    ("import {r}/words.npy {t}/b --labels {r}/labels.npy", "features must be real numbers; got <U1"),
    ("import {r}/words.npy {t}/b --labels {r}/labels.npy --dtype float16", "features must be real numbers; got <U1"),
    ("import {r}/nan.npy {t}/b --labels {r}/labels.npy", r"labels must have shape \(2,\).*; got \(60,\)"),
    ("import {r}/good.npy {t}/b --labels {r}/floats.npy", "labels must be integers; got float64"),
    ("import {r}/good.npy {t}/b --labels {r}/good.npy", r"labels must have shape \(60,\).*; got \(60, 6\)"),
    ("import {r}/good.npy {t}/b --labels {r}/labels.npy --groups {r}/floats.npy", "groups must be integers"),
    ("import {r}/good.npy {t}/b", "labels must be in .*; got"),
    ("import {r}/good.npy {t}/b --labels {r}/labels.npy --classes {r}/bytes.txt", "classes must be a UTF-8 text file"),
    ("import {r} {t}/b", "features must be in a file: .*; got"),
    ("extract {r}/text.csv {t}/b --backbone letters", "backbone must be timm:NAME or hf:NAME; got 'letters'"),
    ("extract {r}/text.csv {t}/b --backbone timm:test_vit --max-length 8", "max_length must be None for timm"),
    ("extract {r}/list.json {t}/b --backbone timm:test_vit", "path must be a folder of images, .*; got"),
    ("train {r}/bank {t}/run --recipe {r}/list.json", "recipe .* must be a JSON object of settings; got list"),
    ("train {r}/bank {t}/run --recipe {r}/bytes.txt", "recipe .* is not JSON"),
    ("train {r}/bank {t}/run --hidden wide", "hidden must be int; got 'wide'"),
    ("train {r}/bank {t}/run --lr nan", r"lr must be positive and finite; got \(nan,\)"),
    ("train {r}/bank {t}/run --dropout nan", r"dropout must be in \[0, 1\); got nan"),
    ("train {r}/bank {t}/run --head conv", "head must be one of linear, cosine, mlp; got 'conv'"),
    ("train {r}/bank {r}/run --resume --overwrite", "overwrite must be absent where resume is given; got both"),
    ("train {r}/run {t}/run", "path must be a feature bank; got"),
    ("predict {r}/run {r}/vector.npy", r"must hold features \(N, D\), real numbers; got float64 \(6,\)"),
    ("predict {r}/run {r}/narrow.npy", r"features must be \(N, 6\) as in training; got \(2, 5\)"),
    ("predict {r}/run {r}/nan.npy", r"features must be finite; got NaN or infinity in rows \[0, 1\]"),
    ("predict {r}/run {r}/bank --top 0", r"top must be in \[1, 4\); got 0"),
    ("predict {r}/run {r}/bank --adjust-prior nan", "adjust_prior must be a finite number.*; got nan"),
    ("predict {r}/run {r}/text.csv", "source must name a backbone"),
    ("predict {r}/bank {r}/bank", "folder must hold a trained head; got"),
    ("evaluate {r}/run --rows most", "rows must be one of auto, test, val, train, all; got 'most'"),
    ("sweep {r}/bank {t}/s --row A: --grid lr=1", "grid must be absent where row is given; got both"),
    ("sweep {r}/bank {t}/s --row A: --row A:", "row must have a name of its own; got 'A' twice"),
    ("sweep {r}/bank {t}/s --lr-per seed", "lr_per must be one of row, run; got 'seed'"),
    ("report {t}", "folders must hold finished runs; got none"),
], ids=lambda value: value if isinstance(value, str) and "{" in value else "")  # fmt: skip
def test_wrong_values_are_one_line(root, tmp_path, capsys, line, message):
    assert run(line.format(r=root, t=tmp_path).split()) == 2
    shown = capsys.readouterr().err
    assert re.search(message, shown), shown
    assert shown.startswith("fusedloss: ") and shown.count("\n") == 1


@pytest.mark.parametrize("rows", [["A: loss"], ["loss=ce"], [": loss=ce"]])
def test_rows_of_another_form(rows):
    with pytest.raises(ValueError, match=r"row must be 'NAME: setting=value ...'; got"):
        parse_rows({}, rows, [])
