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
    family: Annotated[
        str,
        typer.Option(help="Cells that the correction of p-values counts: those of the whole table, or of each row."),
    ] = "table",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for table.md, table.csv and differences.csv.", show_default=False),
    ] = None,
) -> None:
    """Means of finished runs, and their differences, paired by seed and split, with 95% intervals.

    Runs that differ only in seed, split and chosen learning rate make one row. A difference gets a star where its
    p-value, corrected for all cells of the table, is at most .05: over three splits or more, or on one split over
    three seeds or more together with its test groups.

    \b
    Examples:
      fusedloss report sweeps/losses --baseline CE
      fusedloss report runs/ce runs/vace --metrics top1,rec_few,ece15 --output tables
    """
    from fusedloss.train.report import DEFAULT_METRICS, collect_rows, find_baseline

    rows = collect_rows(folders)
    columns = DEFAULT_METRICS if metrics is None else tuple(metrics.split(","))
    every = [run.row for row in rows for run in row.runs.values()]
    known = [name for name in every[0] if all(isinstance(row.get(name), (int, float)) for row in every)]
    for name in columns:
        if name not in known:
            raise ValueError(f"metrics must be among {', '.join(known)}; got {name!r}")
    print_tables(rows, find_baseline(rows, baseline), columns, output, family)


def print_tables(
    rows: Sequence[RecipeRuns],
    baseline: RecipeRuns,
    metrics: Sequence[str],
    output: Path | None = None,
    family: str = "table",
) -> None:
    """Print both tables, the verdicts and how to read them, and write them below ``output``."""
    from fusedloss.atomic_io import write_bytes
    from fusedloss.train import report as tables

    summary = tables.summary_cells(rows, metrics)
    found = tables.differences(rows, baseline, metrics, family)
    parts = [tables.as_text(summary)]
    markdown = [tables.as_markdown(summary)]
    if found:
        cells = tables.difference_cells(found, baseline)
        sentences = tables.verdicts(found, baseline)
        parts += [tables.as_text(cells), "\n".join(sentences)]
        markdown += [tables.as_markdown(cells), "\n".join(f"* {sentence}" for sentence in sentences)]
    lines = tables.notes(found, family)
    print("\n\n".join([*parts, "\n".join(lines)]))
    if output is None:
        return
    write_bytes(output / "table.md", ("\n\n".join([*markdown, "<br>\n".join(lines)]) + "\n").encode())
    files = {"table.csv": tables.as_csv(rows)}
    if found:
        files["differences.csv"] = tables.differences_csv(found, baseline)
    for name, text in files.items():
        write_bytes(output / name, text.encode())
    print(f"tables: {', '.join(str(output / name) for name in ('table.md', *files))}")
