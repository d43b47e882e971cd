"""FLOPs of the linear operations, for ``torch.utils.flop_counter.FlopCounterMode``."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"


def _products(input_shape: Sequence[int], weight_shape: Sequence[int]) -> int:
    (rows, width), classes = input_shape, weight_shape[0]
    return 2 * rows * width * classes


def _linear_ce(input_shape: Any, weight_shape: Any, *arguments: Any, **_: Any) -> int:
    """The logits, and a product for each of the two gradients that the mask asks for."""
    mask = arguments[-1]
    return _products(input_shape, weight_shape) * (1 + bool(mask[0]) + bool(mask[1]))


def _linear_stats(input_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    return _products(input_shape, weight_shape)


def _register(counter: ModuleType) -> None:
    operations = torch.ops.fusedloss
    counter.register_flop_formula([operations.linear_ce, operations.linear_stats_backward])(_linear_ce)
    counter.register_flop_formula(operations.linear_stats)(_linear_stats)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers the formulas when the counter is imported: importing it here would import Triton."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_flop_formulas() -> None:
    """Called once, after the operations are defined."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _AfterImport())
