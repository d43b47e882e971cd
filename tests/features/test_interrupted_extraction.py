"""Interrupted extractions go on to the same bits, or are refused."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from feature_files import contents

from fusedloss.features import (
    BankError,
    FeatureBank,
    IncompleteBankError,
    extract,
    load_backbone,
    read_inputs,
)

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
    ended, whole = contents(target), contents(tmp_path / "whole")
    # Times and inodes of this copy of the files.
    ended.pop("verified.json"), whole.pop("verified.json")
    assert ended == whole
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
