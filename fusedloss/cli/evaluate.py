"""``fusedloss evaluate``: a trained head on labelled features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusedloss.cli.head_options import AdjustPrior, Calibrated


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder of a finished training.", show_default=False)],
    bank: Annotated[
        Path | None,
        typer.Argument(
            help="Labelled feature bank; without it the bank that the run was trained on, its test rows.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        str,
        typer.Option(
            help="Rows to judge: test, val, train (of the run's own bank) or all; auto is test "
            "for the run's own bank and all for another."
        ),
    ] = "auto",
    calibrated: Calibrated = False,
    adjust_prior: AdjustPrior = 0.0,
    retrieval: Annotated[
        bool,
        typer.Option(
            "--retrieval",
            help="Also Recall@1, MAP@R and TAR@FAR of the features that the head's last layer sees, by cosine "
            "(needs the extra metric).",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSON file for the scores, per class too.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Scores of a trained head on its test rows, or on another bank with the same classes.

    \b
    Examples:
      fusedloss evaluate runs/vace
      fusedloss evaluate runs/vace banks/birds-2024 --output scores.json
    """
    from fusedloss.atomic_io import write_json
    from fusedloss.cli.progress import print_scores
    from fusedloss.features import FeatureBank
    from fusedloss.train.evaluate import evaluate_run

    features = None if bank is None else FeatureBank.open(bank)
    evaluation = evaluate_run(
        run, features, rows=rows, calibrated=calibrated, adjust_prior=adjust_prior, retrieval=retrieval, device=device
    )
    print(f"{run}: {evaluation.num_rows} rows ({evaluation.rows}) of {evaluation.bank}, {evaluation.changes()}")
    if evaluation.changed:
        print("The bank has changed since the training: rows that the head was trained on are among these.")
    print_scores(evaluation.report)
    for name, value in evaluation.report.get("retrieval", {}).items():
        print(f"  {name:<24} {value:.4f}")
    if output is not None:
        settings = {
            "run": str(run), "bank": evaluation.bank, "rows": evaluation.rows, "calibrated": calibrated,
            "temperature": evaluation.temperature, "adjust_prior": adjust_prior,
        }  # fmt: skip
        write_json(output, settings | evaluation.report)
        print(f"scores: {output}")
    if evaluation.retrieval_error is not None:
        raise ValueError(f"retrieval was not measured, the scores above are complete: {evaluation.retrieval_error}")
