"""Classes over two processes: value and gradients are those of one."""

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

import fusedloss
from fusedloss import AdditiveMargin, AngularMargin, ClassTemperature, Scale

ROWS, CLASSES, WIDTH, SPLIT = 12, 11, 5, 4


def tensors():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(ROWS, WIDTH, generator=generator), torch.randn(CLASSES, WIDTH, generator=generator)
    y = torch.randint(CLASSES, (ROWS,), generator=generator)
    y[2] = -100
    return x, w, y, torch.rand(CLASSES, generator=generator) + 0.5


def options(each, rows=slice(None)):
    """Keywords by name, per-class tensors of the classes in `rows`."""
    return {
        "plain": {},
        "weighted sum": {"weight": each[rows], "reduction": "sum"},
        "weighted mean": {"weight": each[rows], "sample_weight": torch.linspace(0.1, 2.0, ROWS)},
        "ArcFace": {"normalize": True, "terms": [AngularMargin(0.5), Scale(8.0)]},
        "per class": {"terms": [AdditiveMargin(each[rows]), ClassTemperature(each[rows])], "focal_gamma": 2.0},
        "each row": {"linear_bias": each[rows], "reduction": "none", "z_loss": 1e-2},
    }


def gradients(x, w, y, **keywords):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss = fusedloss.linear_cross_entropy(x, w, y, **keywords)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (x, w))


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    x, w, y, each = tensors()
    mine = slice(0, SPLIT) if rank == 0 else slice(SPLIT, CLASSES)
    found = {
        name: gradients(x, w[mine], y, group=dist.group.WORLD, **given) for name, given in options(each, mine).items()
    }
    errors = {}
    for name, arguments in {
        "label": (x, w[mine], torch.full_like(y, CLASSES)),
        "width": (x[:, : WIDTH - rank], w[mine, : WIDTH - rank], y),
    }.items():
        try:
            fusedloss.linear_cross_entropy(*arguments, group=dist.group.WORLD)
        except (IndexError, ValueError) as error:
            errors[name] = str(error)
    torch.save((found, errors), os.path.join(folder, str(rank)))
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=["", "1"], ids=["", "checked"])
def ranks(request):
    """What each process found, without and with FUSEDLOSS_CHECK."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("FUSEDLOSS_CHECK", request.param)
        processes.spawn(worker, (folder,), nprocs=2)
        return [torch.load(os.path.join(folder, str(rank))) for rank in range(2)]


@pytest.mark.parametrize("name", list(options(torch.ones(CLASSES))))
def test_two_processes_are_one(ranks, name):
    x, w, y, each = tensors()
    loss, of_x, of_w = gradients(x, w, y, **options(each)[name])
    for found, _ in ranks:
        torch.testing.assert_close(found[name][0], loss)
        torch.testing.assert_close(found[name][1], of_x)
    torch.testing.assert_close(torch.cat([found[name][2] for found, _ in ranks]), of_w)


def test_refusals(ranks):
    for _, errors in ranks:
        assert f"got label {CLASSES}" in errors["label"]
        assert "width and input's rows" in errors["width"]


def test_options_that_need_all_classes():
    x, w, y, _ = tensors()
    with pytest.raises(ValueError, match="sample_rate or return_stats"):
        fusedloss.linear_cross_entropy(x, w, y, group=object(), sample_rate=0.5)
    with pytest.raises(ValueError, match="label_smoothing or margin_penalty"):
        fusedloss.linear_cross_entropy(x, w, y, group=object(), label_smoothing=0.1)
