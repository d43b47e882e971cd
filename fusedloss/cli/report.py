"""``fusedloss report``: tables from run folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fusedloss.train.report import RecipeRuns


def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or folders above them.", show_default=False)],
    baseline: Annotated[
        str | None,
        typer.Option(help="Row that the others are compared with; the first by default.", show_default=False),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Columns of the table, separated by commas. [default: those of sweep]", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for table.md and table.csv.", show_default=False),
    ] = None,
) -> None:
    """Mean ± standard error of finished runs, and their differences, paired by seed.

    Runs that differ only in their seed (and chosen learning rate) make one row. A difference counts
    beyond two standard errors, with three seeds or more.

    \b
    Examples:
      fusedloss report sweeps/losses --baseline CE
      fusedloss report runs/ce runs/vace --metrics top1,rec_few,ece15 --output tables
    """
    from fusedloss.train.report import DEFAULT_METRICS, collect_rows, find_baseline

    rows = collect_rows(folders)
    columns = DEFAULT_METRICS if metrics is None else tuple(metrics.split(","))
    known = [name for name, value in next(iter(rows[0].by_seed.values())).items() if isinstance(value, (int, float))]
    for name in columns:
        if name not in known:
            raise ValueError(f"metrics must be among {', '.join(known)}; got {name!r}")
    print_tables(rows, find_baseline(rows, baseline), columns, output)


def print_tables(
    rows: Sequence[RecipeRuns], baseline: RecipeRuns, metrics: Sequence[str], output: Path | None = None
) -> None:
    """Print both tables and the verdicts, and write them below ``output``."""
    from fusedloss.atomic_io import write_bytes
    from fusedloss.train import report as tables

    summary = tables.summary_cells(rows, metrics)
    parts = [tables.as_text(summary)]
    markdown = [tables.as_markdown(summary)]
    if len(rows) > 1:
        differences = tables.difference_cells(rows, baseline, metrics)
        sentences = tables.verdicts(rows, baseline, metrics)
        parts += [tables.as_text(differences), "\n".join(sentences)]
        markdown += [tables.as_markdown(differences), "\n".join(f"* {sentence}" for sentence in sentences)]
    note = (
        "Mean±standard error over seeds; differences are paired by seed. "
        "* beyond 2 standard errors; ? fewer than 3 seeds."
    )
    print("\n\n".join([*parts, note]))
    if output is not None:
        write_bytes(output / "table.md", ("\n\n".join([*markdown, note]) + "\n").encode())
        write_bytes(output / "table.csv", tables.as_csv(rows).encode())
        print(f"tables: {output / 'table.md'}, {output / 'table.csv'}")
