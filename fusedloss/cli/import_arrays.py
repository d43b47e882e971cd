"""`fusedloss import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_arrays(
    features: Annotated[Path, typer.Argument(help="features (N, D): .npy, .npz, .csv, .csv.gz, .pt or .safetensors")],
    out: Annotated[Path, typer.Argument(help="the bank: a new folder")],
    labels: Annotated[
        Path | None,
        typer.Option(help="labels (N,), integers or names, in a file of these kinds [default: in the features file]"),
    ] = None,
    groups: Annotated[
        Path | None,
        typer.Option(
            help="groups (N,), integers or names; rows of a group are never split "
            "[default: in the features file, or none]"
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="class names: another bank, or a file with one name per line "
            "[default: in the features file, else sorted names, else numbers]"
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(help="a note of what the features come from, checked when banks meet [default: none]"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="how features are stored: float16 or float32 [default: as given, else float32]"),
    ] = None,
) -> None:
    """Make a feature bank of your own arrays.

    \b One file may hold everything: .npz, .pt and .safetensors under the names features, labels, groups,
    class_names; a .csv with a header as a column label, optionally group, and one column per feature. Files
    of .pt are read with weights_only=True. Nothing is written when anything is wrong: shapes, labels out of
    range, NaN features.

    \b
    Examples:
      fusedloss import features.npy bank --labels labels.npy
      fusedloss import embeddings.npz bank
      fusedloss import table.csv.gz bank --dtype float16
      fusedloss import features.pt bank --labels labels.csv --groups patients.csv
    """
    from fusedloss.cli.classes import read_class_names
    from fusedloss.features.arrays import bank_from_files

    names = None if classes is None else read_class_names(classes)
    bank = bank_from_files(features, labels, groups, class_names=names, backbone=backbone, dtype=dtype).save(out)
    typer.echo(f"{out}: {len(bank)} rows, {bank.in_features} features, {bank.num_classes} classes")
