"""``fusedloss sweep``: several recipes times several seeds, and one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fusedloss.cli.recipe_options import parse_value, with_recipe_options


@with_recipe_options
def sweep(
    settings: dict[str, Any],
    bank: Annotated[
        Path, typer.Argument(help="Folder of a feature bank (from extract or import).", show_default=False)
    ],
    folder: Annotated[
        Path, typer.Argument(help="Folder for the runs: ROW/[split-P-]seed-N in it.", show_default=False)
    ],
    row: Annotated[
        list[str] | None,
        typer.Option(help="A recipe as 'NAME: setting=value setting=value'; give several.", show_default=False),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="A setting and its values, 'setting=value,value'; several make their product.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1,2",
    splits: Annotated[
        str | None,
        typer.Option(
            help="Seeds of several splits, separated by commas, in place of the recipes' own.", show_default=False
        ),
    ] = None,
    lr_per: Annotated[
        str,
        typer.Option(
            help="Where --lr names several: choose one per row (best on average over the seeds of a split) or per run."
        ),
    ] = "row",
    baseline: Annotated[
        str | None,
        typer.Option(help="Row that the others are compared with; the first by default.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:1, ...")] = "auto",
    pictures: Annotated[bool, typer.Option(help="Draw the pictures of every run.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Train every recipe with every seed and compare them in one table.

    Seeds say how much a training varies; only several splits say what another choice of training and test rows would
    change. The recipe options are common to all rows. Run the same command again after an interruption: finished runs
    are read and the interrupted one goes on.

    \b
    Examples:
      fusedloss sweep banks/birds sweeps/splits --row "CE:" --row "VACE: loss=vace" --splits 1,2,3,4,5 --seeds 0,1
      fusedloss sweep banks/birds sweeps/losses --row "CE:" --row "VACE: loss=vace" --lr 3e-4,1e-3,3e-3
      fusedloss sweep banks/birds sweeps/strength --loss vace --grid strength=0,0.25,0.5 --seeds 0,1,2,3
    """
    from fusedloss.cli.progress import EpochBar
    from fusedloss.cli.report import print_tables
    from fusedloss.features import FeatureBank
    from fusedloss.train.report import DEFAULT_METRICS, collect_rows, find_baseline
    from fusedloss.train.sweep import folder_name
    from fusedloss.train.sweep import sweep as run_sweep

    rows = parse_rows(settings, row or [], grid or [])
    numbers = _numbers("seeds", seeds)
    parts = None if splits is None else _numbers("splits", splits)
    if baseline is not None and baseline not in rows:
        raise ValueError(f"baseline must be one of {', '.join(rows)}; got {baseline!r}")
    epochs = len(numbers) * len(parts or [0]) * sum(recipe.epochs * len(recipe.lr) for recipe in rows.values())
    with EpochBar(epochs, shown=not quiet) as bar:
        run_sweep(
            FeatureBank.open(bank),
            rows,
            numbers,
            folder,
            splits=parts,
            lr_per=lr_per,
            device=device,
            pictures=pictures,
            on_epoch=lambda name, seed, lr, values: bar.advance(f"{name} seed {seed} lr {lr:g}", values),
        )
    collected = collect_rows([folder / folder_name(name) for name in rows])
    chosen = None if baseline is None else folder_name(baseline)
    print_tables(collected, find_baseline(collected, chosen), DEFAULT_METRICS, output=folder)


def parse_rows(settings: dict[str, Any], rows: list[str], grid: list[str]) -> dict[str, Any]:
    """Named recipes from the texts of ``--row`` and ``--grid`` over common settings.

    Raises:
        ValueError: texts of another form, both options, or settings that a recipe refuses.
    """
    from fusedloss.train import Recipe
    from fusedloss.train.sweep import grid_rows

    if rows and grid:
        raise ValueError("grid must be absent where row is given; got both")
    if grid:
        values: dict[str, Sequence[Any]] = {}
        for text in grid:
            name, _, listed = text.partition("=")
            if not listed:
                raise ValueError(f"grid must be 'setting=value,value'; got {text!r}")
            values[name] = [parse_value(name, value) for value in listed.split(",")]
        return grid_rows(settings, values)
    recipes = {}
    for text in rows or ["run:"]:
        name, colon, changes = text.partition(":")
        pairs = [change.partition("=") for change in changes.split()]
        if not colon or not name.strip() or any(not value for _, _, value in pairs):
            raise ValueError(f"row must be 'NAME: setting=value ...'; got {text!r}")
        own = {key: parse_value(key, value) for key, _, value in pairs}
        if name.strip() in recipes:
            raise ValueError(f"row must have a name of its own; got {name.strip()!r} twice")
        recipes[name.strip()] = Recipe.from_dict(settings | own)
    return recipes


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be whole numbers separated by commas; got {text!r}") from None
