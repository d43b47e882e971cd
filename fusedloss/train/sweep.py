"""Several recipes times several seeds on one bank, resumable run by run."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fusedloss.features import FeatureBank
from fusedloss.features.checks import as_integer, as_list, as_path, check_choice, check_instance
from fusedloss.folder_lock import FolderLock
from fusedloss.train.fit import Run
from fusedloss.train.recipe import Recipe
from fusedloss.train.result import Result

OnEpoch = Callable[[str, int, float, dict[str, Any]], None]
LR_PER = ("row", "run")


def sweep(
    bank: FeatureBank,
    rows: dict[str, Recipe],
    seeds: Sequence[int],
    folder: str | Path,
    *,
    lr_per: str = "row",
    device: str = "auto",
    pictures: bool = True,
    on_epoch: OnEpoch | None = None,
) -> dict[str, list[Result]]:
    """Run every recipe with every seed into ``folder/<row>/seed-<seed>``; finished runs are read, others go
    on.

    All rows with one seed share the split, the initial weights (where heads agree) and the batch order, so
    their differences can be paired. Where a recipe has several learning rates, ``lr_per="row"`` keeps the one
    whose validation score is the best on average over the seeds; ``"run"`` chooses for every seed by itself.

    Raises:
        ValueError, TypeError: no row, no seed, a seed twice, or names that are the same as folders.
        StorageError, DivergedError: as ``fit``.
    """
    folders = _row_folders(rows, as_path("folder", folder))
    check_choice("lr_per", lr_per, LR_PER)
    seeds = [as_integer("seeds", seed, 0, 2**63) for seed in as_list("seeds", seeds)]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must differ and be at least one; got {seeds}")
    results: dict[str, list[Result]] = {}
    with FolderLock(as_path("folder", folder)), contextlib.ExitStack() as opened:
        for name, recipe in rows.items():
            prepared, runs = None, []
            for seed in seeds:
                report = None if on_epoch is None else _with_names(on_epoch, name, seed)
                run = Run(
                    bank, recipe.replace(seed=seed), folder=folders[name] / f"seed-{seed}", resume=True,
                    device=device, pictures=pictures, on_epoch=report, prepared=prepared,
                )  # fmt: skip
                opened.callback(run.close)
                runs.append((run, run.train()))
                prepared = run.prepared
            common = max(recipe.lr, key=lambda lr: sum(scores[lr] for _, scores in runs))
            own = [max(scores, key=scores.__getitem__) for _, scores in runs]
            chosen = own if lr_per == "run" else [common] * len(runs)
            results[name] = [run.finish(lr) for (run, _), lr in zip(runs, chosen, strict=True)]
    return results


def _row_folders(rows: dict[str, Recipe], folder: Path) -> dict[str, Path]:
    """The folder of every row."""
    check_instance("rows", rows, dict, "a dict of recipes by name")
    for recipe in rows.values():
        check_instance("rows", recipe, Recipe, "a dict of recipes by name")
    folders = {name: folder / folder_name(name) for name in rows}
    if not rows or len(set(folders.values())) < len(rows):
        raise ValueError(f"rows must have names that differ as folders, and be at least one; got {list(rows)}")
    return folders


def grid_rows(base: dict[str, Any], grid: dict[str, Sequence[Any]]) -> dict[str, Recipe]:
    """One recipe per combination of the grid's values, named after them; errors as `Recipe.from_dict`."""
    rows = {}
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        rows[" ".join(f"{key}={value}" for key, value in settings.items())] = Recipe.from_dict(base | settings)
    return rows


def folder_name(row: str) -> str:
    """The row's name with only letters, digits and ``._=+-``."""
    return re.sub(r"[^\w.=+-]+", "-", row).strip("-.") or "row"


def _with_names(on_epoch: OnEpoch, name: str, seed: int) -> Callable[[float, dict[str, Any]], None]:
    return lambda lr, row: on_epoch(name, seed, lr, row)
