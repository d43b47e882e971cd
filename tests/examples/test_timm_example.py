"""The example keeps its promises: statistics move, the loss falls, a checkpoint resumes to the same bits."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")

EXAMPLE = Path(__file__).parents[2] / "examples" / "timm_vace.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("timm_vace", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def whole(example, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run.pt"
    losses, loss = example.main(["--steps", "12", "--batch-size", "16", "--checkpoint", str(path)])
    return losses, loss, torch.load(path, weights_only=True)


def test_the_loss_falls_and_statistics_move(whole):
    losses, loss, _ = whole
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    assert int(loss.updates) == 12
    assert int(loss.statistics.count.sum()) == 12 * 16
    assert loss.temperature.std() > 0


def test_a_resumed_run_reaches_the_same_bits(example, whole, tmp_path):
    losses, loss, final = whole
    path = tmp_path / "run.pt"
    example.main(["--steps", "5", "--batch-size", "16", "--checkpoint", str(path)])
    resumed_losses, resumed = example.main(["--steps", "12", "--batch-size", "16", "--checkpoint", str(path)])
    assert resumed_losses == losses
    again = torch.load(path, weights_only=True)
    for name, tensor in final["model"].items():
        assert torch.equal(again["model"][name], tensor), name
    for name, tensor in loss.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
