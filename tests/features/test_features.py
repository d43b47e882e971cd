"""The feature bank, extraction with timm and transformers backbones, and interruptions of both."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch

from fusedloss import atomic_io
from fusedloss.features import (
    BankError,
    FeatureBank,
    FeatureSource,
    IncompleteBankError,
    backbone_of,
    compute_features,
    extract,
    load_backbone,
    read_inputs,
    weights,
)

ROWS, WIDTH, CLASSES = 40, 6, 5


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    return generator.normal(size=(ROWS, WIDTH)).astype(np.float32), np.arange(ROWS) % CLASSES


@pytest.fixture
def bank(arrays):
    features, labels = arrays
    names = ["ant", "bee", "cat", "dog", "élan"]
    paths = [f"image {row}.png" for row in range(ROWS)]
    return FeatureBank.from_arrays(features, labels, groups=labels * 7, class_names=names, paths=paths)


def contents(folder):
    """Every file of a bank but the manifest, which holds the time."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "manifest.json"}


# the bank


def test_bank_survives_saving(bank, tmp_path):
    opened = bank.save(tmp_path / "bank")
    verified = FeatureBank.open(tmp_path / "bank", verify=True)
    for loaded in (opened, verified):
        np.testing.assert_array_equal(loaded.features, bank.features)
        np.testing.assert_array_equal(loaded.labels, bank.labels)
        np.testing.assert_array_equal(loaded.groups, bank.groups)
        assert (loaded.class_names, loaded.paths) == (bank.class_names, bank.paths)
        assert isinstance(loaded.features, np.memmap)
        assert loaded.fingerprint() == bank.fingerprint()
    assert (len(opened), opened.in_features, opened.num_classes) == (ROWS, WIDTH, CLASSES)
    assert opened.labels.dtype == opened.groups.dtype == np.int64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.int32])
def test_bank_takes_tensors(dtype):
    features = torch.arange(12).reshape(4, 3).to(dtype)
    bank = FeatureBank.from_arrays(features, torch.tensor([0, 1, 2, 2], dtype=torch.int32))
    assert bank.features.dtype == (np.float16 if dtype == torch.float16 else np.float32)
    assert bank.class_names == ("0", "1", "2") and bank.groups is None and bank.paths is None
    np.testing.assert_array_equal(bank.features, features.float().numpy())


def test_banks_with_other_rows_have_other_fingerprints(bank, arrays):
    features, labels = arrays
    assert bank.fingerprint() != FeatureBank.from_arrays(features, labels).fingerprint()
    features = features.copy()
    features[3, 2] += 1
    same_but_one = FeatureBank.from_arrays(features, labels, groups=labels * 7, class_names=bank.class_names)
    assert bank.fingerprint() != same_but_one.fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.zeros(5)}, r"features must have shape \(N, D\).*\(5,\)"),
        ({"features": np.zeros((0, 3))}, "N and D at least 1"),
        ({"features": np.zeros((ROWS, 3), complex)}, "real numbers; got complex128"),
        ({"labels": np.zeros(3, int)}, r"labels must have shape \(40,\).*\(3,\)"),
        ({"labels": np.zeros(ROWS)}, "labels must be integers; got float64"),
        (
            {"labels": np.full(ROWS, 5), "class_names": list("abcde")},
            r"\[0, 5\); got 40 that do not \(row 0: 5, row 1: 5",
        ),
        ({"labels": np.full(ROWS, -1), "class_names": list("abcde")}, r"\[0, 5\); got 40 that do not \(row 0: -1"),
        ({"groups": np.zeros((ROWS, 1), int)}, r"groups must have shape \(40,\)"),
        ({"paths": ["a"]}, "paths must have one entry per row, 40; got 1"),
    ],
)
def test_wrong_arrays_are_refused(arrays, change, message):
    given = {"features": arrays[0], "labels": arrays[1], **change}
    with pytest.raises(BankError, match=message):
        FeatureBank.from_arrays(given.pop("features"), given.pop("labels"), **given)


def test_rows_that_are_not_finite_are_named(arrays):
    features, labels = arrays
    features[[3, 7, 11, 12, 13, 14], 1] = [np.nan, np.inf, -np.inf, np.nan, np.nan, np.nan]
    paths = [f"{row}.png" for row in range(ROWS)]
    with pytest.raises(
        BankError, match=r"in 6 rows: row 3 \(3.png\), row 7 \(7.png\), row 11 .*row 13 \(13.png\), \.\.\."
    ):
        FeatureBank.from_arrays(features, labels, paths=paths)


def truncate(folder):
    os.truncate(folder / "features.npy", (folder / "features.npy").stat().st_size - 4)


def other_shape(folder):
    np.save(folder / "features.npy", np.zeros((ROWS, WIDTH + 1), np.float32))


def other_dtype(folder):
    np.save(folder / "labels.npy", np.zeros(ROWS, np.int32))


def pickled(folder):
    np.save(folder / "labels.npy", np.array([{}] * ROWS), allow_pickle=True)


def label_out_of_range(folder):
    np.save(folder / "labels.npy", np.full(ROWS, CLASSES))


def not_finite(folder):
    np.save(folder / "features.npy", np.full((ROWS, WIDTH), np.nan, np.float32))


def edit_manifest(**changes):
    def edit(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"features.npy cannot be read as a whole .npy array \(truncated\?\)"),
        (other_shape, r"features.npy must hold float32 \(40, 6\), as the manifest says; got float32 \(40, 7\)"),
        (other_dtype, r"labels.npy must hold int64 \(40,\), as the manifest says; got int32"),
        (pickled, "labels.npy cannot be read"),
        (label_out_of_range, r"labels must lie in \[0, 5\); got 40 that do not"),
        (not_finite, r"NaN or infinite values in 40 rows: row 0 \(image 0.png\)"),
        (lambda folder: (folder / "groups.npy").unlink(), "groups.npy is missing"),
        (lambda folder: (folder / "classes.json").write_text('["a"]'), "must be a JSON list of 5 strings"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is not valid JSON"),
        (
            lambda folder: (folder / "manifest.json").unlink(),
            "is not a feature bank: it has no manifest.json",
        ),
        (edit_manifest(schema_version=99), "schema_version 99; this version of fusedloss reads 1"),
        (edit_manifest(num_rows=-1), "not a feature-bank manifest"),
        (edit_manifest(surprise=1), "not a feature-bank manifest"),
    ],
)
def test_damaged_banks_are_refused(bank, tmp_path, damage, message):
    bank.save(tmp_path / "bank")
    damage(tmp_path / "bank")
    with pytest.raises(BankError, match=message):
        FeatureBank.open(tmp_path / "bank")


def test_a_changed_number_is_found_by_verification(bank, tmp_path):
    bank.save(tmp_path / "bank")
    with open(tmp_path / "bank" / "features.npy", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(0.25).tobytes())
    FeatureBank.open(tmp_path / "bank")
    with pytest.raises(BankError, match=r"features.npy does not have the sha256 of the manifest"):
        FeatureBank.open(tmp_path / "bank", verify=True)


def test_only_banks_are_opened_and_only_new_folders_written(bank, tmp_path):
    with pytest.raises(BankError, match="is not a folder"):
        FeatureBank.open(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BankError, match="is not a feature bank"):
        FeatureBank.open(tmp_path)
    with pytest.raises(BankError, match="neither empty nor a feature bank"):
        FeatureBank.create(tmp_path, 3, 2, labels=[0, 0, 0], class_names=["a"])
    with pytest.raises(FileExistsError, match="a bank is saved to a new folder"):
        bank.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_banks_from_other_backbones_are_refused(arrays):
    mine = FeatureSource(backbone="timm:a", weights="/here/a.pth", weights_sha256="1", pooling="pre_logits")
    moved = FeatureSource(backbone="timm:a", weights="/there/a.pth", weights_sha256="1", pooling="pre_logits")
    other = FeatureSource(backbone="timm:b", weights="/here/a.pth", weights_sha256="2", pooling="pre_logits")
    bank = FeatureBank.from_arrays(*arrays, source=mine)
    bank.require_source(moved)
    bank.require_compatible(FeatureBank.from_arrays(*arrays, source=moved))
    with pytest.raises(BankError, match="backbone is 'timm:a', not 'timm:b'; weights_sha256 is '1', not '2'"):
        bank.require_source(other)
    with pytest.raises(BankError, match="computed in another way"):
        bank.require_compatible(FeatureBank.from_arrays(*arrays, source=other))
    with pytest.raises(BankError, match="in_features differ: 6 and 4"):
        bank.require_compatible(FeatureBank.from_arrays(arrays[0][:, :4], arrays[1], source=mine))


# the writer


def planned(folder, arrays, **changes):
    settings = {"labels": arrays[1], "class_names": list("abcde"), "dtype": "float32", "inputs_sha256": "x"}
    return FeatureBank.create(folder, ROWS, WIDTH, **{**settings, **changes})


def test_a_stopped_writer_goes_on(arrays, tmp_path):
    features = arrays[0]
    with planned(tmp_path / "bank", arrays) as writer:
        writer.append(features[:10])
        writer.append(torch.from_numpy(features[10:16]))
        writer.append(features[:0])
    with pytest.raises(IncompleteBankError, match=r"16 of 40 rows. Run the same extract command again"):
        FeatureBank.open(tmp_path / "bank")
    with open(tmp_path / "bank" / "features.npy", "ab") as file:
        file.write(b"half a row, never counted")
    with planned(tmp_path / "bank", arrays) as writer:
        assert writer.rows_done == 16
        writer.append(features[16:])
        bank = writer.finish()
    np.testing.assert_array_equal(bank.features, features)
    assert FeatureBank.open(tmp_path / "bank", verify=True).manifest.inputs_sha256 == "x"
    assert not (tmp_path / "bank" / "progress.json").exists()
    with planned(tmp_path / "bank", arrays) as writer:
        assert writer.complete and writer.rows_done == ROWS
        assert len(writer.finish()) == ROWS


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "dtype 'float32', not 'float16'"),
        ({"inputs_sha256": "y"}, "inputs_sha256 other than now"),
        ({"source": FeatureSource(backbone="timm:b")}, "backbone None, not 'timm:b'"),
        ({"labels": np.zeros(ROWS, int)}, "labels.npy other than now"),
        ({"class_names": list("vwxyz")}, "classes.json other than now"),
        ({"groups": np.zeros(ROWS, int)}, "groups.npy other than now"),
    ],
)
def test_a_writer_refuses_to_mix(arrays, tmp_path, finished, change, message):
    with planned(tmp_path / "bank", arrays) as writer:
        writer.append(arrays[0] if finished else arrays[0][:10])
        if finished:
            writer.finish()
    before = contents(tmp_path / "bank")
    with pytest.raises(BankError, match=message):
        planned(tmp_path / "bank", arrays, **change)
    assert contents(tmp_path / "bank") == before


def test_a_writer_refuses_wrong_rows(arrays, tmp_path):
    with planned(tmp_path / "bank", arrays, dtype="float16", paths=[f"{row}.png" for row in range(ROWS)]) as writer:
        writer.append(arrays[0][:10])
        with pytest.raises(BankError, match=r"shape \(n, 6\); got \(5, 7\)"):
            writer.append(np.zeros((5, 7)))
        with pytest.raises(
            BankError, match="must be the next of 40 rows, as planned for"
        ):
            writer.append(np.zeros((31, 6)))
        with pytest.raises(BankError, match=r"in 1 rows: row 12 \(12.png\)"):
            writer.append(np.array([[0] * 6, [0] * 6, [np.nan] * 6]))
        with pytest.raises(BankError, match=r"row 10 \(10.png\); float16 overflowed, store float32 instead"):
            writer.append(np.full((1, 6), 1e6))
        with pytest.raises(BankError, match="has 10 of 40 rows"):
            writer.finish()
        assert writer.rows_done == 10


def test_a_damaged_unfinished_bank_is_refused(arrays, tmp_path):
    with planned(tmp_path / "bank", arrays) as writer:
        writer.append(arrays[0][:10])
    os.truncate(tmp_path / "bank" / "features.npy", 200)
    with pytest.raises(BankError, match="shorter than its 10 finished rows"):
        planned(tmp_path / "bank", arrays)
    (tmp_path / "bank" / "progress.json").write_text("{}")
    with pytest.raises(BankError, match=r"progress.json cannot be read"):
        planned(tmp_path / "bank", arrays)


@pytest.fixture
def full_disk(monkeypatch):
    """Lets a number of bytes through, then fails as a full disk does, half a write later."""

    def limit(left):
        def write_all(file, content):
            nonlocal left
            taken = memoryview(content).cast("B")[:left]
            left -= len(taken)
            file.write(taken)
            if len(taken) < memoryview(content).nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("fusedloss.features.writer.write_all", write_all)

    return limit


def test_a_full_disk_keeps_the_rows_before(arrays, tmp_path, full_disk, monkeypatch):
    features = arrays[0]
    full_disk(128 + 25 * WIDTH * 4)
    with planned(tmp_path / "bank", arrays) as writer:
        writer.append(features[:20])
        with pytest.raises(OSError, match=r"no space left.*the first 20 rows are safe; make room"):
            writer.append(features[20:])
    with pytest.raises(IncompleteBankError, match="20 of 40 rows"):
        FeatureBank.open(tmp_path / "bank")
    monkeypatch.undo()
    with planned(tmp_path / "bank", arrays) as writer:
        writer.append(features[20:])
        np.testing.assert_array_equal(writer.finish().features, features)


def test_a_full_disk_leaves_nothing_of_a_saved_bank(bank, tmp_path, full_disk):
    full_disk(500)
    with pytest.raises(OSError, match=r"no space left while writing .*nothing was kept there"):
        bank.save(tmp_path / "bank")
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_noticed_before_the_work(arrays, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: os.terminal_size((0, 0)) and type("", (), {"free": 100}))
    with pytest.raises(OSError, match=r"no space for .*MB are free; nothing was written"):
        planned(tmp_path / "bank", arrays)


def test_a_replaced_file_is_old_or_new(tmp_path):
    file = tmp_path / "file"
    atomic_io.write_bytes(file, b"old")
    with pytest.raises(KeyboardInterrupt), atomic_io.replacing(file) as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


# inputs


def save_image(path, seed, edge=40):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (edge, edge, 3), np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path):
    for seed, name in enumerate(["dog/b.png", "dog/a.png", "cat/c.jpg", "cat/deep/d.png", "emu/e.png"]):
        save_image(tmp_path / "photos" / name, seed)
    (tmp_path / "photos" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path / "photos"


def test_class_folders(photos):
    inputs = read_inputs(photos)
    assert inputs.class_names == ("cat", "dog", "emu")
    assert inputs.paths == ["cat/c.jpg", "cat/deep/d.png", "dog/a.png", "dog/b.png", "emu/e.png"]
    assert inputs.labels.tolist() == [0, 0, 1, 1, 2]
    assert inputs.load(0).size == (40, 40) and inputs.load(0).mode == "RGB"
    assert read_inputs(photos, class_names=["emu", "dog", "cat", "yak"]).labels.tolist() == [2, 2, 1, 1, 0]
    unlabelled = read_inputs(photos, labelled=False)
    assert (unlabelled.labels, unlabelled.class_names, unlabelled.paths) == (None, None, inputs.paths)
    assert read_inputs(photos / "dog" / "a.png", labelled=False).paths == ["a.png"]


def test_an_image_list(photos, tmp_path):
    table = tmp_path / "list.csv"
    table.write_text("path,label,group\nphotos/dog/a.png,10,p1\nphotos/emu/e.png,9,p0\nphotos/dog/b.png,10,p1\n")
    inputs = read_inputs(table)
    assert inputs.class_names == ("9", "10") and inputs.labels.tolist() == [1, 0, 1]
    assert inputs.groups.tolist() == [1, 0, 1]
    changed = tmp_path / "changed.csv"
    changed.write_text(table.read_text().replace("dog/a", "cat/c").replace("a.png", "c.jpg").replace("c.png", "c.jpg"))
    assert read_inputs(changed).sha256 != inputs.sha256


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", 'text,label,group\n"one, two",good,4\nthree,bad,7\n'),
        ("t.tsv", "group\ttext\tlabel\n4\tone, two\tgood\n7\tthree\tbad\n"),
        (
            "t.jsonl",
            '{"text": "one, two", "label": "good", "group": 4}\n\n{"text": "three", "label": "bad", "group": 7}\n',
        ),
    ],
)
def test_texts(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    inputs = read_inputs(tmp_path / name)
    assert inputs.kind == "text" and [inputs.load(row) for row in range(2)] == ["one, two", "three"]
    assert inputs.class_names == ("bad", "good") and inputs.labels.tolist() == [1, 0]
    assert inputs.groups.tolist() == [4, 7] and inputs.paths[0] == f"{name}:{1 if name == 't.jsonl' else 2}"


@pytest.mark.parametrize("colour", [False, True])
def test_packed_images(tmp_path, colour):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3) if colour else (3, 8, 8), np.uint8)
    np.savez(tmp_path / "p.npz", images=images, labels=np.array([1, 0, 1]), groups=np.array([5, 6, 5]))
    inputs = read_inputs(tmp_path / "p.npz")
    np.testing.assert_array_equal(
        np.asarray(inputs.load(1)), images[1] if colour else images[1][..., None].repeat(3, 2)
    )
    assert inputs.class_names == ("0", "1") and inputs.groups.tolist() == [5, 6, 5]
    np.savez(tmp_path / "q.npz", images=images, labels=np.array([1, 0, 1]), class_names=np.array(["no", "yes"]))
    assert read_inputs(tmp_path / "q.npz").class_names == ("no", "yes")
    assert read_inputs(tmp_path / "q.npz", class_names=["yes", "no"]).labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "must have rows; got none"),
        ("t.csv", "text,label\n", "must have rows; got none"),
        ("t.csv", "words,label\na,b\n", "must have a column 'path' .* or 'text'"),
        ("t.csv", "text,path,label\na,b,c\n", "not both"),
        ("t.csv", "text\na\n", "must have a column 'label'"),
        ("t.csv", "text,label\na,x\nb\n", "value for 'label' in every row; got none in line 3"),
        ("t.csv", "text,label\na,x,1\n", "got more in line 2 than the header has"),
        ("t.csv", "path,label\nmissing.png,x\n", "1 of 1 images do not exist, the first is .*missing.png"),
        ("t.jsonl", '{"text": "a", "label": "x"}\n{', "line 2 is not JSON"),
        ("t.jsonl", "[1]\n", "line 1 must be an object"),
        ("t.parquet", "x", "path must be a folder of images, or a .csv, .tsv, .jsonl or .npz file; got .*t.parquet"),
        ("t.npz", "x", "cannot be read as .npz"),
    ],
)
def test_wrong_lists_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_inputs(tmp_path / name)


def test_wrong_folders_and_packs_are_refused(photos, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_inputs(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"must hold images .*; got none"):
        read_inputs(tmp_path / "empty")
    with pytest.raises(
        ValueError, match=r"among the 1 class_names; got 2 in .* that are not, for example 'cat'"
    ):
        read_inputs(photos, class_names=["emu"])
    save_image(photos / "loose.png", 9)
    with pytest.raises(ValueError, match=r"one folder per class; got 1 images in none \(loose.png\)"):
        read_inputs(photos)
    np.savez(tmp_path / "p.npz", images=np.zeros((2, 8, 8), np.float32), labels=np.zeros(2, int))
    with pytest.raises(ValueError, match=r"got float32 \(2, 8, 8\)"):
        read_inputs(tmp_path / "p.npz")
    np.savez(tmp_path / "q.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.zeros(3, int))
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\)"):
        read_inputs(tmp_path / "q.npz")
    (photos / "loose.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"row 0: .*loose.png cannot be read as an image"):
        read_inputs(photos / "loose.png", labelled=False).load(0)


# weights


def tiny_network(width=3):
    return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 2))


@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "net."])
def test_weights_load_by_name_or_in_order(tmp_path, nested, prefix):
    given, network = tiny_network(), tiny_network()
    state = {prefix + name: tensor for name, tensor in given.state_dict().items()}
    torch.save({nested: state} if nested else state, tmp_path / "w.pth")
    weights.load_weights(network, tmp_path / "w.pth")
    assert weights.sha256_of_weights(network) == weights.sha256_of_weights(given)


def test_safetensors_and_a_new_classifier(tmp_path):
    from safetensors.torch import save_file

    given, network = tiny_network(), tiny_network()
    state = {name: tensor for name, tensor in given.state_dict().items() if not name.startswith("2.")}
    save_file({**state, "2.weight": torch.zeros(9, 3), "2.bias": torch.zeros(9)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"'2.*' must have shape"):
        weights.load_weights(network, tmp_path / "w.safetensors")
    weights.load_weights(network, tmp_path / "w.safetensors", unused=("2",))
    assert weights.sha256_of_weights(network, ("2",)) == weights.sha256_of_weights(given, ("2",))
    assert weights.sha256_of_weights(network) != weights.sha256_of_weights(given)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    def check(content, message, name="w.pth"):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            weights.load_weights(tiny_network(), tmp_path / name)

    wide = {f"net.{name}": tensor for name, tensor in tiny_network(width=5).state_dict().items()}
    check(wide, r"tensor 0 is '0.weight' \(3, 4\); got 'net.0.weight' \(5, 4\)")
    short = [(f"net.{name}", tensor) for name, tensor in tiny_network().state_dict().items()][:-1]
    check(dict(short), "must hold 9 tensors, as the backbone has; got 8")
    check({**tiny_network().state_dict(), "extra": torch.zeros(1)}, "got 1 others, the first is 'extra'")
    check([1, 2], "must hold a state dict")
    check({"a": 1}, "must hold a state dict")
    check(tiny_network(), "cannot be read as weights .*weights_only=True")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        weights.read_state_dict(tmp_path / "text.pth")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        weights.read_state_dict(tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="does not exist"):
        weights.read_state_dict(tmp_path / "none.pth")


# backbones


@pytest.fixture(scope="session")
def timm_weights(tmp_path_factory):
    """Random weights of timm's smallest networks, as files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import timm

    folder = tmp_path_factory.mktemp("weights")
    for name in ("test_vit", "test_resnet"):
        torch.manual_seed(0)
        torch.save(timm.create_model(name, pretrained=False).state_dict(), folder / f"{name}.pth")
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A two-layer BERT with random weights, saved with its tokenizer as a model folder."""
    import transformers

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", "good", "bad", "film"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=24,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory):
    import transformers

    folder = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
    )
    torch.manual_seed(0)
    transformers.ViTModel(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_timm_features_are_what_the_classifier_reads(photos, tmp_path, timm_weights, name):
    import timm

    backbone = load_backbone(
        f"timm:{name}", weights=timm_weights / f"{name}.pth", image_size=64, crop=1.0, device="cpu"
    )
    bank = extract(read_inputs(photos), backbone, tmp_path / "bank", dtype="float32", batch_size=2, progress=False)
    model = timm.create_model(name, pretrained=False)
    model.load_state_dict(torch.load(timm_weights / f"{name}.pth", weights_only=True))
    if name == "test_vit":
        model.set_input_size(img_size=(64, 64))
    seen = []
    model.get_classifier().register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    images = torch.stack([backbone.prepare(read_inputs(photos).load(row)) for row in range(5)])
    assert images.shape == (5, 3, 64, 64)
    with torch.no_grad():
        model.eval()(images)
    torch.testing.assert_close(torch.tensor(bank.features), seen[0], rtol=1e-4, atol=1e-5)
    source = bank.manifest.source
    assert (source.backbone, source.pooling, source.image_size, source.crop) == (
        f"timm:{name}",
        "pre_logits",
        64,
        1.0,
    )
    assert bank.class_names == ("cat", "dog", "emu") and bank.paths[0] == "cat/c.jpg"
    again = compute_features(read_inputs(photos), backbone_of(source, device="cpu"), batch_size=2, progress=False)
    np.testing.assert_array_equal(again, bank.features)


def test_normalised_features_and_reduced_precision(photos, timm_weights):
    inputs, file = read_inputs(photos), timm_weights / "test_resnet.pth"
    plain = load_backbone("timm:test_resnet", weights=file, image_size=32, device="cpu")
    unit = load_backbone("timm:test_resnet", weights=file, image_size=32, normalize=True, device="cpu")
    half = load_backbone("timm:test_resnet", weights=file, image_size=32, precision="bfloat16", device="cpu")
    exact, scaled, rough = (compute_features(inputs, one, progress=False) for one in (plain, unit, half))
    np.testing.assert_allclose(scaled, exact / np.linalg.norm(exact, axis=1, keepdims=True), rtol=1e-5, atol=1e-6)
    assert not np.array_equal(rough, exact)
    np.testing.assert_allclose(rough, exact, rtol=0.1, atol=0.1 * np.abs(exact).max())
    assert plain.source.differences(half.source) == ["precision is 'float32', not 'bfloat16'"]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_text_features_do_not_depend_on_padding(tmp_path, tiny_bert, pooling):
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], ["a good film", 1], ["bad", 0], ["a b c d e f g h i j", 0]])
    inputs = read_inputs(tmp_path / "t.csv")
    backbone = load_backbone(f"hf:{tiny_bert}", pooling=pooling, device="cpu")
    bank = extract(inputs, backbone, tmp_path / "bank", dtype="float32", batch_size=3, progress=False)
    alone = compute_features(inputs, backbone, batch_size=1, progress=False)
    np.testing.assert_allclose(bank.features, alone, rtol=1e-4, atol=1e-5)
    tokens = backbone.processor(["a good film"], return_tensors="pt")
    with torch.no_grad():
        hidden = backbone.model(**tokens).last_hidden_state[0]
    expected = hidden.mean(dim=0) if pooling == "mean" else hidden[0]
    np.testing.assert_allclose(bank.features[0], expected, rtol=1e-4, atol=1e-5)
    again = backbone_of(bank.manifest.source, device="cpu")
    np.testing.assert_array_equal(compute_features(inputs, again, batch_size=3, progress=False), bank.features)


def test_long_texts_are_cut(tmp_path, tiny_bert):
    (tmp_path / "t.csv").write_text(f"text,label\n{'a ' * 100},0\n{'a ' * 6},0\n")
    inputs = read_inputs(tmp_path / "t.csv")
    features = compute_features(inputs, load_backbone(f"hf:{tiny_bert}", max_length=8, device="cpu"), progress=False)
    np.testing.assert_allclose(features[0], features[1], rtol=1e-5, atol=1e-6)
    whole = compute_features(inputs, load_backbone(f"hf:{tiny_bert}", device="cpu"), progress=False)
    assert not np.allclose(whole[0], whole[1])
    with pytest.raises(ValueError, match=r"max_length must be at most 24 for hf:.*; got 25"):
        load_backbone(f"hf:{tiny_bert}", max_length=25)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_transformers_image_features(photos, tiny_vit, pooling):
    inputs = read_inputs(photos)
    backbone = load_backbone(f"hf:{tiny_vit}", pooling=pooling, device="cpu")
    features = compute_features(inputs, backbone, progress=False)
    pixels = backbone.processor(images=[inputs.load(row) for row in range(5)], return_tensors="pt")
    with torch.no_grad():
        hidden = backbone.model(**pixels).last_hidden_state
    np.testing.assert_allclose(
        features, hidden[:, 0] if pooling == "cls" else hidden[:, 1:].mean(1), rtol=1e-4, atol=1e-5
    )


def test_local_weights_of_a_transformers_network(photos, tiny_vit, tmp_path):
    import transformers

    torch.manual_seed(1234)
    other = transformers.ViTModel(transformers.ViTConfig.from_pretrained(tiny_vit))
    torch.save(other.state_dict(), tmp_path / "other.pth")
    original = load_backbone(f"hf:{tiny_vit}", device="cpu")
    replaced = load_backbone(f"hf:{tiny_vit}", weights=tmp_path / "other.pth", device="cpu")
    assert original.source.pooling == "cls"
    assert [line.split()[0] for line in original.source.differences(replaced.source)] == ["weights_sha256"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet10t", {}, "must be timm:NAME or hf:NAME; got 'resnet10t'"),
        ("keras:a", {}, "must be timm:NAME or hf:NAME"),
        ("timm:test_vitt", {}, "backbone must be a model of timm; got 'test_vitt' .close: test_vit"),
        ("timm:test_vit", {"pooling": "cls"}, "pooling must be pre_logits for timm backbones; got 'cls'"),
        (
            "timm:test_vit",
            {"precision": "int8"},
            "precision must be one of float32, bfloat16, float16; got 'int8'",
        ),
        ("timm:test_vit", {"image_size": 0}, "image_size must be at least 1; got 0"),
        ("timm:test_vit", {"crop": 1.5}, r"crop must be in \(0, 1\]; got 1.5"),
        ("timm:test_vit", {"device": "abacus"}, "device must be auto, cpu, cuda or cuda:N; got 'abacus'"),
        ("hf:nowhere", {"image_size": 32}, "image_size must be None for hf backbones"),
    ],
)
def test_wrong_backbones_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_backbone(name, **options)


def test_wrong_poolings_and_kinds_are_refused(photos, tiny_bert, tmp_path):
    with pytest.raises(ValueError, match="pooling must be one of cls, mean for hf backbones; got 'max'"):
        load_backbone(f"hf:{tiny_bert}", pooling="max")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"hf:.* cannot be loaded"):
        load_backbone(f"hf:{tmp_path}")
    backbone = load_backbone(f"hf:{tiny_bert}", device="cpu")
    with pytest.raises(ValueError, match=r"inputs must be texts for hf:.*; got images"):
        compute_features(read_inputs(photos), backbone, progress=False)
    with pytest.raises(ValueError, match="must be labelled to become a bank"):
        extract(read_inputs(photos, labelled=False), backbone, tmp_path / "bank")


def test_a_backbone_with_other_weights_is_not_the_same(timm_weights, tmp_path):
    source = load_backbone("timm:test_resnet", weights=timm_weights / "test_resnet.pth", device="cpu").source
    state = torch.load(timm_weights / "test_resnet.pth", weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in state.items()}, tmp_path / "changed.pth")
    with pytest.raises(ValueError, match="not the backbone of the features any more: weights_sha256 is"):
        backbone_of(source, weights=tmp_path / "changed.pth", device="cpu")
    with pytest.raises(ValueError, match="no backbone is known"):
        backbone_of(FeatureSource())


@pytest.mark.parametrize("error", [ImportError("no module"), RuntimeError("operator torchvision::nms does not exist")])
def test_a_missing_library_says_how_to_install_it(monkeypatch, error):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("timm", "transformers"):
                raise error

    for name in [name for name in sys.modules if name.split(".")[0] in ("timm", "transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    for name, library in (("timm:test_vit", "timm"), ("hf:bert", "transformers")):
        with pytest.raises(ImportError, match=rf"needs {library}, .*pip install 'fusedloss\[features\]'"):
            load_backbone(name)


# interruptions


PROGRAM = """
import sys, time
from fusedloss.features import extract, load_backbone, read_inputs
from fusedloss.features import extraction
packed, weights, bank, pause = sys.argv[1:]
extraction.ROWS_PER_SYNC = 8
backbone = load_backbone("timm:test_resnet", weights=weights, image_size=32, device="cpu")
compute = backbone.compute
def slowly(batch):
    time.sleep(float(pause))
    return compute(batch)
backbone.compute = slowly
extract(read_inputs(packed), backbone, bank, batch_size=4, progress=False)
"""


def rows_safe(folder):
    try:
        return json.loads((folder / "progress.json").read_text())["rows_done"]
    except FileNotFoundError:
        return 0


def test_killed_extraction_ends_with_the_same_bits(tmp_path, timm_weights):
    images = np.random.default_rng(0).integers(0, 256, (90, 16, 16), np.uint8)
    np.savez(tmp_path / "p.npz", images=images, labels=np.arange(90) % 4, groups=np.arange(90) // 3)
    given = [str(tmp_path / "p.npz"), str(timm_weights / "test_resnet.pth")]
    backbone = load_backbone("timm:test_resnet", weights=given[1], image_size=32, device="cpu")
    extract(read_inputs(given[0]), backbone, tmp_path / "whole", batch_size=4, progress=False)

    target = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *given, str(target), "0.1"], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while rows_safe(target) < 16 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    process.stderr.close()
    done = rows_safe(target)
    assert 16 <= done < 90
    with pytest.raises(IncompleteBankError, match=f"{done} of 90 rows"):
        FeatureBank.open(target)

    computed = []
    original = backbone.compute
    backbone.compute = lambda batch: computed.append(len(batch)) or original(batch)
    extract(read_inputs(given[0]), backbone, target, batch_size=4, progress=False)
    assert sum(computed) == 90 - done
    assert contents(target) == contents(tmp_path / "whole")
    FeatureBank.open(target, verify=True)
    extract(read_inputs(given[0]), backbone, target, batch_size=4, progress=False)
    assert sum(computed) == 90 - done


def test_resuming_with_another_backbone_or_list_is_refused(tmp_path, timm_weights):
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16), np.uint8)
    np.savez(tmp_path / "p.npz", images=images, labels=np.arange(6) % 2)
    np.savez(tmp_path / "q.npz", images=255 - images, labels=np.arange(6) % 2)
    file = timm_weights / "test_resnet.pth"
    backbone = load_backbone("timm:test_resnet", weights=file, image_size=32, device="cpu")
    original, calls = backbone.compute, []

    def failing(batch):
        calls.append(0)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return original(batch)

    backbone.compute = failing
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fusedloss.features.extraction.ROWS_PER_SYNC", 2)
        extract(read_inputs(tmp_path / "p.npz"), backbone, tmp_path / "bank", batch_size=2, progress=False)
    backbone.compute = original
    assert rows_safe(tmp_path / "bank") == 2
    with pytest.raises(BankError, match="inputs_sha256 other than now"):
        extract(read_inputs(tmp_path / "q.npz"), backbone, tmp_path / "bank", progress=False)
    other = load_backbone("timm:test_resnet", weights=file, image_size=48, device="cpu")
    with pytest.raises(BankError, match="image_size 32, not 48"):
        extract(read_inputs(tmp_path / "p.npz"), other, tmp_path / "bank", progress=False)
    bank = extract(read_inputs(tmp_path / "p.npz"), backbone, tmp_path / "bank", batch_size=2, progress=False)
    assert len(bank) == 6


def test_worker_processes_change_nothing(photos, tmp_path, timm_weights):
    backbone = load_backbone("timm:test_resnet", weights=timm_weights / "test_resnet.pth", image_size=32, device="cpu")
    alone = extract(read_inputs(photos), backbone, tmp_path / "a", batch_size=2, progress=False)
    helped = extract(read_inputs(photos), backbone, tmp_path / "b", batch_size=2, workers=1, progress=False)
    assert alone.fingerprint() == helped.fingerprint()
