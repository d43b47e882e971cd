"""Wrong arguments of the public functions of fusedloss.features: each is an error that names the argument."""

import re

import numpy as np
import pytest
import torch
from feature_files import CLASSES, ROWS, WIDTH

from fusedloss.features import (
    FeatureBank,
    FeatureSource,
    Inputs,
    backbone_of,
    compute_features,
    extract,
    load_backbone,
    read_inputs,
)
from fusedloss.features.backbone import Backbone
from fusedloss.features.inputs import Texts

FEATURES = np.zeros((ROWS, WIDTH), np.float32)
LABELS = np.arange(ROWS) % CLASSES
PATHS = [None, 3, 2.5, [], ["a"], b"a", {"a": 1}, "null\0character"]
NOT_ARRAYS = [None, "abc", b"abc", {"a": 1}, {1, 2}, object()]
NOT_INTEGERS = [None, "3", 2.5, float("nan"), True, [3], -1]
NAMES = [3, "abcde", b"abcde", {"a": 1}, [None] * CLASSES, [["a"]] * CLASSES, [1.5] * CLASSES]
VECTORS = [
    *NOT_ARRAYS,
    [[0], [1, 2]],
    ["a"] * ROWS,
    np.zeros(ROWS),
    np.full(ROWS, np.nan),
    np.zeros(ROWS, bool),
    np.zeros((ROWS, 1), int),
    np.eye(ROWS, dtype=int),
    np.zeros(0, int),
    np.zeros((), int),
    LABELS[1:],
    torch.zeros(ROWS, dtype=torch.complex64),
    torch.zeros(ROWS, dtype=torch.int64, device="meta"),
]
LABEL_VALUES = [*VECTORS, LABELS - 1, LABELS + 1, np.full(ROWS, 2**40), np.full(ROWS, 2**64 - 1, np.uint64)]


class Letters(Backbone):
    """Counts of letters: a backbone without a network."""

    kind = "text"

    def __init__(self):
        super().__init__(torch.nn.Identity(), FeatureSource(backbone="letters"), torch.device("cpu"))

    def prepare(self, item):
        return torch.tensor([float(item.count(letter)) for letter in "abc"])

    def example(self):
        return torch.zeros(1, 3)

    def forward(self, batch):
        return batch


@pytest.fixture(scope="module")
def texts():
    return Inputs("text", Texts(["ab", "b", "c"]), ["0", "1", "2"], np.array([0, 1, 1]), None, ("x", "y"), "sha")


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
    assert len(message) < 400


@pytest.mark.parametrize(
    ("name", "value"),
    cases(
        features=[
            *NOT_ARRAYS,
            [[0.0], [1.0, 2.0]],
            [["a"] * WIDTH] * ROWS,
            FEATURES[0],
            FEATURES[None],
            FEATURES[:0],
            FEATURES[:, :0],
            np.full((ROWS, WIDTH), np.nan),
            np.full((ROWS, WIDTH), np.inf, np.float16),
            FEATURES.astype(complex),
            FEATURES.astype(bool),
            torch.zeros(ROWS, WIDTH, device="meta"),
            torch.zeros(ROWS, WIDTH).to_sparse(),
        ],
        labels=LABEL_VALUES,
        groups=[value for value in VECTORS if value is not None],
        class_names=NAMES,
        paths=[*NAMES, ["a"], ["a"] * (ROWS + 1)],
        source=["timm:a", {}, 3],
    ),
)
def test_from_arrays(name, value):
    given = {"features": FEATURES, "labels": LABELS, "class_names": list("abcde"), name: value}
    refuses(lambda: FeatureBank.from_arrays(given.pop("features"), given.pop("labels"), **given), name)


@pytest.mark.parametrize("value", [np.full(ROWS, 2**40), np.full(ROWS, -1)])
def test_from_arrays_without_names(value):
    refuses(lambda: FeatureBank.from_arrays(FEATURES, value), "labels")


@pytest.mark.parametrize(
    ("name", "value"),
    cases(
        path=PATHS,
        num_rows=[*NOT_INTEGERS, 0],
        in_features=[*NOT_INTEGERS, 0],
        labels=LABEL_VALUES,
        class_names=[None, *NAMES],
        dtype=[None, "int8", ["float16"], np.float16, np.array(["a", "b"])],
        source=["timm:a", {}, 3],
        groups=[value for value in VECTORS if value is not None],
        paths=[*NAMES, ["a"]],
    ),
)
def test_create(tmp_path, name, value):
    given = {"path": tmp_path / "bank", "num_rows": ROWS, "in_features": WIDTH, "labels": LABELS}
    given |= {"class_names": list("abcde"), name: value}
    refuses(lambda: FeatureBank.create(**given), "labels" if name == "num_rows" and value == 3 else name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", PATHS)
def test_paths(value):
    refuses(lambda: FeatureBank.open(value), "path")
    refuses(lambda: FeatureBank.from_arrays(FEATURES, LABELS).save(value), "path")
    refuses(lambda: read_inputs(value), "path")


@pytest.mark.parametrize("value", [None, "timm:a", 3])
def test_other_banks_and_sources(value):
    bank = FeatureBank.from_arrays(FEATURES, LABELS)
    refuses(lambda: bank.require_source(value), "source")
    refuses(lambda: bank.require_compatible(value), "other")
    refuses(lambda: backbone_of(value), "source")


@pytest.mark.parametrize(
    ("name", "value"),
    cases(
        features=[
            *NOT_ARRAYS,
            FEATURES[0],
            FEATURES[None],
            FEATURES[:, 1:],
            [["a"] * WIDTH],
            [[0], [1, 2]],
            np.full((1, WIDTH), np.nan),
        ]
    ),
)
def test_append(tmp_path, name, value):
    with FeatureBank.create(tmp_path / "bank", ROWS, WIDTH, labels=LABELS, class_names=list("abcde")) as writer:
        refuses(lambda: writer.append(value), name)
        assert writer.rows_done == 0


@pytest.mark.parametrize("value", [*NAMES, ["a", "a"], []])
def test_class_names_of_inputs(tmp_path, value):
    (tmp_path / "t.csv").write_text("text,label\nx,a\n")
    refuses(lambda: read_inputs(tmp_path / "t.csv", class_names=value), "labels" if value == [] else "class_names")


@pytest.mark.parametrize(
    ("name", "value"),
    cases(
        backbone=[None, 3, [], "", "resnet", "timm:", ":a", b"timm:a"],
        weights=[3, [], b"a"],
        pooling=[3, ["cls"], "pre_logits_and_more"],
        image_size=["64", 2.5, True, 0, [64]],
        crop=["1", 0, 1.5, float("nan"), [1.0]],
        max_length=["8", 2.5, 0],
        precision=[None, "int8", ["float32"], torch.float32],
        device=[None, 0, "abacus", ["cpu"], "meta"],
    ),
)
def test_load_backbone(name, value):
    given = {"name" if name == "backbone" else name: value}
    refuses(lambda: load_backbone(**{"name": "timm:test_vit", **given}), name)


@pytest.mark.parametrize(
    ("name", "value"),
    cases(
        inputs=[None, "photos", ["a"], 3],
        backbone=[None, "timm:a", torch.nn.Identity()],
        batch_size=[None, 0, 2.5, "8"],
        workers=[None, -1, 0.5],
        path=PATHS,
        dtype=[None, "int8", 16],
    ),
)
def test_extract(tmp_path, texts, name, value):
    given = {"inputs": texts, "backbone": Letters(), "path": tmp_path / "bank", name: value}
    refuses(lambda: extract(**given, progress=False), name)
    if name not in ("path", "dtype"):
        del given["path"]
        refuses(lambda: compute_features(**given, progress=False), name)


def test_no_inputs_give_no_features(texts):
    none = Inputs("text", Texts([]), [], None, None, None, "sha")
    assert compute_features(none, Letters(), progress=False).shape == (0, 3)
    np.testing.assert_array_equal(compute_features(texts, Letters(), progress=False)[0], [1, 1, 0])


def test_numbers_become_names(tmp_path):
    bank = FeatureBank.from_arrays(FEATURES, LABELS, class_names=range(CLASSES), paths=np.arange(ROWS))
    assert FeatureBank.from_arrays(FEATURES.tolist(), LABELS.tolist()).class_names == bank.class_names
    assert bank.save(tmp_path / "bank").paths[:2] == ["0", "1"]
    assert bank.class_names == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("manifest.json", b"\xff", "manifest.json cannot be read"),
        ("manifest.json", b"[]", "schema_version 1 .*; got None"),
        ("classes.json", b"3", "must be a JSON list of 5 strings; got int"),
        ("classes.json", b"\xff", "classes.json cannot be read"),
        ("labels.npy", b"PK\x03\x04", "labels.npy cannot be read"),
        ("labels.npy", b"", "labels.npy cannot be read"),
    ],
)
def test_files_of_another_kind(tmp_path, file, content, message):
    FeatureBank.from_arrays(FEATURES, LABELS).save(tmp_path / "bank")
    (tmp_path / "bank" / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        FeatureBank.open(tmp_path / "bank")


def test_an_archive_in_place_of_an_array(tmp_path):
    FeatureBank.from_arrays(FEATURES, LABELS).save(tmp_path / "bank")
    np.savez(tmp_path / "a.npz", labels=LABELS)
    (tmp_path / "a.npz").rename(tmp_path / "bank" / "labels.npy")
    with pytest.raises(ValueError, match=r"labels.npy cannot be read as a whole .npy array"):
        FeatureBank.open(tmp_path / "bank")
