"""One command-line option per setting of a recipe, made from the recipe itself."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from fusedloss.train.recipe import Recipe, read_settings


def with_recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the command's ``settings`` parameter by ``--recipe FILE`` and an option for every setting.

    The command receives ``settings``: what the file says, overridden by the options that were given.
    """
    fields = dataclasses.fields(Recipe)

    @functools.wraps(command)
    def wrapped(*, recipe: Path | None, **options: Any) -> None:
        settings = {} if recipe is None else read_settings(recipe)
        given = {f.name: options.pop(f.name) for f in fields}
        settings |= {f.name: _value(f, given[f.name]) for f in fields if given[f.name] is not None}
        command(settings=settings, **options)

    hints = get_type_hints(command, include_extras=True)
    own = [
        p.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, p in inspect.signature(command).parameters.items()
        if name != "settings"
    ]
    file = inspect.Parameter(
        "recipe",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            Path | None,
            typer.Option(
                help="JSON file of settings, or the config.json of a run; options override it.",
                show_default=False,
            ),
        ],
    )
    parameters = [*own, file, *(_parameter(field) for field in fields)]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del wrapped.__wrapped__
    return wrapped


def parse_value(name: str, text: str) -> Any:
    """The value of a setting written as text; commas separate several."""
    for field in dataclasses.fields(Recipe):
        if field.name == name:
            return _value(field, text)
    return text


def _parameter(field: dataclasses.Field[Any]) -> inspect.Parameter:
    several = isinstance(field.default, tuple)
    kind = str if several else type(field.default)
    default: Any = field.default
    shown = ",".join(str(v) for v in default) if several else str(default)
    choices = field.metadata["choices"]
    meaning = field.metadata["meaning"] + (f": {', '.join(choices)}" if choices else "")
    flag = "--" + field.name.replace("_", "-")
    names = (f"{flag}/--no-{flag[2:]}",) if kind is bool else (flag,)
    option = typer.Option(
        *names,
        help=f"{meaning[0].upper()}{meaning[1:]}. [default: {shown}]",
        show_default=False,
        metavar=None if kind is bool else _metavar(field),
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _metavar(field: dataclasses.Field[Any]) -> str:
    if isinstance(field.default, tuple):
        return f"{_metavar_of(field.default[0])}[,...]"
    return _metavar_of(field.default)


def _metavar_of(value: Any) -> str:
    return {int: "INT", float: "FLOAT"}.get(type(value), "NAME")


def _value(field: dataclasses.Field[Any], given: Any) -> Any:
    """Text as the type of the field; what cannot be read stays text, which the recipe refuses by name."""
    if not isinstance(given, str):
        return given
    if isinstance(field.default, tuple):
        return tuple(_number(part, type(field.default[0])) for part in given.split(","))
    if isinstance(field.default, bool):
        return {"true": True, "false": False}.get(given.lower(), given)
    return given if isinstance(field.default, str) else _number(given, type(field.default))


def _number(text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        return text
