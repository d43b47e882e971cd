"""``fusedloss predict``: classes and probabilities for new inputs, from the run folder alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from fusedloss.cli.head_options import AdjustPrior, Calibrated


def predict(
    run: Annotated[Path, typer.Argument(help="Run folder of a finished training.", show_default=False)],
    inputs: Annotated[
        Path,
        typer.Argument(
            help="A feature bank, features in a file as import takes them (.npy, .npz, .csv, .csv.gz, .pt, "
            ".safetensors), or inputs for the backbone of the training: an "
            "image, a folder of images, a .csv/.tsv/.jsonl list with a column path or text, or packed images "
            "(.npz).",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="CSV file; without it the table is printed.", show_default=False),
    ] = None,
    abstain_below: Annotated[
        float, typer.Option(help="Leave the class empty where its probability is below this, in [0, 1].")
    ] = 0.0,
    top: Annotated[
        int, typer.Option(help="Classes to list per input; those after the first in columns of their own.")
    ] = 1,
    calibrated: Calibrated = False,
    adjust_prior: AdjustPrior = 0.0,
    weights: Annotated[
        Path | None,
        typer.Option(help="File of the backbone's weights, where it has moved since.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Inputs per step of the backbone.")] = 64,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:1, ...")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Predict the class of new images, texts or features, with its probability.

    The CSV has the columns input, class, probability and abstained.

    \b
    Examples:
      fusedloss predict runs/vace photos/ --output classes.csv
      fusedloss predict runs/vace features.npy --abstain-below 0.5 --calibrated --top 3
    """
    import sys

    from fusedloss.atomic_io import write_parts
    from fusedloss.train.predict import predict_blocks, prediction_lines

    predictions = predict_blocks(
        run,
        inputs,
        calibrated=calibrated,
        adjust_prior=adjust_prior,
        weights=weights,
        batch_size=batch_size,
        device=device,
        progress=not quiet,
    )
    lines = prediction_lines(predictions, abstain_below=abstain_below, top=top)
    if output is None:
        for text, _ in lines:
            sys.stdout.write(text)
        return
    abstained = 0

    def parts() -> Iterator[bytes]:
        nonlocal abstained
        for text, count in lines:
            abstained += count
            yield text.encode()

    write_parts(output, parts())
    print(f"{len(predictions.names)} inputs, {abstained} abstained: {output}")
