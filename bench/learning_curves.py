"""ArcFace and CosFace, fused and eager, train the same network on the glyph images: their curves and what they find.

    python -m bench.learning_curves --steps 500

Prints the largest relative difference of the losses of a step: in float64, and in float32 beside that of eager with
itself over the rows in reverse.
Then the losses' means at both ends, and Recall@1 and MAP@R of held-out images by the network's features.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedloss
from fusedloss.retrieval import retrieval_report
from fusedloss.terms import MarginTerm

GLYPHS = Path(__file__).parents[1] / "examples" / "glyphs" / "glyphs.npz"
WIDTH, BATCH, SCALE, HELD_OUT = 128, 256, 16.0, 4
LEARNING_RATE = 0.05


def images() -> tuple[Tensor, Tensor]:
    """Standardised pixels ``(N, P)`` and labels."""
    stored = np.load(GLYPHS)
    pixels = torch.from_numpy(stored["images"].reshape(len(stored["images"]), -1).astype(np.float32))
    return (pixels - pixels.mean()) / pixels.std(), torch.from_numpy(stored["labels"].astype(np.int64))


def network(pixels: int) -> nn.Module:
    # Without ReLUs: each that flips makes two runs that differ by a rounding part for good.
    return nn.Linear(pixels, WIDTH)


def eager(features: Tensor, weight: Tensor, target: Tensor, margin: MarginTerm) -> Tensor:
    """The same loss over stored logits."""
    cosine = F.linear(F.normalize(features), F.normalize(weight))
    return F.cross_entropy(SCALE * margin.apply(cosine, target), target)


class Run(NamedTuple):
    """How a network is trained."""

    fused: bool
    dtype: torch.dtype = torch.float32
    reversed_rows: bool = False


def train(name: str, run: Run, steps: int) -> tuple[Tensor, dict[str, float]]:
    """The loss of each step, and retrieval among the images held out."""
    torch.manual_seed(0)
    x, y = images()
    held_out = torch.arange(len(y)) % HELD_OUT == 0
    layers, x = network(x.shape[1]).to(run.dtype), x.to(run.dtype)
    loss = getattr(fusedloss, name)(WIDTH, int(y.max()) + 1, scale=SCALE).to(run.dtype)
    optimizer = torch.optim.SGD([*layers.parameters(), *loss.parameters()], lr=LEARNING_RATE, momentum=0.9)
    rows, curve = (~held_out).nonzero().flatten(), []
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (BATCH,))]
        batch = batch.flip(0) if run.reversed_rows else batch
        features = layers(x[batch])
        value = loss(features, y[batch]) if run.fused else eager(features, loss.weight, y[batch], loss.margin.current())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        curve.append(value.detach())
    layers.eval()
    with torch.no_grad():
        return torch.stack(curve), retrieval_report(layers(x[held_out]), y[held_out])


def apart(curve: Tensor, other: Tensor) -> float:
    """The largest relative difference of a step."""
    return float(((curve - other) / other).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.learning_curves", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    steps = parser.parse_args().steps
    for name in ("ArcFaceLoss", "CosFaceLoss"):
        ours, found = train(name, Run(fused=True), steps)
        theirs, usual = train(name, Run(fused=False), steps)
        again, _ = train(name, Run(fused=False, reversed_rows=True), steps)
        exact = [train(name, Run(fused, torch.float64), steps)[0] for fused in (True, False)]
        print(f"{name}, {steps} steps: loss {ours[:20].mean():.3f} to {ours[-20:].mean():.3f}")
        print(f"  float64: fused and eager differ by at most {apart(*exact):.0e}")
        print(f"  float32: fused and eager {apart(ours, theirs):.0e}, eager and itself {apart(again, theirs):.0e}")
        for key in ("recall_at_1", "map_at_r"):
            print(f"  {key}: fused {found[key]:.4f}, eager {usual[key]:.4f}")


if __name__ == "__main__":
    main()
