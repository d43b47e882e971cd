"""Runs cases of the Triton backend in a process of their own: in its interpreter, or on a GPU.

Prints one JSON object: the name of each case and what was wrong with it (an empty list when nothing was).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping

import torch

Check = Callable[[str], list[str]]


def outcome(check: Check, device: str) -> list[str]:
    """What was wrong, an exception included."""
    try:
        return check(device)
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]


def main(interpreted: Mapping[str, Check], compiled: Mapping[str, Check], few: Iterable[str]) -> None:
    """The command line of a file of cases; exits with 1 if any went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="cases (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--few", action="store_true", help="one case of each kernel")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    cases = interpreted if options.device == "cpu" else compiled
    names = list(few) if options.few else options.names or list(cases)
    found = {name: outcome(cases[name], options.device) for name in names}
    print(json.dumps(found))
    raise SystemExit(1 if any(found.values()) else 0)
