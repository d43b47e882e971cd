"""Times the tiles of each shape class on this GPU and writes the fastest into fusedloss/backends/triton/tuning.json.

    python -m bench.tune softmax_ce                      # every type, float16 as bfloat16
    python -m bench.tune supcon --dtype float32          # a few minutes
    TRITON_INTERPRET=1 python -m bench.tune --small --device cpu --out build/tuning.json

Candidates are compiled first, in several processes, into Triton's cache; of those with the same machine code one is
timed. The file is written after each shape class. A tile whose values differ, or that doesn't compile, is not taken.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import triton

from bench import tuning_file
from bench.gpu.__main__ import seconds_in_turn
from bench.precompile import Fingerprints, precompiled
from bench.variants import ShapeClass, shape_classes, stems, tuned_types
from fusedloss.backends.triton import tuning

# Types of 2 bytes take the same tiles; float64 keeps its defaults.
_LIKE = {"float32": ("float32",), "bfloat16": ("bfloat16", "float16")}
_ROUNDS = 15
_AGREES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


Entry = list[int]


def tune(
    stem: str, dtype: torch.dtype, each: ShapeClass, device: torch.device, rounds: int, compiled: Fingerprints
) -> Entry:
    """The fastest entry of one shape class, the present one among the candidates."""
    table = table_of(device, stem, str(dtype).removeprefix("torch."))
    present, before = tuning.entry(device, stem, dtype, each.name), table.get(each.name)
    call = each.prepare(device)
    truth = [value.clone() for value in call()]
    calls: dict[str, Callable[[], Any]] = {}
    entries: dict[str, Entry] = {}
    try:
        for entry in different([tuple(present), *each.candidates], each.name, compiled):
            table[each.name] = entry
            try:
                right = all(_close(one, other, dtype) for one, other in zip(call(), truth, strict=True))
            except Exception as error:
                print(f"  {entry}: {type(error).__name__}", file=sys.stderr)
                continue
            if right:
                entries[str(entry)], calls[str(entry)] = entry, _in_tile(table, each.name, entry, call)
            else:
                print(f"  {entry}: other values", file=sys.stderr)
        took = seconds_in_turn(calls, device, rounds)
    finally:
        table.pop(each.name, None)
        if before is not None:
            table[each.name] = before
    best = min(took, key=lambda name: took[name])
    print(f"{stem} {dtype} {each.name}: {present} {1e6 * took[str(present)]:.1f} us, {best} {1e6 * took[best]:.1f} us, "
          f"of {len(took)}", flush=True)  # fmt: skip
    # A tile that gains less than the noise is no reason to change the file.
    return entries[best] if took[best] < 0.98 * took[str(present)] else present


def different(candidates: Iterable[tuple[int, ...]], shape_class: str, compiled: Fingerprints) -> list[Entry]:
    """The first of the candidates, which is the present one, and those that compiled to something else."""
    first, *others = dict.fromkeys(candidates)
    kept, seen = [first], {compiled.get((shape_class, first))}
    for entry in others:
        fingerprint = compiled.get((shape_class, entry))
        if fingerprint is not None and fingerprint not in seen:
            seen.add(fingerprint)
            kept.append(entry)
    return [list(entry) for entry in kept]


def table_of(device: torch.device, stem: str, dtype: str) -> dict[str, Entry]:
    """The device's own tiles by shape class."""
    own = tuning.DEVICES.setdefault(tuning.device_key(device), {"measured": {}, "tiles": {}})
    return own["tiles"].setdefault(stem, {}).setdefault(dtype, {})


def _in_tile(table: dict[str, Entry], name: str, entry: Entry, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        table[name] = entry
        return call()

    return run


def _close(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    tolerance = _AGREES[dtype]
    largest = float(other.abs().max()) if other.numel() else 0.0
    return torch.allclose(one.double(), other.double(), rtol=tolerance, atol=tolerance * largest)


def tune_stem(stem: str, kind: str, device: torch.device, options: argparse.Namespace, until: float) -> None:
    """All shape classes of a stem in one type, as long as there is time; the file is written after each."""
    dtype = getattr(torch, kind)
    classes = shape_classes(stem, dtype, options.small)
    began = time.monotonic()
    # The timing takes less than the compilation: a third of what is left.
    limit = None if until == float("inf") else max(1.0, (until - began) * 2 / 3)
    compiled = precompiled(stem, kind, classes, device, options.small, options.processes, limit)
    print(f"{stem} {kind}: {len(compiled)} candidates, {len(set(compiled.values()) - {None})} kinds of machine code, "
          f"compiled in {time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the interpreter"
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    today = datetime.datetime.now(datetime.timezone.utc).date()
    for each in classes:
        if time.monotonic() > until:
            print(f"left out for lack of time: {stem} {kind} {each.name}", file=sys.stderr)
            continue
        best = tune(stem, dtype, each, device, 1 if options.small else _ROUNDS, compiled)
        for like in _LIKE[kind]:
            table_of(device, stem, like)[each.name] = best
            measured = tuning.DEVICES[tuning.device_key(device)]["measured"]
            measured.setdefault(stem, {})[like] = f"{today}, {name}, {versions}"
        options.out.write_text(tuning_file.text(tuning.DEVICES))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stems", nargs="*", help=f"of {', '.join(stems())} (default: all)")
    parser.add_argument("--dtype", choices=_LIKE, help="default: each that the stem is tuned for")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, two tiles of a few shape classes")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="compilations at a time")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no shape class is begun")
    parser.add_argument("--out", type=Path, default=tuning.PATH)
    options = parser.parse_args()
    if unknown := set(options.stems) - set(stems()):
        parser.error(f"stem: got {', '.join(sorted(unknown))}; allowed are {', '.join(stems())}")
    until = time.monotonic() + options.limit
    for stem in options.stems or stems():
        for kind in (kind for kind in tuned_types(stem) if options.dtype in (None, kind)):
            tune_stem(stem, kind, torch.device(options.device), options, until)


if __name__ == "__main__":
    main()
