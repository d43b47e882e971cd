"""Trains a projection of frozen features with fused and with eager supervised contrast, from the same start.

    python -m bench.supcon_learning examples/output/bank --steps 500

Both see the same batches. Prints how far the two loss curves are apart, the largest change that one ulp in the initial
weights makes to the eager curve, and Recall@1 of either projection on held-out groups: the share of rows whose nearest
other row has their class.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedloss
from fusedloss.features import FeatureBank
from fusedloss.train.data import gather
from fusedloss.train.heads import FeatureTransform
from fusedloss.train.split import split_rows

Loss = Callable[[Tensor, Tensor], Tensor]
WIDTH, TEMPERATURE = 128, 0.1


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


def projection(width: int) -> nn.Sequential:
    """The projection head, alike in every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, WIDTH))


def train(model: nn.Module, loss_of: Loss, features: Tensor, labels: Tensor, steps: int, batch_size: int) -> Tensor:
    """The loss of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = torch.Generator().manual_seed(1)
    curve = torch.zeros(steps)
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


def compare(bank: FeatureBank, steps: int, batch_size: int) -> dict[str, float]:
    """The figures that ``main`` prints."""
    split = split_rows(bank.labels, bank.groups, test_fraction=0.2, val_fraction=0.0, seed=42)
    labels = torch.as_tensor(bank.labels[:].astype("int64"))
    transform = FeatureTransform(bank.in_features, normalize=False)
    train_features = gather(bank.features, split.train)
    transform.standardize_by(train_features)
    train_features, test_features = transform(train_features), transform(gather(bank.features, split.test))
    train_labels, test_labels = labels[split.train], labels[split.test]
    found, curves = {}, {}
    for name, loss in (("fused", fused), ("eager", eager), ("eager, one ulp off", eager)):
        model = projection(bank.in_features)
        if name.endswith("off"):
            with torch.no_grad():
                weight = next(model.parameters())
                weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))
        curves[name] = train(model, loss, train_features, train_labels, steps, min(batch_size, len(train_features)))
        found[f"Recall@1, {name}"] = recall_at_1(model, test_features, test_labels)
    found["Recall@1, features alone"] = recall_at_1(nn.Identity(), test_features, test_labels)
    found["first loss"], found["last loss"] = float(curves["fused"][0]), float(curves["fused"][-10:].mean())
    found["largest difference, fused to eager"] = float((curves["fused"] - curves["eager"]).abs().max())
    found["largest difference, eager to one ulp off"] = float(
        (curves["eager, one ulp off"] - curves["eager"]).abs().max()
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.supcon_learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bank", type=Path, help="folder of a feature bank; make demo writes that of the glyphs")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=512)
    options = parser.parse_args()
    for name, value in compare(FeatureBank.open(options.bank), options.steps, options.batch_size).items():
        print(f"{name:<42} {value:.6g}")


if __name__ == "__main__":
    main()
