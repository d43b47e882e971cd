"""The step of the trainer: the bits of a plain loop, features of 16 bits, and its replay as a CUDA graph."""

import contextlib
import json

import numpy as np
import pytest
import torch

from fusedloss.atomic_io import StorageError
from fusedloss.features import FeatureBank
from fusedloss.train import Recipe, fit
from fusedloss.train.buffered_step import BufferedStep
from fusedloss.train.data import TrainingData
from fusedloss.train.heads import build_head
from fusedloss.train.objectives import build_objective
from fusedloss.train.step import adamw, gradient_step

ROWS, WIDTH, CLASSES, BATCH = 70, 12, 5, 16
RECIPES = [
    {},
    {"loss": "vace"},
    {"loss": "fedlas"},
    {"head": "cosine"},
    {"head": "mlp", "hidden": (8,)},
    {"head": "mlp", "hidden": (8,), "supcon": 0.5, "supcon_projection": 8},
]


def rows_and_labels(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(ROWS) % CLASSES
    centres = 2 * torch.randn(CLASSES, WIDTH, generator=generator)
    return (centres[labels] + torch.randn(ROWS, WIDTH, generator=generator)).to(device), labels.to(device)


def bank():
    features, labels = rows_and_labels()
    return FeatureBank.from_arrays(features.numpy(), labels.numpy(), groups=np.arange(ROWS) // 2)


def parts(settings, features, labels):
    """Head, objective and all modules that an optimizer steps, from the same random numbers every time."""
    torch.manual_seed(1)
    recipe = Recipe(dropout=0.0, **settings)
    data = TrainingData(features, labels, torch.bincount(labels, minlength=CLASSES))
    head = build_head(recipe, WIDTH, CLASSES).to(features.device)
    objective = build_objective(recipe, data)
    modules = [head, objective.loss, objective.auxiliary or torch.nn.Module()]
    return head, objective, modules


def batches(epochs=3):
    generator = torch.Generator().manual_seed(2)
    rows = [part for _ in range(epochs) for part in torch.randperm(ROWS, generator=generator).split(BATCH)]
    return list(zip(rows, torch.linspace(1e-2, 1e-3, len(rows)).tolist(), strict=True))


def plain_loop(settings, features, labels):
    """Fresh batches, an optimizer that is told its learning rate as a float; weights and summed losses."""
    head, objective, modules = parts(settings, features, labels)
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if (p.ndim > 1) == wide], "weight_decay": 0.1 * wide}
        for wide in (True, False)
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1.0, fused=True)
    gradients = gradient_step(head, objective, BATCH)
    total = torch.zeros(())
    for rows, lr in batches():
        for group in optimizer.param_groups:
            group["lr"] = lr
        total += gradients(features[rows], labels[rows]) * len(rows)
        optimizer.step()
    return [*(p.detach() for p in parameters), total]


def buffered(settings, features, labels, capture=False):
    head, objective, modules = parts(settings, features, labels)
    optimizer = adamw(modules, 0.1)
    gradients = gradient_step(head, objective, BATCH)
    step = BufferedStep(features, labels, gradients, optimizer, BATCH, capture)
    for rows, lr in batches():
        step(rows.to(features.device), lr)
    parameters = [p.detach() for module in modules for p in module.parameters() if p.requires_grad]
    return [*parameters, step.total], step


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("settings", RECIPES, ids=str)
def test_buffered_steps_have_the_bits_of_a_plain_loop(settings):
    given = rows_and_labels()
    assert same_bits(buffered(settings, *given)[0], plain_loop(settings, *given))


def test_a_replayed_step_has_them_too(monkeypatch):
    """With a graph that runs the step again, as a GPU would: three steps, one recording, and short batches beside."""
    recorded, replayed = [], []

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def __init__(self, step):
            self.step = step

        def replay(self):
            replayed.append(len(self.step.rows))
            self.step._run(len(self.step.rows))

    def record(step, stream):
        recorded.append(stream)
        return Graph(step)

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(BufferedStep, "_captured", record)
    features, labels = rows_and_labels()
    head, objective, modules = parts({"loss": "vace"}, features, labels)
    optimizer = adamw(modules, 0.1)
    step = BufferedStep(features, labels, gradient_step(head, objective, BATCH), optimizer, BATCH)
    step.stream = Stream()
    for rows, lr in batches():
        step(rows, lr)
    assert len(recorded) == 1 and replayed == [BATCH] * (3 * (ROWS // BATCH) - 3)
    assert same_bits(
        [*(p.detach() for p in head.parameters()), step.total], plain_loop({"loss": "vace"}, features, labels)
    )


def test_capture_needs_a_gpu():
    with pytest.raises(ValueError, match="capture must be False unless the features are on a GPU; got features on cpu"):
        fit(bank(), Recipe(epochs=1, capture=True), device="cpu")


@pytest.mark.parametrize("settings", RECIPES, ids=str)
def test_sixteen_bits_follow_thirty_two(settings):
    features, labels = rows_and_labels()
    narrow = features.bfloat16()
    exact = [value.norm() for value in buffered(settings, narrow.float(), labels)[0]]
    found = [value.norm() for value in buffered(settings, narrow, labels)[0]]
    assert all(value.dtype == torch.float32 for value in found)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.02)


def test_a_recipe_in_sixteen_bits_learns_and_repeats_to_the_bit():
    recipe = Recipe(epochs=6, batch_size=BATCH, lr=5e-2, loss="vace", precision="bfloat16")
    first, second = (fit(bank(), recipe, device="cpu") for _ in range(2))
    assert first.history[-1]["loss"] < 0.5 * first.history[0]["loss"]
    weights = [list(result.predictor.head.state_dict().values()) for result in (first, second)]
    assert same_bits(*weights) and weights[0][0].dtype == torch.float32


def test_another_device_does_not_go_on_with_a_run(tmp_path):
    def stop(lr, row):
        raise KeyboardInterrupt

    options = {"folder": tmp_path / "run", "resume": True, "device": "cpu", "pictures": False}
    with pytest.raises(KeyboardInterrupt):
        fit(bank(), Recipe(epochs=2), on_epoch=stop, **options)
    (path,) = (tmp_path / "run").glob("**/checkpoint.json")
    values = json.loads(path.read_text())
    assert values["device"] == "cpu"
    # As checkpoints were before they had a sha256.
    del values["sha256"]
    path.write_text(json.dumps(values | {"device": "cuda"}))
    with pytest.raises(StorageError, match=r"device must be cuda, whose random state .* holds; got cpu"):
        fit(bank(), Recipe(epochs=2), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", RECIPES, ids=str)
def test_a_captured_step_has_the_bits_of_the_same_step_on_a_gpu(settings, dtype):
    features, labels = rows_and_labels("cuda")
    features = features.to(dtype)
    plain, _ = buffered(settings, features, labels)
    captured, step = buffered(settings, features, labels, capture=True)
    assert step.graph is not None
    assert same_bits(plain, captured)


@pytest.mark.gpu
@pytest.mark.parametrize("capture", [False, True])
def test_an_epoch_waits_for_nothing_on_a_gpu(capture):
    features, labels = rows_and_labels("cuda")
    head, objective, modules = parts({"loss": "vace"}, features, labels)
    step = BufferedStep(features, labels, gradient_step(head, objective, BATCH), adamw(modules, 0.1), BATCH, capture)
    moved = [(rows.cuda(), lr) for rows, lr in batches()]
    for rows, lr in moved[:5]:
        step(rows, lr)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rows, lr in moved[5:]:
            step(rows, lr)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_captured_run_is_resumed_to_the_same_bits(tmp_path):
    recipe = Recipe(epochs=3, batch_size=8, head="mlp", hidden=(8,), lr=1e-2, capture=True)

    def stop(lr, row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    whole = fit(bank(), recipe, device="cuda")
    options = {"folder": tmp_path / "run", "resume": True, "device": "cuda", "pictures": False}
    with pytest.raises(KeyboardInterrupt):
        fit(bank(), recipe, on_epoch=stop, **options)
    resumed = fit(bank(), recipe, **options)
    weights = [list(result.predictor.head.state_dict().values()) for result in (whole, resumed)]
    assert same_bits(*weights)
