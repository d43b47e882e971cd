"""Logistic regression over a path of C against scikit-learn's, in turn in one process, and baselines on the same rows.

    python -m bench.solvers --case glyphs --bank demo/bank      # a bank made by examples/demo.py
    python -m bench.solvers --case synthetic                    # 100,000 x 768, 1000 classes: hours for scikit-learn
    python -m bench.solvers --quick                             # a small synthetic set; writes nothing

scikit-learn runs a warm-started path in float32 and in float64 at each tolerance of a falling list, until its objective
is within 1e-6 of the smallest known at every C. Where none gets there the times are lower bounds, and the column
`reached` says so. C is chosen by negative log-likelihood on the same validation rows.
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import measure
from fusedloss.features import FeatureBank
from fusedloss.train.solvers import (
    LogisticSettings,
    NearestNeighbours,
    TensorRows,
    fit_class_means,
    fit_gda,
    fit_logistic_path,
)
from fusedloss.train.split import split_rows

RESULTS = Path(__file__).parent / "results"
GAP = 1e-6
TOLERANCES = (1e-4, 1e-5, 1e-6)
PATHS = {"glyphs": np.logspace(-4, -0.5, 8), "synthetic": np.logspace(-4, 0, 8)}
TEMPERATURES = torch.logspace(-2, 2, 41)


class Part(NamedTuple):
    """Features ``(N, D)`` and labels ``(N,)``."""

    features: Tensor
    labels: Tensor


class Data(NamedTuple):
    train: Part
    val: Part
    test: Part
    num_classes: int


class PathFit(NamedTuple):
    """Seconds of a whole path, and weight and bias of each C in float64."""

    seconds: float
    heads: list[tuple[Tensor, Tensor]]
    iterations: list[int]


def glyphs(folder: Path) -> Data:
    """The bank's raw features; a fifth of the groups each for validation and test."""
    bank = FeatureBank.open(folder)
    split = split_rows(bank.labels, bank.groups, test_fraction=0.2, val_fraction=0.2)
    labels = np.asarray(bank.labels).astype(np.int64)

    def part(rows: np.ndarray) -> Part:
        features = np.asarray(bank.features[rows], dtype=np.float32)
        return Part(torch.from_numpy(features), torch.from_numpy(labels[rows]))

    return Data(part(split.train), part(split.val), part(split.test), bank.num_classes)


def synthetic(rows: int, width: int, num_classes: int) -> Data:
    """Gaussian classes whose means and noise have variances falling as 1 / j along random axes, about a common mean."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, width + 1).float().rsqrt()
    axes = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    means = 0.8 * scale * torch.randn(num_classes, width, generator=generator)

    def part(count: int) -> Part:
        labels = torch.randint(0, num_classes, (count,), generator=generator)
        noise = scale * torch.randn(count, width, generator=generator)
        return Part((means[labels] + noise) @ axes.t() + 0.5, labels)

    return Data(part(rows), part(rows // 10), part(rows // 10), num_classes)


def ours(data: Data, path: np.ndarray) -> PathFit:
    """float32, a tenth of the gap as the tolerance."""
    started = time.perf_counter()
    fits = fit_logistic_path(TensorRows(*data.train), data.num_classes, path, LogisticSettings(tolerance=GAP / 10))
    seconds = time.perf_counter() - started
    return PathFit(
        seconds, [(fit.weight.double(), fit.bias.double()) for fit in fits], [fit.evaluations for fit in fits]
    )


def of_sklearn(data: Data, path: np.ndarray, tolerance: float, dtype: type) -> PathFit:
    """Each C from the one before; classes without rows get weight 0 and a low bias."""
    from sklearn.linear_model import LogisticRegression

    features, labels = data.train.features.numpy().astype(dtype), data.train.labels.numpy()
    model = LogisticRegression(warm_start=True, max_iter=10000, tol=tolerance)
    seconds, heads, iterations = 0.0, [], []
    for c in path:
        model.C = float(c)
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(features, labels)
        seconds += time.perf_counter() - started
        weight = torch.zeros(data.num_classes, features.shape[1], dtype=torch.float64)
        bias = torch.full((data.num_classes,), float(model.intercept_.min()) - 100, dtype=torch.float64)
        weight[model.classes_] = torch.from_numpy(model.coef_.astype(np.float64))
        bias[model.classes_] = torch.from_numpy(model.intercept_.astype(np.float64))
        heads.append((weight, bias))
        iterations.append(int(model.n_iter_[0]))
    return PathFit(seconds, heads, iterations)


def objectives(data: Data, path: np.ndarray, heads: list[tuple[Tensor, Tensor]]) -> np.ndarray:
    """``C * sum loss + |W|^2 / 2`` of each C, logits and sums in float64."""
    values = []
    for c, (weight, bias) in zip(path, heads, strict=True):
        loss = 0.0
        for features, labels in TensorRows(*data.train):
            loss += float(F.cross_entropy(features.double() @ weight.t() + bias, labels, reduction="sum"))
        values.append(c * loss + 0.5 * float(weight.square().sum()))
    return np.array(values)


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Macro F1 over the classes that occur, negative log-likelihood and top-1."""
    from sklearn.metrics import f1_score

    prediction = logits.argmax(1)
    return {
        "macro_f1": float(f1_score(labels, prediction, average="macro", labels=np.unique(labels), zero_division=0)),
        "nll": float(F.cross_entropy(logits, labels)),
        "top1": float((prediction == labels).float().mean()),
    }


def _seen(part: Part, data: Data) -> Part:
    """Rows whose class has training rows: another's likelihood says nothing about a solver."""
    kept = torch.isin(part.labels, data.train.labels)
    return Part(part.features[kept], part.labels[kept])


def chosen(data: Data, path: np.ndarray, heads: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Test scores at the C of the least validation likelihood."""
    val, test = _seen(data.val, data), _seen(data.test, data)
    losses = [float(F.cross_entropy(val.features.double() @ w.t() + b, val.labels)) for w, b in heads]
    best = int(np.argmin(losses))
    weight, bias = heads[best]
    return {"c": f"{path[best]:.3g}", **scores(test.features.double() @ weight.t() + bias, test.labels)}


def baseline(data: Data, fit: Callable[[TensorRows], Callable[[Tensor], Tensor]]) -> dict[str, Any]:
    """Seconds of fitting and of predicting the test rows, and scores at the temperature of the validation rows."""
    val, test = _seen(data.val, data), _seen(data.test, data)
    started = time.perf_counter()
    predict = fit(TensorRows(*data.train))
    logits = predict(test.features)
    seconds = time.perf_counter() - started
    val_logits = predict(val.features)
    losses = [float(F.cross_entropy(val_logits / t, val.labels)) for t in TEMPERATURES]
    return {"seconds": seconds, **scores(logits / TEMPERATURES[int(np.argmin(losses))], test.labels)}


def table(data: Data, path: np.ndarray) -> list[dict[str, Any]]:
    """A line for ours, for each run of scikit-learn's, and for each baseline."""
    runs = {"fusedloss lbfgs": ours(data, path)}
    values = {name: objectives(data, path, run.heads) for name, run in runs.items()}
    for dtype in (np.float32, np.float64):
        for tolerance in TOLERANCES:
            name = f"scikit-learn lbfgs {np.dtype(dtype).name} tol {tolerance:g}"
            runs[name] = of_sklearn(data, path, tolerance, dtype)
            values[name] = objectives(data, path, runs[name].heads)
            print(f"{name}: {runs[name].seconds:.1f} s, {runs[name].iterations}", flush=True)
            least = np.minimum.reduce(list(values.values()))
            if (values[name] <= least * (1 + GAP)).all():
                break
    least = np.minimum.reduce(list(values.values()))
    mine = runs["fusedloss lbfgs"].seconds
    lines = [
        {
            "method": name, "seconds": run.seconds, "ratio": run.seconds / mine,
            "reached": bool((values[name] <= least * (1 + GAP)).all()),
            "largest_gap": float((values[name] / least - 1).max()), "evaluations": sum(run.iterations),
            "objectives": " ".join(f"{value:.9g}" for value in values[name]), **chosen(data, path, run.heads),
        }
        for name, run in runs.items()
    ]  # fmt: skip
    k = data.num_classes
    baselines: dict[str, Callable[[TensorRows], Callable[[Tensor], Tensor]]] = {
        "nearest mean": lambda rows: fit_class_means(rows, k).logits,
        "nearest mean, cosine": lambda rows: fit_class_means(rows, k, "cosine", 10.0).logits,
        "GDA, automatic shrinkage": lambda rows: fit_gda(rows, k).logits,
        "20 nearest, cosine": lambda rows: NearestNeighbours(rows, k),
    }
    return lines + [{"method": name, **baseline(data, fit)} for name, fit in baselines.items()]


COLUMNS = (
    "case", "method", "seconds", "ratio", "reached", "largest_gap", "evaluations", "c", "macro_f1", "nll", "top1",
    "objectives", "threads", "cpu", "torch", "commit", "date",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.solvers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=tuple(PATHS), default="synthetic")
    parser.add_argument("--bank", type=Path, default=Path("demo/bank"), help="of the glyphs (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="2000 x 32, 20 classes; writes nothing")
    options = parser.parse_args()
    if options.case == "glyphs" and not options.quick:
        data = glyphs(options.bank)
    else:
        data = synthetic(2000, 32, 20) if options.quick else synthetic(100_000, 768, 1000)
    lines = table(data, PATHS[options.case])
    where = measure.environment("default")
    for line in lines:
        line.update({"case": options.case}, **{key: where[key] for key in COLUMNS[-5:]})
        print("  ".join(f"{key} {_shown(line[key])}" for key in COLUMNS[1:11] if key in line))
    if not options.quick:
        target = RESULTS / f"solvers_{options.case}.csv"
        with target.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
        print(f"written: {target}")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
