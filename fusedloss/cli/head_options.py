"""The options of `evaluate` and `predict` that change the logits of a trained head."""

from __future__ import annotations

from typing import Annotated

import typer

Calibrated = Annotated[
    bool, typer.Option("--calibrated", help="Divide logits by the temperature fitted on the validation rows.")
]
AdjustPrior = Annotated[
    float,
    typer.Option(
        help="Subtract this many times the log class prior of the training counts from the logits (post-hoc logit "
        "adjustment); refused for a head that was trained with the prior."
    ),
]
