"""Imports the command that is called, and no other, and turns users' errors into one line."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

import typer

USER_ERRORS = (ValueError, TypeError, IndexError, OSError, ImportError)
HELP = """Fused classification losses, and a trainer for heads on frozen features.

A session: extract features once, train heads on them, look at the run, predict.

Set FUSEDLOSS_TRACEBACK=1 for the whole traceback of an error."""


class Command(NamedTuple):
    """Where a command's function is, and the line that stands for it in `fusedloss --help`."""

    # "module:name"
    function: str
    summary: str


# To add a command: write its function in a module of this folder, with typer options, and add a line here.
COMMANDS = {
    "extract": Command(
        "fusedloss.cli.extract:extract", "Images or text to features, with a timm or transformers backbone."
    ),
    "import": Command(
        "fusedloss.cli.import_arrays:import_arrays", "Your own feature and label arrays to a feature bank."
    ),
    "train": Command("fusedloss.cli.train:train", "Train heads on a feature bank."),
    "evaluate": Command("fusedloss.cli.evaluate:evaluate", "Measure a trained head on a feature bank."),
    "predict": Command("fusedloss.cli.predict:predict", "Classes and probabilities for new images, texts or features."),
    "sweep": Command("fusedloss.cli.sweep:sweep", "Compare recipes over several seeds, in one table."),
    "report": Command("fusedloss.cli.report:report", "Tables and pictures of finished runs."),
    "bench": Command("fusedloss.cli.bench:bench", "Time the losses against eager PyTorch and torch.compile here."),
    "info": Command("fusedloss.cli.main:info", "Which backend runs each operation, and why others do not."),
}


def info() -> None:
    """Say which backend runs each operation on each device, and why others do not."""
    from fusedloss.cli.info import report

    typer.echo(report())


def load(command: Command) -> Callable[..., None]:
    """The function of a command."""
    module, _, name = command.function.partition(":")
    function: Callable[..., None] = getattr(importlib.import_module(module), name)
    return function


def placeholder() -> None:
    """Stands for a command that is not called, so that it is listed without being imported."""


def build_app(chosen: str | None) -> typer.Typer:
    """The application with every command listed and `chosen` loaded."""
    app = typer.Typer(
        name="fusedloss", help=HELP, no_args_is_help=True, add_completion=False, rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )  # fmt: skip
    for name, command in COMMANDS.items():
        if name == chosen:
            app.command(name)(load(command))
        else:
            app.command(name, help=command.summary)(placeholder)
    return app


def run(arguments: Sequence[str]) -> int:
    """Run one command line; a user's error is one line on stderr and status 2, an interrupt status 130."""
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        build_app(chosen)(args=list(arguments), prog_name="fusedloss")
    except SystemExit as finished:
        return finished.code if isinstance(finished.code, int) else int(finished.code is not None)
    except USER_ERRORS as error:
        if os.environ.get("FUSEDLOSS_TRACEBACK") == "1":
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"fusedloss: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fusedloss: interrupted", file=sys.stderr)
        return 130
    return 0
