"""Writing a bank row by row: interruptions, other plans, and full disks."""

import errno
import os

import numpy as np
import pytest
import torch
from feature_files import ROWS, WIDTH, contents

from fusedloss.features import (
    BankError,
    FeatureBank,
    FeatureSource,
    IncompleteBankError,
)


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
        with pytest.raises(BankError, match="must be the next of 40 rows, as planned for"):
            writer.append(np.zeros((31, 6)))
        with pytest.raises(BankError, match=r"in 1 rows: row 12 \(12.png\)"):
            writer.append(np.array([[0] * 6, [0] * 6, [np.nan] * 6]))
        with pytest.raises(BankError, match=r"row 10 \(10.png\); float16 overflowed, store float32 instead"):
            writer.append(np.full((1, 6), 1e6))
        with pytest.raises(BankError, match=r"all 40 rows of .*; got 10 of them"):
            writer.finish()
        assert writer.rows_done == 10


def test_a_damaged_unfinished_bank_is_refused(arrays, tmp_path):
    with planned(tmp_path / "bank", arrays) as writer:
        writer.append(arrays[0][:10])
    os.truncate(tmp_path / "bank" / "features.npy", 200)
    with pytest.raises(BankError, match="must hold its 10 finished rows; got fewer bytes"):
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
