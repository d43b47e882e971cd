"""Launch plans: a kernel that was launched once is launched again without Triton's JIT, whose work takes longer.

The key of a plan holds every fact of the arguments that Triton specialises a kernel by, or a finer one: where Triton
looks whether a number is 1 or divisible by 16, the key has the number. So the arguments of a plan never need another
kernel than the plan's. What isn't known here goes through the JIT: other types of arguments, hooks, debugging,
Triton's interpreter, and launchers that are called in another way.
"""

from __future__ import annotations

import inspect
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_MOST = 4096  # plans: calls whose numbers never return must not fill the memory

_TENSORS = (torch.Tensor, torch.nn.Parameter)
_VALUES = (int, bool, float, str, type(None))
_CONSTANTS = (tl.constexpr, JITFunction, type(None))
_JIT_RUN = JITFunction.run
_dtype, _address = operator.attrgetter("dtype"), torch.Tensor.data_ptr


class Plan(NamedTuple):
    """A loaded kernel: how it is called, the driver that loaded it, and the parameters after the positional ones.

    `tail` are their values where all are constants of the kernel, which launchers pass over, and else None.
    """

    launch: Callable[..., Any]
    driver: Any
    tail: tuple[Any, ...] | None
    names: tuple[str, ...]
    alive: tuple[Any, ...]  # what the key has the addresses of


class _Layout:
    """Where flat arguments of these types have what the key is made of, and the plans for such arguments."""

    def __init__(self, kinds: tuple[type, ...]) -> None:
        self.plans: dict[tuple[Any, ...], Plan] = {}
        self.tensors = _getter([at for at, kind in enumerate(kinds) if kind in _TENSORS])
        self.values = _getter([at for at, kind in enumerate(kinds) if kind in _VALUES and kind is not type(None)])
        others = [at for at, kind in enumerate(kinds) if kind not in _TENSORS and kind not in _VALUES]
        self.constants = _getter(others)
        self.known = all(kinds[at] in (tl.constexpr, tl.dtype, JITFunction) for at in others)


class _Walk:
    """How arguments of these types become flat; `short` leaves out tuples of a class that holds constants alone."""

    def __init__(self, outer: tuple[type, ...]) -> None:
        self.constants = [at for at, kind in enumerate(outer) if kind in _constant_classes]
        # The number of fields of a named tuple follows from its class, that of others doesn't.
        self.tuples = [at for at, kind in enumerate(outer) if kind is tuple]
        self.whole = _flattener(outer, [])
        self.short = _flattener(outer, self.constants)


class Key(NamedTuple):
    """The key of a call, and where its plan is kept."""

    facts: tuple[Any, ...]
    layout: _Layout


_walks: dict[tuple[type, ...], _Walk] = {}
_layouts: dict[tuple[type, ...], _Layout] = {}
# Tuples of constants by address, and their classes: such a tuple is most often the same object again. They are kept, so
# that no other object gets the address.
_constant_tuples: dict[int, tuple[Any, ...]] = {}
_constant_classes: set[type] = set()
_kept = 0


def _getter(places: list[int]) -> Callable[[list[Any]], tuple[Any, ...]]:
    if not places:
        return lambda _: ()
    if len(places) == 1:
        return lambda flat: (flat[places[0]],)
    return operator.itemgetter(*places)


def _flattener(outer: tuple[type, ...], without: list[int]) -> Callable[[Sequence[Any]], list[Any]]:
    """The arguments with their tuples unpacked: as one expression, it takes half the time of a loop."""
    parts = [f"{'*' if issubclass(kind, tuple) else ''}a[{at}]" for at, kind in enumerate(outer) if at not in without]
    flattener: Callable[[Sequence[Any]], list[Any]] = eval(f"lambda a: [{', '.join(parts)}]")
    return flattener


def key_of(
    kernel: Any, arguments: Sequence[Any], constants: Mapping[str, Any], index: int, warps: int, stages: int
) -> Key | None:
    """The key of a launch on device `index`; None where the arguments aren't all of known types."""
    outer = tuple(map(type, arguments))
    walk = _walks.get(outer)
    if walk is None:
        walk = _walks[outer] = _Walk(outer)
    marks, flatten = [], walk.short
    for at in walk.constants:
        mark = id(arguments[at])
        if mark in _constant_tuples:
            marks.append(mark)
        else:
            marks, flatten = [], walk.whole
            break
    flat = flatten(arguments)
    if walk.tuples:
        marks += [len(arguments[at]) for at in walk.tuples]
    flat += constants.values()
    kinds = tuple(map(type, flat))
    layout = _layouts.get(kinds)
    if layout is None:
        layout = _layouts[kinds] = _Layout(kinds)
    if not layout.known:
        return None
    tensors = layout.tensors(flat)
    facts = (
        id(kernel), outer, tuple(constants), index, warps, stages, *marks, *layout.values(flat),
        *map(_dtype, tensors), *[not address % 16 for address in map(_address, tensors)],
        *map(_constant, layout.constants(flat)),
    )  # fmt: skip
    return Key(facts, layout)


def _constant(value: Any) -> Any:
    kind = type(value)
    if kind is tl.constexpr:
        return type(value.value), _constant(value.value)
    if kind is tl.dtype:
        return value.name
    # Functions are compared by their address, which is quicker than the hash of their source.
    return id(value) if kind is JITFunction else value if kind in _VALUES else repr(value)


def usual(kernel: Any) -> bool:
    """Whether a launch is nothing but a launch: no hooks, no debugging, no instrumentation, no other ``run``."""
    runtime = knobs.runtime
    return type(kernel) is JITFunction and not (
        runtime.debug
        or kernel.pre_run_hooks
        or _calls(runtime.launch_enter_hook)
        or _calls(runtime.launch_exit_hook)
        or getattr(runtime, "add_stages_inspection_hook", None) is not None
        or getattr(knobs.compilation, "instrumentation_mode", "")
        or JITFunction.run is not _JIT_RUN
    )


def _calls(hook: Any) -> bool:
    """Triton 3.4 has None where there is no hook, later ones a chain without calls."""
    return hook is not None and bool(getattr(hook, "calls", True))


def launched(
    key: Key, active: Any, grid: Sequence[int], arguments: Sequence[Any], constants: Mapping[str, Any], index: int
) -> bool:
    """Launches by the plan of this key on the driver's present device, `index`; False where there is none."""
    plan = key.layout.plans.get(key.facts)
    if plan is None or plan.driver is not active:
        return False
    tail = plan.tail if plan.tail is not None else [constants[name] for name in plan.names]
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    plan.launch(x, y, z, active.get_current_stream(index), (*arguments, *tail))
    return True


def keep(key: Key, kernel: Any, compiled: Any, arguments: Sequence[Any], constants: Mapping[str, Any]) -> None:
    """Makes the plan of a launch that went through the JIT, which gave `compiled`."""
    global _kept
    launch = _launch_of(compiled)
    rest = kernel.params[len(arguments) :]
    if launch is None or any(parameter.name not in constants for parameter in rest):
        return
    if _kept >= _MOST:
        clear()
    _kept += 1
    names = tuple(parameter.name for parameter in rest)
    tail = tuple(constants[name] for name in names) if all(parameter.is_constexpr for parameter in rest) else None
    leaves = [leaf for argument in arguments for leaf in (argument if isinstance(argument, tuple) else (argument,))]
    functions = [leaf for leaf in (*leaves, *constants.values()) if type(leaf) in _CONSTANTS]
    # Any tensors stay out of it.
    key.layout.plans[key.facts] = Plan(launch, driver.active, tail, names, (kernel, *functions))
    for argument in arguments:
        if isinstance(argument, tuple) and _is_of_constants(argument):
            _constant_tuples[id(argument)] = argument
            if type(argument) not in _constant_classes:
                _constant_classes.add(type(argument))
                _walks.clear()


def _is_of_constants(argument: tuple[Any, ...]) -> bool:
    """Without a constexpr it may be one that happens to hold nothing, and there are many of those."""
    kinds = set(map(type, argument))
    return type(argument) is not tuple and tl.constexpr in kinds and kinds.issubset(_CONSTANTS)


def clear() -> None:
    """Forgets every plan."""
    global _kept
    for cache in (_walks, _layouts, _constant_tuples, _constant_classes):
        cache.clear()
    _kept = 0


_GRID = ("self", "gridX", "gridY", "gridZ", "stream", "function")
_WITH_METADATA = (*_GRID, "kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook", "args")
_signatures: dict[type, tuple[str, ...]] = {}


def _launch_of(compiled: Any) -> Callable[..., Any] | None:
    """A function of the grid, the stream and all arguments; None where this Triton's launchers aren't known.

    Their C functions are called without the launcher around them, a third of a launch, where it has nothing to do.
    """
    run = getattr(compiled, "_run", None)
    if run is None or compiled.module is None:
        return None
    names = _signatures.get(type(run))
    if names is None:
        try:
            names = tuple(inspect.signature(type(run).__call__).parameters)
        except (TypeError, ValueError):
            names = ()
        _signatures[type(run)] = names
    if names not in ((*_GRID, "args"), _WITH_METADATA):
        return None
    function, metadata = compiled.function, compiled.packed_metadata

    def by_launcher(x: int, y: int, z: int, stream: Any, arguments: tuple[Any, ...]) -> None:
        run(x, y, z, stream, function, metadata, None, None, None, *arguments)

    direct = _direct(run, names, function, metadata)
    return direct or by_launcher


def _direct(run: Any, names: tuple[str, ...], function: Any, metadata: Any) -> Callable[..., Any] | None:
    """The launcher's C function itself, in the order of Triton 3.6 or of 3.8; None where it isn't known to be that."""
    launch = getattr(run, "launch", None)
    scratch = getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1)
    if type(run).__name__ != "CudaLauncher" or not isinstance(launch, types.BuiltinFunctionType) or scratch:
        return None
    cooperative, pdl = run.launch_cooperative_grid, run.launch_pdl
    if names == _WITH_METADATA:
        annotations, signature = getattr(run, "arg_annotations", None), getattr(run, "kernel_signature", None)
        if annotations is None or signature is None or getattr(run, "gsan_enabled", False):
            return None

        def of_arguments(x: int, y: int, z: int, stream: Any, arguments: tuple[Any, ...]) -> None:
            launch(x, y, z, stream, function, cooperative, pdl, metadata, None, None, None, None, None, annotations,
                   signature, arguments)  # fmt: skip

        return of_arguments

    def unpacked(x: int, y: int, z: int, stream: Any, arguments: tuple[Any, ...]) -> None:
        launch(x, y, z, stream, function, cooperative, pdl, None, None, metadata, None, None, None, *arguments)

    return unpacked
