"""The feature bank: arrays, files, damage, and what is refused."""

import json
import os

import numpy as np
import pytest
import torch
from feature_files import CLASSES, ROWS, WIDTH

from fusedloss.features import (
    BankError,
    FeatureBank,
    FeatureSource,
    verified,
)


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
        (lambda folder: (folder / "groups.npy").unlink(), "must hold groups.npy, which its manifest lists"),
        (lambda folder: (folder / "classes.json").write_text('["a"]'), "must be a JSON list of 5 strings"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is not valid JSON"),
        (
            lambda folder: (folder / "manifest.json").unlink(),
            "path must be a feature bank; got .*, which has no manifest.json",
        ),
        (edit_manifest(schema_version=99), "schema_version 1 for this version of fusedloss; got 99"),
        (edit_manifest(num_rows=-1), "not a feature-bank manifest"),
        (edit_manifest(surprise=1), "not a feature-bank manifest"),
    ],
)
def test_damaged_banks_are_refused(bank, tmp_path, damage, message):
    bank.save(tmp_path / "bank")
    damage(tmp_path / "bank")
    with pytest.raises(BankError, match=message):
        FeatureBank.open(tmp_path / "bank")


def overwrite(file, position, content, keep_times=False):
    status = file.stat()
    with open(file, "r+b") as stream:
        stream.seek(position, os.SEEK_END)
        stream.write(content)
    if keep_times:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("keep_times", [False, True])
@pytest.mark.parametrize("name", ["features.npy", "labels.npy", "groups.npy"])
def test_a_changed_number_is_found(bank, tmp_path, name, keep_times):
    bank.save(tmp_path / "bank")
    FeatureBank.open(tmp_path / "bank")
    small = np.float32(0.25).tobytes() if name == "features.npy" else np.int64(1).tobytes()
    before = (tmp_path / "bank" / name).read_bytes()
    assert before[-len(small) :] != small
    overwrite(tmp_path / "bank" / name, -len(small), small, keep_times)
    with pytest.raises(BankError, match=rf"{name} must have the sha256 of the manifest; got another"):
        FeatureBank.open(tmp_path / "bank")
    overwrite(tmp_path / "bank" / name, -len(small), before[-len(small) :])
    assert FeatureBank.open(tmp_path / "bank").fingerprint() == bank.fingerprint()


def test_unchanged_files_are_read_once(bank, tmp_path, monkeypatch):
    bank.save(tmp_path / "bank")
    monkeypatch.setattr(verified, "CLOCK_TICK_NS", 0)
    FeatureBank.open(tmp_path / "bank").fingerprint()
    read = []
    original = verified.sha256_of_file
    monkeypatch.setattr(verified, "sha256_of_file", lambda file: read.append(file.name) or original(file))
    opened = FeatureBank.open(tmp_path / "bank")
    assert read == []
    monkeypatch.setattr(opened, "_computed_fingerprint", lambda: pytest.fail("computed again"))
    assert opened.fingerprint() == bank.fingerprint()
    os.utime(tmp_path / "bank" / "labels.npy")
    FeatureBank.open(tmp_path / "bank")
    assert read == ["labels.npy"]
    read.clear()
    FeatureBank.open(tmp_path / "bank", verify=True)
    assert sorted(read) == sorted(bank_files(tmp_path / "bank"))
    (tmp_path / "bank" / "verified.json").write_text('{"files": 3}')
    FeatureBank.open(tmp_path / "bank")
    (tmp_path / "bank" / "verified.json").unlink()
    (tmp_path / "bank").chmod(0o555)
    FeatureBank.open(tmp_path / "bank")
    (tmp_path / "bank").chmod(0o755)


def bank_files(folder):
    return json.loads((folder / "manifest.json").read_text())["files"]


def test_only_banks_are_opened_and_only_new_folders_written(bank, tmp_path):
    with pytest.raises(BankError, match="path must be a feature bank, a folder"):
        FeatureBank.open(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BankError, match="path must be a feature bank; got"):
        FeatureBank.open(tmp_path)
    with pytest.raises(BankError, match="path must be a new or empty folder, or a bank's"):
        FeatureBank.create(tmp_path, 3, 2, labels=[0, 0, 0], class_names=["a"])
    with pytest.raises(FileExistsError, match=r"path must be a new folder; got .*, which exists"):
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
    with pytest.raises(BankError, match="source must be that of the features"):
        bank.require_compatible(FeatureBank.from_arrays(*arrays, source=other))
    with pytest.raises(BankError, match="other must have in_features 6; got 4"):
        bank.require_compatible(FeatureBank.from_arrays(arrays[0][:, :4], arrays[1], source=mine))
