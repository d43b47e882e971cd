"""Trains a projection of frozen features with fused and with eager supervised contrast, from the same start.

    python -m bench.supcon_learning demo/bank --steps 500

Both see the same batches. Prints the largest relative difference of the losses of a step, beside the one that an ulp in
the initial weights makes to the eager curve, and Recall@1 of either projection on held-out groups: the share of rows
whose nearest other row has their class. The projections: one linear layer, and two with a ReLU between them, in
float32 and in float64; a ReLU that flips makes two runs that differ by a rounding part for good.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedloss
from bench.frozen import Frozen, apart, frozen
from fusedloss.features import FeatureBank

Loss = Callable[[Tensor, Tensor], Tensor]
HIDDEN, WIDTH, TEMPERATURE = 256, 128, 0.1
PROJECTIONS = ((1, torch.float32), (2, torch.float32), (2, torch.float64))


def eager(features: Tensor, labels: Tensor) -> Tensor:
    """The usual code with its N x N matrices; anchors without positives are left out of the mean, as in ours."""
    x = F.normalize(features, dim=1)
    others = ~torch.eye(len(x), dtype=torch.bool)
    similarity = x @ x.t() / TEMPERATURE
    positive = (labels.unsqueeze(1) == labels) & others
    log_p = similarity - similarity.masked_fill(~others, -torch.inf).logsumexp(1, keepdim=True)
    count = positive.sum(1)
    return -((positive * log_p).sum(1) / count.clamp(min=1)).sum() / (count > 0).sum()


def fused(features: Tensor, labels: Tensor) -> Tensor:
    return fusedloss.supcon(features, labels, temperature=TEMPERATURE)


def projection(width: int, layers: int, dtype: torch.dtype) -> nn.Module:
    """The projection head, alike in every call."""
    torch.manual_seed(0)
    if layers == 1:
        return nn.Linear(width, WIDTH).to(dtype)
    return nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH)).to(dtype)


def train(model: nn.Module, loss_of: Loss, features: Tensor, labels: Tensor, steps: int, batch_size: int) -> Tensor:
    """The loss of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = torch.Generator().manual_seed(1)
    curve = features.new_zeros(steps)
    for step in range(steps):
        rows = torch.randperm(len(features), generator=order)[:batch_size]
        optimizer.zero_grad()
        loss = loss_of(model(features[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        curve[step] = loss.detach()
    return curve


@torch.no_grad()
def recall_at_1(model: nn.Module, features: Tensor, labels: Tensor) -> float:
    """Share of rows whose nearest other row, by cosine, has their class."""
    unit = F.normalize(model(features), dim=1)
    right = 0
    for rows in torch.arange(len(unit)).split(1024):
        cosine = unit[rows] @ unit.t()
        cosine[torch.arange(len(rows)), rows] = -2
        right += int((labels[cosine.argmax(1)] == labels[rows]).sum())
    return right / len(unit)


def compare(data: Frozen, layers: int, dtype: torch.dtype, steps: int, batch_size: int) -> dict[str, float]:
    """The figures of one kind of projection."""
    features, test_features = data.features.to(dtype), data.test_features.to(dtype)
    found, curves = {}, {}
    for name, loss in (("fused", fused), ("eager", eager), ("eager, an ulp off", eager)):
        model = projection(features.shape[1], layers, dtype)
        if name.endswith("off"):
            with torch.no_grad():
                weight = next(model.parameters())
                weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))
        curves[name] = train(model, loss, features, data.labels, steps, min(batch_size, len(features)))
        found[f"Recall@1, {name}"] = recall_at_1(model, test_features, data.test_labels)
    found["first loss"], found["last loss"] = float(curves["fused"][0]), float(curves["fused"][-10:].mean())
    found["fused to eager"] = apart(curves["fused"], curves["eager"])
    found["eager to an ulp off"] = apart(curves["eager, an ulp off"], curves["eager"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.supcon_learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bank", type=Path, help="folder of a feature bank; make demo writes that of the glyphs")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=256)
    options = parser.parse_args()
    data = frozen(FeatureBank.open(options.bank))
    alone = recall_at_1(nn.Identity(), data.test_features, data.test_labels)
    print(f"{'Recall@1, features alone':<42} {alone:.6g}")
    for layers, dtype in PROJECTIONS:
        print(f"{layers} layers, {str(dtype).removeprefix('torch.')}, {options.steps} steps")
        for name, value in compare(data, layers, dtype, options.steps, options.batch_size).items():
            print(f"  {name:<40} {value:.6g}")


if __name__ == "__main__":
    main()
