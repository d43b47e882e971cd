"""Keywords that a constructor hands on to another one: checked, and shown by ``help`` and editors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec

from torch import nn

Parameters = ParamSpec("Parameters")
# Taken by CrossEntropyLoss for torch's positional order alone.
_RETIRED = ("size_average", "reduce")


def forwards_keywords(
    to: type[nn.Module], *, without: Iterable[str] = (), other_names: Mapping[str, str] | None = None
) -> Callable[[Callable[Parameters, None]], Callable[Parameters, None]]:
    """Decorates an ``__init__(self, ..., **keywords)`` that hands its keywords on to the constructor of `to`.

    An unknown keyword is a ``TypeError`` that names the class under construction and what it takes, and
    ``inspect.signature`` shows the parameters of `to` in place of ``**keywords``.

    Args:
        to: the class whose constructor takes the keywords.
        without: its parameters that the decorated constructor sets itself.
        other_names: what others call a parameter, and its name here: a hint where the keyword is not known.
    """

    def decorate(init: Callable[Parameters, None]) -> Callable[Parameters, None]:
        signature = inspect.signature(init)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        left_out = {*(p.name for p in own), *without, *_RETIRED}
        forwarded = [
            parameter.replace(kind=parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(to.__init__).parameters.items()
            if name not in left_out
        ]
        allowed = [p.name for p in (*own[1:], *forwarded)]

        @functools.wraps(init)
        def checked(*arguments: Parameters.args, **keywords: Parameters.kwargs) -> None:
            for name in keywords:
                if name not in allowed:
                    meant = (other_names or {}).get(name)
                    hint = f" ({meant} is meant?)" if meant in allowed else ""
                    raise TypeError(
                        f"{type(arguments[0]).__name__}.__init__() got an unexpected keyword argument {name!r}{hint}; "
                        f"it takes {', '.join(allowed)}"
                    )
            init(*arguments, **keywords)

        shown: Any = checked
        shown.__signature__ = signature.replace(parameters=[*own, *forwarded])
        return checked

    return decorate
