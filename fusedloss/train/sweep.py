"""Several recipes times several splits and seeds on one bank, resumable run by run."""

from __future__ import annotations

import contextlib
import functools
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
    splits: Sequence[int] | None = None,
    lr_per: str = "row",
    device: str = "auto",
    pictures: bool = True,
    on_epoch: OnEpoch | None = None,
) -> dict[str, list[Result]]:
    """Run every recipe with every seed into ``folder/<row>/seed-<seed>``; finished runs are read, others go
    on.

    With ``splits``, seeds of splits that take the place of the recipes' own, each recipe runs with every split and
    seed, into ``folder/<row>/split-<split>-seed-<seed>``.

    All rows with one split and seed share the rows, the initial weights (where heads agree) and the batch order, so
    their differences can be paired. Where a recipe has several learning rates, ``lr_per="row"`` keeps the one
    whose validation score is the best on average over the seeds of a split (the test rows of one split are training
    and validation rows of others, so no split chooses for another); ``"run"`` chooses for every run by itself.

    Returns:
        The results of each row: the seeds of the first split, then those of the next.

    Raises:
        ValueError, TypeError: no row, seed or split, one of them twice, or names that are the same as folders.
        StorageError, DivergedError: as ``fit``.
    """
    folders = _row_folders(rows, as_path("folder", folder))
    check_choice("lr_per", lr_per, LR_PER)
    numbers = _numbers("seeds", seeds, 2**63)
    parts = [None] if splits is None else _numbers("splits", splits, 2**32)
    results: dict[str, list[Result]] = {}
    with FolderLock(as_path("folder", folder)):
        for name, recipe in rows.items():
            results[name] = []
            for split in parts:
                places, start = {}, "" if split is None else f"split-{split}-"
                for seed in numbers:
                    changes = {"seed": seed} if split is None else {"seed": seed, "split_seed": split}
                    places[folders[name] / f"{start}seed-{seed}"] = recipe.replace(**changes)
                report = None if on_epoch is None else functools.partial(on_epoch, name)
                options = {"device": device, "pictures": pictures, "on_epoch": report}
                results[name] += _one_split(bank, places, lr_per == "run", options)
    return results


def _one_split(
    bank: FeatureBank, recipes: dict[Path, Recipe], lr_per_run: bool, options: dict[str, Any]
) -> list[Result]:
    """The runs of recipes that differ in the seed alone, by folder."""
    prepared, runs = None, []
    on_epoch = options.pop("on_epoch")
    with contextlib.ExitStack() as opened:
        for folder, recipe in recipes.items():
            report = None if on_epoch is None else functools.partial(on_epoch, recipe.seed)
            run = Run(bank, recipe, folder=folder, resume=True, on_epoch=report, prepared=prepared, **options)
            opened.callback(run.close)
            runs.append((run, run.train()))
            prepared = run.prepared
        common = max(recipe.lr, key=lambda lr: sum(scores[lr] for _, scores in runs))
        own = [max(scores, key=scores.__getitem__) for _, scores in runs]
        chosen = own if lr_per_run else [common] * len(runs)
        return [run.finish(lr) for (run, _), lr in zip(runs, chosen, strict=True)]


def _numbers(name: str, values: Sequence[int], above: int) -> list[int]:
    numbers = [as_integer(name, value, 0, above) for value in as_list(name, values)]
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"{name} must differ and be at least one; got {numbers}")
    return numbers


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
