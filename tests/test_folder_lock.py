import subprocess
import sys

import numpy as np
import pytest

from fusedloss.atomic_io import StorageError
from fusedloss.features import FeatureBank
from fusedloss.folder_lock import FolderLock
from fusedloss.train import Recipe, fit
from fusedloss.train.sweep import sweep

HOLDER = """
import sys, time
from pathlib import Path
from fusedloss.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""
ONE_AT_A_TIME = r"folder must be written by one process at a time; got .*another process"


def bank():
    random = np.random.RandomState(0)
    return FeatureBank.from_arrays(random.randn(90, 4), np.arange(90) % 3)


def test_a_second_process_is_told_and_a_killed_one_does_not_block(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        for _ in range(20):
            with pytest.raises(StorageError, match=ONE_AT_A_TIME):
                fit(bank(), Recipe(epochs=1), folder=tmp_path / "run", resume=True, device="cpu", pictures=False)
        with pytest.raises(StorageError, match=ONE_AT_A_TIME):
            sweep(bank(), {"a": Recipe(epochs=1)}, [0], tmp_path / "run", device="cpu", pictures=False)
        with pytest.raises(StorageError, match=ONE_AT_A_TIME):
            FeatureBank.create(tmp_path / "run", 2, 1, labels=[0, 0], class_names=["a"])
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    fit(bank(), Recipe(epochs=1), folder=tmp_path / "run", resume=True, device="cpu", pictures=False)
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_run_that_fails_lets_go_of_its_folder(tmp_path):
    def fails(lr, row):
        raise KeyError("stopped")

    with pytest.raises(KeyError):
        fit(bank(), Recipe(epochs=1), folder=tmp_path, device="cpu", pictures=False, on_epoch=fails)
    with FolderLock(tmp_path), pytest.raises(StorageError, match=ONE_AT_A_TIME):
        FolderLock(tmp_path).acquire()
    fit(bank(), Recipe(epochs=1), folder=tmp_path, resume=True, device="cpu", pictures=False)
