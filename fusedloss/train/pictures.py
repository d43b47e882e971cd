"""The pictures of a run folder, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusedloss.calibration import confidence_bins

BLUE, ORANGE, GREY = "#2166ac", "#e08214", "#999999"


def draw_training_curves(path: Path, history: Sequence[dict[str, Any]]) -> None:
    """Loss on the left, validation scores on the right, over epochs."""
    figure, (left, right) = _figure(1, 2, (10, 3.8))
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, _column(history, "loss"), color=BLUE, label="training loss")
    if "val_nll" in history[0]:
        left.plot(epochs, _column(history, "val_nll"), color=ORANGE, label="validation nll")
        scores = (
            ("val_top1", BLUE, "top-1"),
            ("val_bal_acc", ORANGE, "balanced accuracy"),
            ("val_macro_f1_fg", "#1b7837", "macro F1"),
        )
        for name, color, label in scores:
            right.plot(epochs, _column(history, name), color=color, label=label)
        highest = np.nanmax([_column(history, name) for name, _, _ in scores])
        right.set(xlabel="epoch", ylabel="validation score", ylim=(0, min(1.02, 1.35 * highest + 0.02)))
        right.legend(frameon=False, loc="upper left", ncols=3, fontsize=9)
    else:
        right.text(0.5, 0.5, "no validation rows", ha="center", transform=right.transAxes)
        right.set_axis_off()
    left.set(xlabel="epoch", ylabel="loss (nats)")
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    _save(figure, path)


def draw_reliability(path: Path, confidence: np.ndarray, correct: np.ndarray, ece: float) -> None:
    """Accuracy and mean confidence in 15 bins of confidence, and how many samples each bin holds."""
    bins = confidence_bins(confidence, correct)
    edges = np.linspace(0, 1, len(bins.count) + 1)
    left, width = edges[:-1], edges[1] - edges[0]
    filled = bins.count > 0
    figure, (top, bottom) = _figure(2, 1, (4.8, 5.6), height_ratios=[3, 1], sharex=True)
    top.bar(
        left[filled], bins.accuracy[filled], width, align="edge", color=BLUE, alpha=0.75, edgecolor="white",
        label="accuracy",
    )  # fmt: skip
    top.hlines(
        bins.confidence[filled], left[filled], left[filled] + width, color=ORANGE, linewidth=3,
        label="mean confidence",
    )  # fmt: skip
    top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    top.set(ylabel="accuracy", ylim=(0, 1), xlim=(0, 1), title=f"ECE {ece:.3f} ({len(correct)} test rows)")
    top.legend(frameon=False, loc="upper left")
    bottom.bar(left, bins.count, width, align="edge", color=GREY, edgecolor="white")
    bottom.set(xlabel="confidence", ylabel="rows")
    _save(figure, path)


def draw_recall_by_frequency(path: Path, report: dict[str, Any]) -> None:
    """Recall of every tested class against its number of training samples, and means of three bands."""
    tested = [row for row in report["per_class"] if row["support"]]
    counts = np.array([max(row["train_count"], 0.5) for row in tested])
    recall = np.array([row["recall"] for row in tested])
    area = 14 + 10 * np.sqrt(np.array([row["support"] for row in tested]))
    figure, axis = _figure(1, 1, (7.6, 4.6))
    axis.scatter(counts, recall, s=area, color=BLUE, alpha=0.4, linewidths=0, label="a class, its area by test rows")
    axis.set_xscale("log")
    edges = [min(counts.min() * 0.8, 5), 20.5, 100.5, max(counts.max() * 1.3, 320)]
    titles = {"few": "few (at most 20)", "med": "medium (21-100)", "many": "many (over 100)"}
    for (band, title), low, high in zip(titles.items(), edges[:-1], edges[1:], strict=True):
        if report[f"k_{band}"]:
            mean = report[f"rec_{band}"]
            axis.hlines(mean, low, high, color=ORANGE, linewidth=2.2)
            axis.text(
                np.sqrt(low * high), 1.08, f"{title}\n{report[f'k_{band}']} classes, mean {mean:.2f}",
                color="#b35806", ha="center", va="bottom", fontsize=9,
            )  # fmt: skip
    for edge in edges[1:-1]:
        axis.axvline(edge, color=GREY, linewidth=0.8, linestyle=":")
    axis.set(
        xlabel="training samples of the class",
        ylabel="test recall",
        ylim=(-0.05, 1.25),
        xlim=(edges[0], edges[-1]),
    )
    axis.set_yticks(np.linspace(0, 1, 6))
    figure.legend(frameon=False, loc="outside lower right", fontsize=9)
    _save(figure, path)


def _figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The object interface needs no global backend and leaves the caller's pyplot alone
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    share = options.pop("sharex", False)
    axes = figure.subplots(rows, columns, sharex=share, gridspec_kw=options or None)
    for axis in np.atleast_1d(axes).flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _column(history: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [row.get(name, float("nan")) for row in history]


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
