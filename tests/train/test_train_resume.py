"""Interrupted runs: killed at any moment, or out of disk space, they go on to the same bits."""

import errno
import functools
import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from fusedloss import atomic_io
from fusedloss.atomic_io import StorageError, read_tensors
from fusedloss.features import FeatureBank
from fusedloss.train import Recipe, fit

RECIPE = Recipe(head="mlp", hidden=(16,), loss="vace", epochs=6, batch_size=32, lr=(1e-3, 1e-2), keep="best")

# one process per moment, forked before torch starts threads; SIGKILL at the n-th call of a function of os
CHILD = """
import os, signal, sys
bank, run, recipe, *moments = sys.argv[1:]
from sklearn.model_selection import GroupShuffleSplit
from fusedloss.features import FeatureBank
from fusedloss.train import Recipe, fit

def die_at(function, calls):
    original, left = getattr(os, function), [calls]
    def dying(*arguments, **keywords):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)
    setattr(os, function, dying)

for moment in moments:
    process = os.fork()
    if process == 0:
        function, calls = moment.split(":")
        die_at(function, int(calls))
        recipe = Recipe.from_file(recipe)
        fit(FeatureBank.open(bank), recipe, folder=run, resume=True, device="cpu", pictures=False)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


def small_bank():
    random = np.random.RandomState(0)
    labels = np.repeat(np.arange(4), [60, 30, 20, 10])
    return FeatureBank.from_arrays(random.randn(120, 6) + labels[:, None], labels, groups=np.arange(120) // 2)


def result_bits(folder):
    return (folder / "head.safetensors").read_bytes(), (folder / "predictions.npz").read_bytes()


def scores(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("train_s", "ms_step")} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    bank = small_bank().save(folder / "bank")
    fit(bank, RECIPE, folder=folder / "run", device="cpu", pictures=False)
    (folder / "recipe.json").write_text(json.dumps(RECIPE.to_dict()))
    return folder


def test_killed_at_many_moments_a_run_ends_with_the_same_bits(uninterrupted, tmp_path):
    """SIGKILL before and after flushes and renames, of tensors and of JSON, early, late, between trials."""
    run = tmp_path / "run"
    moments = [
        "fsync:0",
        "fsync:3",
        "replace:4",
        "fsync:9",
        "replace:7",
        "fsync:17",
        "replace:2",
        "fsync:6",
        "fsync:13",
    ]
    command = [
        sys.executable,
        "-c",
        CHILD,
        uninterrupted / "bank",
        run,
        uninterrupted / "recipe.json",
        *moments,
        f"fsync:{10**9}",
    ]
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert ended.stdout.split() == [str(-signal.SIGKILL)] * len(moments) + ["0"], ended.stderr
    assert result_bits(run) == result_bits(uninterrupted / "run")
    assert scores(run) == scores(uninterrupted / "run")
    for trial in ("lr-0.001", "lr-0.01"):
        first, second = (
            read_tensors(f / "trials" / trial / "checkpoint-00006.safetensors") for f in (run, uninterrupted / "run")
        )
        assert all(np.array_equal(first[name].numpy(), second[name].numpy()) for name in first | second)
        assert len(list((run / "trials" / trial).iterdir())) == 3


@pytest.mark.parametrize("settings", [{"head": "linear"}, {"head": "cosine", "loss": "ce"}, {"head": "mlp"}], ids=str)
def test_an_exception_in_any_epoch_can_be_resumed(uninterrupted, tmp_path, settings):
    recipe = RECIPE.replace(lr=1e-2, keep="last", **settings)
    bank = FeatureBank.open(uninterrupted / "bank")
    fit(bank, recipe, folder=tmp_path / "whole", device="cpu", pictures=False)

    def stop(epoch, lr, row):
        if row["epoch"] == epoch:
            raise KeyboardInterrupt

    options = {"folder": tmp_path / "run", "resume": True, "device": "cpu", "pictures": False}
    for epoch in (1, 3, 4):
        with pytest.raises(KeyboardInterrupt):
            fit(bank, recipe, on_epoch=functools.partial(stop, epoch), **options)
    fit(bank, recipe, **options)
    assert result_bits(tmp_path / "run") == result_bits(tmp_path / "whole")


def test_a_full_disk_is_named_and_keeps_the_last_checkpoint(uninterrupted, tmp_path, monkeypatch):
    bank, run, recipe = FeatureBank.open(uninterrupted / "bank"), tmp_path / "run", RECIPE.replace(lr=1e-2)
    real, left = os.fsync, [9]

    def full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(atomic_io.os, "fsync", full)
    with pytest.raises(StorageError, match=r"No space left on device: .*what was complete before is untouched"):
        fit(bank, recipe, folder=run, device="cpu", pictures=False)
    monkeypatch.undo()
    epoch = json.loads((run / "checkpoint.json").read_text())["epoch"]
    assert epoch >= 1
    fit(bank, recipe, folder=run, resume=True, device="cpu", pictures=False)
    fit(bank, recipe, folder=tmp_path / "whole", device="cpu", pictures=False)
    assert result_bits(run) == result_bits(tmp_path / "whole")


def test_a_file_size_limit_is_an_error_of_one_line(uninterrupted, tmp_path):
    """The kernel refuses the write itself: RLIMIT_FSIZE below the size of a checkpoint."""
    command = [
        sys.executable,
        "-m",
        "fusedloss",
        "train",
        uninterrupted / "bank",
        tmp_path / "run",
        "--no-pictures",
        "--recipe",
        uninterrupted / "recipe.json",
        "--device",
        "cpu",
    ]
    limited = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
    )
    assert limited.returncode == 2 and "could not be written" in limited.stderr.splitlines()[-1]
    assert not list((tmp_path / "run").rglob("checkpoint.json"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("checkpoint.json", "{", "is not JSON"),
        ("checkpoint-00003.safetensors", "x", "is not a safetensors file"),
    ],
)
def test_a_damaged_checkpoint_is_named(uninterrupted, tmp_path, name, content, message):
    bank, recipe = FeatureBank.open(uninterrupted / "bank"), RECIPE.replace(lr=1e-2, epochs=3)
    fit(bank, recipe, folder=tmp_path, device="cpu", pictures=False)
    (tmp_path / "result.json").unlink()
    (tmp_path / name).write_text(content)
    with pytest.raises(StorageError, match=message):
        fit(bank, recipe, folder=tmp_path, resume=True, device="cpu", pictures=False)


@pytest.mark.parametrize("name", ["checkpoint.json", "checkpoint-00003.safetensors"])
def test_a_flipped_bit_in_a_checkpoint_is_found(uninterrupted, tmp_path, name):
    bank, recipe = FeatureBank.open(uninterrupted / "bank"), RECIPE.replace(lr=1e-2, epochs=3)
    fit(bank, recipe, folder=tmp_path, device="cpu", pictures=False)
    (tmp_path / "result.json").unlink()
    content = bytearray((tmp_path / name).read_bytes())
    # The last digit of the epoch's number of steps, or the last number of the last tensor.
    position = content.index(b'"steps": ') + 9 if name.endswith("json") else len(content) - 1
    content[position] ^= 1
    (tmp_path / name).write_bytes(bytes(content))
    with pytest.raises(StorageError, match=rf"{name} must have the sha256 .*; got another \(damaged or edited"):
        fit(bank, recipe, folder=tmp_path, resume=True, device="cpu", pictures=False)
