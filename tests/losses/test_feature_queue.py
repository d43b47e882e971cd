"""FeatureQueue: first in, first out, resumed to the same rows, alike on every rank; contrast over process groups."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedloss

ROOT = Path(__file__).parents[2]


def pushes(counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 3, generator=generator), torch.randint(9, (n,), generator=generator)) for n in counts]


@pytest.mark.parametrize("counts", [(2, 2), (4, 4, 4), (7,), (30,), (3, 9, 1, 0, 5), (7, 7)])
def test_it_holds_the_last_rows(counts):
    queue = fusedloss.FeatureQueue(3, 7)
    given = pushes(counts)
    for features, labels in given:
        queue.push(features, labels)
    held = sorted(zip(queue.features.tolist(), queue.labels.tolist(), strict=True))
    features, labels = (torch.cat(parts)[-7:].tolist() for parts in zip(*given, strict=True))
    assert held == sorted(zip(features, labels, strict=True))
    assert len(queue) == min(7, sum(counts))


def test_a_resumed_queue_goes_on_alike():
    first = fusedloss.FeatureQueue(3, 7)
    before, after = pushes((5, 4)), pushes((3, 6), seed=1)
    for rows in before:
        first.push(*rows)
    second, third = fusedloss.FeatureQueue(3, 7), copy.deepcopy(first)
    second.load_state_dict(first.state_dict())
    for queue in (first, second, third):
        for rows in after:
            queue.push(*rows)
        assert torch.equal(queue.features, first.features) and torch.equal(queue.labels, first.labels)
    first.reset()
    assert len(first) == 0 and first.features.shape == (0, 3)


def test_as_contrast_from_the_first_step():
    queue, x, y = fusedloss.FeatureQueue(3, 40), *pushes((12,))[0]
    x.requires_grad_()
    loss = fusedloss.SupConLoss()
    torch.testing.assert_close(loss(x, y, contrast=queue.features, contrast_labels=queue.labels), loss(x, y))
    queue.push(x, y)
    value = loss(x, y, contrast=queue.features, contrast_labels=queue.labels)
    queue.push(x, y)  # before the backward, which must not see it
    value.backward()
    assert x.grad.any() and not queue.features.requires_grad


def test_bad_rows_are_refused():
    queue = fusedloss.FeatureQueue(3, 7)
    for features, labels, words in (
        (torch.ones(2, 4), torch.zeros(2, dtype=torch.int64), r"features must have shape \(rows, 3\)"),
        (torch.ones(2, 3), torch.zeros(3, dtype=torch.int64), r"labels must have shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            queue.push(features, labels)
    with pytest.raises(ValueError, match="size must be at least 1"):
        fusedloss.FeatureQueue(3, 0)


# Each rank holds another number of rows; rank 0 compares with one process that holds them all.
RANK = """
import os, sys, torch, torch.distributed as dist, fusedloss
rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
group = dist.group.WORLD
generator = torch.Generator().manual_seed(0)
counts = [5, 9, 4][:size]
whole = torch.randn(sum(counts), 2, 6, generator=generator, dtype=torch.float64)
labels = torch.randint(4, (len(whole),), generator=generator)
centres = torch.randn(4, 6, generator=generator, dtype=torch.float64)
weight = torch.rand(4, generator=generator, dtype=torch.float64)
mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))

def run(rows, y, group, name):
    x, p = rows.clone().requires_grad_(), centres.clone().requires_grad_()
    t = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    options = {
        "labels": {}, "simclr": {"y": None}, "sum": {"reduction": "sum"}, "all": {"reduction": "mean_all"},
        "one": {"contrast_mode": "one"}, "ignored": {"ignore_index": 2},
        "centres": {"prototypes": p, "prototype_labels": torch.arange(4), "class_balance": True},
        "weights": {"class_weight": weight, "focal_gamma": 1.5},
    }[name]
    loss = fusedloss.supcon(x, options.pop("y", y), temperature=t, group=group, **options)
    wanted = [x, t] + ([p] if name == "centres" else [])
    return loss.detach(), *torch.autograd.grad(loss * 3, wanted)

for name in ("labels", "simclr", "sum", "all", "one", "ignored", "centres", "weights"):
    truth = run(whole, labels, None, name)
    found = run(whole[mine], labels[mine], group, name)
    for index, (ours, theirs) in enumerate(zip(found, truth)):
        torch.testing.assert_close(ours, theirs[mine] if index == 1 else theirs, msg=lambda m: f"{name} {index}: {m}")
queue = fusedloss.FeatureQueue(6, 11, group=group)
alone = fusedloss.FeatureQueue(6, 11)
for step in range(3):
    queue.push(whole[mine, 0].float() + step, labels[mine])
    alone.push(whole[:, 0].float() + step, labels)
assert torch.equal(queue.features, alone.features) and torch.equal(queue.labels, alone.labels)
dist.destroy_process_group()
# Without the interpreter's own end, in which gloo's threads now and then abort the process.
os._exit(0)
"""


def test_several_processes_are_as_one(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), "3", str(tmp_path / "store")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], "\n".join(errors)
