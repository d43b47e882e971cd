"""A GPU that isn't there: tensors on "cuda" without memory, and a record of everything that would be launched.

Inside ``recording`` a call of the package's functions runs as it would on a GPU of that kind, in Python and in
PyTorch's dispatcher. Tensors have shapes, strides and types only; but tensors of integers and vectors of floats keep
their values, as far as these follow from integers, and hold 1 otherwise: loops depend on them. Each launch of a Triton
kernel is compiled ahead of time and recorded instead of run, and so is each of PyTorch's operations that would start a
kernel: all that neither return a view nor only allocate.

The process is taken for one with that GPU afterwards: use one of its own.
"""

from __future__ import annotations

import contextlib
import math
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

DEVICE = torch.device("cuda:0")
_KNOWN_VALUES = 1 << 24  # kept of a tensor at most
_NO_LAUNCH = (
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "set_", "resize_",
    "_local_scalar_dense", "record_stream", "_unsafe_view",
)  # fmt: skip
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


class StandIn(Tensor):
    """A tensor that says it is on a GPU; `known` holds its values if there are some."""

    meta: Tensor
    known: Tensor | None

    @staticmethod
    def __new__(cls, meta: Tensor, known: Tensor | None = None) -> StandIn:
        made: StandIn = torch.Tensor._make_subclass(cls, meta)
        made.meta, made.known = meta, known
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def data_ptr(self) -> int:
        """Only its alignment means anything."""
        return int(self.storage_offset()) * self.element_size()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"StandIn({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func}: a stand-in tensor outlived the record it belongs to")


@dataclass(frozen=True)
class Operation:
    """One of PyTorch's operations: the bytes that it reads and writes, and its products' flops."""

    name: str
    bytes: int
    flops: int = 0
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Launch:
    """A launch of a Triton kernel: `arguments` are its parameters that are passed at run time, in order.

    `error` says why it can't be compiled for the target; `compiled` is None then.
    """

    kernel: str
    grid: tuple[int, int, int]
    warps: int
    arguments: tuple[tuple[str, Any], ...]
    compiled: Any
    error: str = ""


@dataclass
class Record:
    """What a call launches, in order; `backward_from` is where its backward begins."""

    events: list[Operation | Launch] = field(default_factory=list)
    backward_from: int = -1
    syncs: int = 0

    @property
    def launches(self) -> list[Launch]:
        return [event for event in self.events if isinstance(event, Launch)]

    @property
    def operations(self) -> list[Operation]:
        return [event for event in self.events if isinstance(event, Operation)]

    def counts(self) -> tuple[int, int]:
        """Launches of the forward and of the backward."""
        forward = len(self.events) if self.backward_from < 0 else self.backward_from
        return forward, len(self.events) - forward


def storage_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor's elements take, each place of an expanded one once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0]
    return math.prod(sizes) * tensor.element_size() if tensor.numel() else 0


def starts_a_kernel(func: Any) -> bool:
    """Whether one of PyTorch's operations would on a GPU: it neither returns a view nor only allocates."""
    return not func.is_view and func.overloadpacket.__name__ not in _NO_LAUNCH


class _Mode(TorchDispatchMode):
    """Runs operations on shapes, on values too where all are known, and notes those that would launch."""

    def __init__(self, record: Record) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = record

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        stand_ins = [leaf for leaf in leaves if isinstance(leaf, StandIn)]
        # To PyTorch's own code the stand-ins are on "meta": what it makes for them goes there.
        asked = kwargs.get("device")
        on_gpu = asked is not None and torch.device(asked).type in ("cuda", "meta")
        if func.namespace == "fusedloss":
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        if not stand_ins and not on_gpu:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.record.syncs += 1
        if name == "_to_copy" and _changes_nothing(args[0], kwargs):
            return args[0]
        result = self._run(func, leaves, stand_ins, args, kwargs)
        if starts_a_kernel(func):
            self._note(name, leaves, result, args)
        return result

    def _run(
        self, func: Any, leaves: list[Tensor], stand_ins: list[StandIn], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        values = None
        if all(leaf.known is not None if isinstance(leaf, StandIn) else leaf.numel() <= 1 for leaf in leaves):
            cpu = {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") is not None else kwargs
            name = func.overloadpacket.__name__
            # What a kernel is to write isn't known: loops over it run once, and are reported.
            made = leaves or kwargs.get("dtype") in _INTEGERS or name == "arange"
            if made and not (name in _NO_LAUNCH and "empty" in name):
                with contextlib.suppress(RuntimeError, IndexError, NotImplementedError):
                    values = func(*tree_map(_known, args), **tree_map(_known, cpu))
        elif func._schema.is_mutable:
            for written in stand_ins[:1]:
                written.known = None
        meta = {**kwargs, "device": torch.device("meta")} if "device" in kwargs else kwargs
        shapes = func(*tree_map(_meta, args), **tree_map(_meta, meta))
        by_meta = {id(each.meta): each for each in stand_ins}
        results, spec = tree_flatten(shapes)
        known = tree_flatten(values)[0] if values is not None else [None] * len(results)

        def wrapped(each: Any, value: Any) -> Any:
            if not isinstance(each, Tensor):
                return each
            written = by_meta.get(id(each))
            return StandIn(each, _kept(each, value)) if written is None else written

        return tree_unflatten([wrapped(each, value) for each, value in zip(results, known, strict=True)], spec)

    def _note(self, name: str, leaves: Sequence[Tensor], result: Any, args: tuple[Any, ...]) -> None:
        results = [each for each in tree_flatten(result)[0] if isinstance(each, Tensor)]
        if results and not any(each.numel() for each in results):
            return
        tensors = {id(each): each for each in (*leaves, *results)}
        moved = sum(map(storage_bytes, tensors.values()))
        if name in ("index", "index_select", "gather", "embedding"):
            # Of what is picked from, only the picked.
            moved = 2 * sum(map(storage_bytes, results)) + sum(map(storage_bytes, leaves[1:]))
        if name in ("sort", "argsort"):
            # Radix sort: a pass for each byte of a key, over keys and places.
            moved = 2 * leaves[0].element_size() * sum(map(storage_bytes, results))
        self.record.events.append(Operation(name, moved, _flops(name, args), _product_dtype(args)))


def _changes_nothing(tensor: Tensor, kwargs: dict[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    return isinstance(tensor, StandIn) and dtype in (None, tensor.dtype) and kwargs.get("device") is not None


def _known(value: Any) -> Any:
    return value.known if isinstance(value, StandIn) else value


def _meta(value: Any) -> Any:
    if isinstance(value, StandIn):
        return value.meta
    # Numbers of 0 dimensions on the CPU mix with tensors of any device.
    return value.to("meta") if isinstance(value, Tensor) and value.dim() else value


def _kept(meta: Tensor, values: Any) -> Tensor | None:
    """Values that are few enough; 1 in vectors of floats of which nothing is known."""
    if meta.numel() > _KNOWN_VALUES:
        return None
    if isinstance(values, Tensor):
        return values if values.dim() <= 1 or values.dtype in _INTEGERS else None
    if meta.is_floating_point() and meta.dim() <= 1:
        return torch.ones(meta.shape, dtype=meta.dtype, device="cpu")
    return None


def _flops(name: str, args: tuple[Any, ...]) -> int:
    """Of matrix products, 0 of anything else."""
    factors = {"mm": args[:2], "bmm": args[:2], "addmm": args[1:3], "addmm_": args[1:3], "baddbmm": args[1:3]}
    if name not in factors:
        return 0
    a, b = factors[name]
    return 2 * int(a.numel()) * int(b.shape[-1])


def _product_dtype(args: tuple[Any, ...]) -> torch.dtype:
    tensors = [each for each in args if isinstance(each, Tensor)]
    return tensors[-1].dtype if tensors else torch.float32


# Compiled kernels are kept by device: each target has a number.
_NUMBERS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


class _Driver:
    """What Triton asks a driver for where kernels are only compiled."""

    def __init__(self, target: Any, number: int) -> None:
        self.target, self.number = target, number

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def target_of(name: str) -> Any:
    """Triton's target of "sm_90" or "gfx942"."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)


def _runtime_leaves(name: str, kind: Any, value: Any) -> Iterator[tuple[str, str, Any]]:
    """The parameters that are passed at run time among one parameter's fields: name, Triton's type and value."""
    if isinstance(kind, tuple):
        names = getattr(kind, "_fields", range(len(kind)))
        for part, of_kind, of_value in zip(names, kind, value, strict=True):
            yield from _runtime_leaves(f"{name}.{part}", of_kind, of_value)
    elif kind != "constexpr":
        yield name, kind, value


def _recorder(record: Record) -> Callable[..., Any]:
    from triton.runtime.jit import JITFunction

    compile_and_run = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled, error = None, ""
        try:
            compiled = compile_and_run(self, *args, grid=(1,), warmup=True, **kwargs)
        except Exception as failure:  # whatever a backend's compiler raises
            cause = failure.__cause__ or failure
            lines = [line for line in f"{cause}".splitlines() if line.strip(" ^")]
            error = f"{type(failure).__name__}: {lines[-1].strip() if lines else ''}"
        if warmup:
            return compiled
        values = {parameter.name: value for parameter, value in zip(self.params, args, strict=False)} | kwargs
        leaves: list[tuple[str, str, Any]] = []
        if compiled is not None:
            for name, kind in compiled.src.signature.items():
                leaves += _runtime_leaves(name, kind, values.get(name))
        counts = tuple(grid(values)) if callable(grid) else tuple(grid)
        full = (*counts, 1, 1)[:3]
        passed = tuple((f"{name}: {kind}", value) for name, kind, value in leaves)
        warps = kwargs.get("num_warps", 4) if compiled is None else compiled.metadata.num_warps
        record.events.append(Launch(self.__name__, full, warps, passed, compiled, error))
        return compiled

    return run


class _NoDevice(contextlib.nullcontext[None]):
    def __init__(self, *_: Any) -> None:
        super().__init__()


def _patches(record: Record, processors: int, target: str) -> list[Any]:
    from triton.runtime.jit import JITFunction

    is_hip = not target.startswith("sm_")
    capability = (9, 4) if is_hip else (int(target[3:-1]), int(target[-1]))

    properties = types.SimpleNamespace(
        name="stand-in", major=capability[0], minor=capability[1], multi_processor_count=processors, warp_size=32,
        total_memory=80 << 30, L2_cache_size=50 << 20, regs_per_multiprocessor=65536,
        gcnArchName=target if is_hip else "",
        max_threads_per_multi_processor=2048, shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
    )  # fmt: skip
    stream = types.SimpleNamespace(cuda_stream=0, device=DEVICE)
    of_cuda: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": _NoDevice,
        "current_stream": lambda *_: stream,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda *_: None,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: capability,
        "get_device_name": lambda *_: "stand-in",
        "mem_get_info": lambda *_: (80 << 30, 80 << 30),
    }
    patches = [
        mock.patch.object(torch.cuda, name, value) for name, value in of_cuda.items() if hasattr(torch.cuda, name)
    ]
    if is_hip:
        patches.append(mock.patch.object(torch.version, "hip", "6.0"))
    patches.append(mock.patch.object(JITFunction, "run", _recorder(record)))
    return [*patches, *without_dispatcher()]


def without_dispatcher() -> list[Any]:
    """Patches by which a mode sees the way that plain tensors take, around the dispatcher: what users run."""
    return patched_everywhere("is_direct", lambda *_: True)


def patched_everywhere(name: str, function: Callable[..., Any], within: str = "fusedloss.") -> list[Any]:
    """Patches of a function in each module of the package, or of a part of it, that has it."""
    modules = [module for path, module in list(sys.modules.items()) if path.startswith(within)]
    return [mock.patch.object(module, name, function) for module in modules if callable(getattr(module, name, None))]


@contextlib.contextmanager
def recording(target: str, processors: int) -> Iterator[Record]:
    """Inside the block tensors of device "cuda" are stand-ins on a GPU of `target`, and launches are recorded."""
    from triton.runtime import driver

    import fusedloss

    record = Record()
    # Operations are imported when they are first used: their modules have to be there to be patched.
    for stem in fusedloss.backends.OPERATIONS:
        __import__(f"fusedloss.ops.{stem}")
        __import__(f"fusedloss.backends.triton.{stem}")
    driver.set_active(_Driver(target_of(target), _NUMBERS.index(target)))
    with contextlib.ExitStack() as stack:
        for patch in _patches(record, processors, target):
            stack.enter_context(patch)
        stack.enter_context(fusedloss.backend("triton"))
        stack.enter_context(_Mode(record))
        yield record
