"""``fusedloss train``: one head on one bank."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fusedloss.cli.recipe_options import with_recipe_options


@with_recipe_options
def train(
    settings: dict[str, Any],
    bank: Annotated[
        Path, typer.Argument(help="Folder of a feature bank (from extract or import).", show_default=False)
    ],
    run: Annotated[Path, typer.Argument(help="Run folder to write.", show_default=False)],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder; start it if there is none.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove the run in the folder first.")] = False,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:1, ...")] = "auto",
    pictures: Annotated[bool, typer.Option(help="Draw curves, reliability and recall by frequency.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no table.")] = False,
) -> None:
    """Train a head on frozen features and judge it on held-out groups.

    \b
    Examples:
      fusedloss train banks/birds runs/ce
      fusedloss train banks/birds runs/vace --loss vace --lr 3e-4,1e-3,3e-3 --epochs 50
      fusedloss train banks/birds runs/mlp --head mlp --hidden 768,384 --class-weights effective --resume
    """
    from fusedloss.cli.progress import EpochBar, print_result
    from fusedloss.features import FeatureBank
    from fusedloss.train import Recipe, fit
    from fusedloss.train.run_folder import RunFolder

    recipe = Recipe.from_dict(settings)
    features = FeatureBank.open(bank)
    if overwrite:
        if resume:
            raise ValueError("overwrite must be absent where resume is given; got both")
        RunFolder(run).clear()
    with EpochBar(recipe.epochs * len(recipe.lr), shown=not quiet) as bar:
        result = fit(
            features,
            recipe,
            folder=run,
            resume=resume,
            device=device,
            pictures=pictures,
            on_epoch=lambda lr, row: bar.advance(f"lr {lr:g}", row),
        )
    if not quiet:
        print_result(result)
