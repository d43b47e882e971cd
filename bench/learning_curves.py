"""ArcFace and CosFace, fused and eager, train the same projection of frozen features: their curves and what they find.

    python -m bench.learning_curves demo/bank --steps 500

Both see the same batches from the same start. Prints the largest relative difference of the losses of a step, in
float32 and in float64, beside that of eager with itself over the rows of each batch in reverse. Then the losses'
means at both ends, and Recall@1 and MAP@R of held-out groups by the projection and by the features alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedloss
from bench.frozen import Frozen, apart, frozen
from fusedloss.features import FeatureBank
from fusedloss.retrieval import retrieval_report
from fusedloss.terms import MarginTerm

WIDTH, BATCH, SCALE = 128, 256, 16.0
LEARNING_RATE = 0.05
LOSSES = ("ArcFaceLoss", "CosFaceLoss")
FIGURES = ("recall_at_1", "map_at_r")


def eager(features: Tensor, weight: Tensor, target: Tensor, margin: MarginTerm) -> Tensor:
    """The same loss over stored logits."""
    cosine = F.linear(F.normalize(features), F.normalize(weight))
    return F.cross_entropy(SCALE * margin.apply(cosine, target), target)


class Run(NamedTuple):
    """How a projection is trained."""

    fused: bool
    dtype: torch.dtype = torch.float32
    reversed_rows: bool = False


def train(name: str, run: Run, data: Frozen, steps: int) -> tuple[Tensor, nn.Module]:
    """The loss of each step, and the projection."""
    torch.manual_seed(0)
    x, y = data.features.to(run.dtype), data.labels
    projection = nn.Linear(x.shape[1], WIDTH).to(run.dtype)
    loss = getattr(fusedloss, name)(WIDTH, int(y.max()) + 1, scale=SCALE).to(run.dtype)
    optimizer = torch.optim.SGD([*projection.parameters(), *loss.parameters()], lr=LEARNING_RATE, momentum=0.9)
    curve = []
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,))
        rows = rows.flip(0) if run.reversed_rows else rows
        features, target = projection(x[rows]), y[rows]
        value = loss(features, target) if run.fused else eager(features, loss.weight, target, loss.margin.current())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        curve.append(value.detach())
    return torch.stack(curve), projection


@torch.no_grad()
def retrieved(projection: nn.Module, data: Frozen) -> dict[str, float]:
    """Retrieval among the held-out rows."""
    return retrieval_report(projection(data.test_features), data.test_labels)


def compare(name: str, data: Frozen, steps: int) -> dict[str, float]:
    """The figures of one loss."""
    ours, projection = train(name, Run(fused=True), data, steps)
    theirs, usual = train(name, Run(fused=False), data, steps)
    again, _ = train(name, Run(fused=False, reversed_rows=True), data, steps)
    exact = [train(name, Run(fused, torch.float64), data, steps)[0] for fused in (True, False)]
    found = {
        "first loss": float(ours[:20].mean()),
        "last loss": float(ours[-20:].mean()),
        "fused to eager, float32": apart(ours, theirs),
        "eager to eager over reversed rows, float32": apart(again, theirs),
        "fused to eager, float64": apart(*exact),
    }
    reports = {
        "fused": retrieved(projection, data),
        "eager": retrieved(usual, data),
        "features alone": retrieved(nn.Identity(), data),
    }
    return found | {f"{key}, {who}": report[key] for key in FIGURES for who, report in reports.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.learning_curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bank", type=Path, help="folder of a feature bank; make demo writes that of the glyphs")
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    data = frozen(FeatureBank.open(options.bank))
    for name in LOSSES:
        print(f"{name}, {options.steps} steps")
        for figure, value in compare(name, data, options.steps).items():
            print(f"  {figure:<44} {value:.6g}")


if __name__ == "__main__":
    main()
