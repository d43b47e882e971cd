"""From a recorded launch to counts and a predicted time: the model that ``bench.static`` writes down."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.static import sass
from bench.static.gpu import Launch, Operation, StandIn, storage_bytes
from bench.static.walk import Access, Arguments, Walked, Walker, address_of

CLOCK = 1.9e9
LANES = 128  # a multiprocessor's
LEAST_SECONDS = 1.5e-6  # of a launch in a captured graph
START_SECONDS = 75e-9  # between the starts of two programs on one multiprocessor
# Programs that are walked through, spread over the grid; more where these differ.
_FEW, _MANY = 3, 15
_LONG = 200_000  # instructions of a thread beyond which a few programs have to do
_LEGACY_PRODUCTS = 0.6  # of the GEMM rate, for products that a warp issues alone (mma.sync)
_FP64 = re.compile(r"^(DADD|DMUL|DFMA|DSETP|DMNMX|MUFU\.\w+64H|[FI]2[FI]\.(\w+\.)*F64|F2[FI]\S*\.F64)")
_PRODUCT = re.compile(r"^(HGMMA\.(\d+)x(\d+)x(\d+)|HMMA\.(\d+))\.F(?:32|16)(\.TF32|\.BF16)?")
_SHORT = {"1688": 16 * 8 * 8, "16816": 16 * 8 * 16, "1684": 16 * 8 * 4}
_PARAMETERS_AT = {"sm_8": 0x160, "sm_9": 0x210, "sm_1": 0x380}
_SIZES_AT = {"sm_8": (0x0, 0xC), "sm_9": (0x0, 0xC), "sm_1": (0x360, 0x370)}  # of a program, and of the grid
_SIZES = {"i64": 8, "u64": 8, "fp64": 8, "i16": 2, "u16": 2, "fp16": 2, "bf16": 2, "i8": 1, "u8": 1, "i1": 1, "u1": 1}


@dataclass(frozen=True)
class Gpu:
    """Rates seen on a GPU: bytes/s of a copy, flop/s of matrix products by type, bytes of its L2 cache."""

    name: str
    processors: int
    copy: float
    products: dict[torch.dtype, float]
    cache: float = 50e6


def _products(bf16: float) -> dict[torch.dtype, float]:
    # Products of float32 run in tf32 inside the kernels, and on the float32 pipes in PyTorch's.
    return {torch.bfloat16: bf16, torch.float16: bf16, torch.float32: 50e12, torch.float64: 50e12}


H100 = Gpu("H100", 132, 3.0e12, _products(798e12))
H200 = Gpu("H200", 132, 4.3e12, _products(790e12))
GPUS = (H100, H200)
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor holds."""

    threads: int = 2048
    shared: int = 233472
    registers: int = 65536
    programs: int = 32


_LIMITS = {
    "sm_80": Limits(shared=167936),
    "sm_86": Limits(1536, 102400, 65536, 16),
    "sm_89": Limits(1536, 102400, 65536, 24),
    "sm_120": Limits(1536, 102400, 65536, 24),
}


@dataclass
class Kernel:
    """A launch, judged. Counts are over the whole grid; instructions are those of threads."""

    launch: Launch
    target: str
    registers: int = 0
    shared: int = 0
    spilled: int = 0  # bytes of stack and local memory of a thread
    programs: int = 0  # that a multiprocessor holds
    instructions: float = 0.0
    longest: float = 0.0  # instructions of the longest program that was seen
    hot_fp64: float = 0.0  # float64 instructions within loops, or all where there is no loop
    bytes: float = 0.0  # at least, each tensor once
    missed: dict[str, float] = field(default_factory=dict)  # bytes read again beyond the cache, by GPU
    in_flight: float = 0.0  # bytes of loads under way on a multiprocessor
    flops: float = 0.0
    product_seconds: float = 0.0  # of one multiprocessor at the GEMM rate of one, times multiprocessors
    loads: str = ""
    stores: str = ""
    unknown: int = 0  # branches and loops that floats decide
    truncated: bool = False

    @property
    def count(self) -> int:
        return math.prod(self.launch.grid)

    @property
    def warps(self) -> int:
        """Warps that a multiprocessor holds."""
        return self.programs * self.launch.warps

    def seconds(self, gpu: Gpu) -> float:
        """Predicted time: the longest of traffic, issue and matrix products (see the package's docstring)."""
        if not self.count:
            return 0.0
        memory = (self.bytes + self.missed.get(gpu.name, 0.0)) / gpu.copy
        most = math.ceil(self.count / gpu.processors)  # programs of the busiest multiprocessor
        warps = min(self.programs, most) * self.launch.warps
        issue = most * self.instructions / self.count / (LANES * CLOCK * issue_share(warps))
        issue = max(issue, self.longest / (LANES * CLOCK * issue_share(self.launch.warps)))
        products = self.product_seconds * most / self.count
        together = issue + products if self.programs == 1 else max(issue, products)
        return max(memory, together, most * START_SECONDS, LEAST_SECONDS)

    def bound(self, gpu: Gpu) -> str:
        """What its predicted time is the time of."""
        whole = self.seconds(gpu)
        if whole <= LEAST_SECONDS:
            return "launch"
        memory = (self.bytes + self.missed.get(gpu.name, 0.0)) / gpu.copy
        if memory >= whole:
            return "memory"
        most = math.ceil(self.count / gpu.processors)
        if most * START_SECONDS >= whole:
            return "starts"
        products = self.product_seconds * most / self.count
        return "products" if products >= whole / 2 else "issue"


def issue_share(warps: float) -> float:
    """The share of a multiprocessor's issue slots that so many warps fill: 0.65 at 32 and more, 0.45 at 16."""
    if warps >= 32:
        return 0.65
    return 0.45 + (warps - 16) / 16 * 0.20 if warps >= 16 else 0.45 * max(warps, 1) / 16


def operation_seconds(operation: Operation, gpu: Gpu) -> float:
    """One of PyTorch's operations at the copy's bandwidth or the GEMM's rate."""
    products = operation.flops / gpu.products[operation.dtype] if operation.flops else 0.0
    return max(operation.bytes / gpu.copy, products, LEAST_SECONDS)


def programs_per_processor(registers: int, threads: int, shared: int, target: str) -> int:
    """How many programs a multiprocessor holds at once."""
    limits = _LIMITS.get(target, Limits())
    warps = threads // 32
    of_registers = limits.registers // (max(registers, 1) + 7 & ~7) // 32 // max(warps, 1)
    return max(1, min(of_registers, limits.threads // threads, limits.programs, limits.shared // (shared + 1024)))


def judge(launch: Launch, target: str) -> Kernel:
    """Resources of a launch and, where machine code of a known kind is there, what its threads do."""
    found = Kernel(launch, target)
    if launch.compiled is None:
        return found
    if "cubin" not in launch.compiled.asm:
        _judge_amd(found)
        return found
    cubin = launch.compiled.asm["cubin"]
    resources = sass.resources(cubin)
    found.registers, found.spilled = resources.registers, resources.stack + resources.local
    found.shared = max(resources.shared, launch.compiled.metadata.shared)
    threads = 32 * launch.warps
    found.programs = programs_per_processor(found.registers, threads, found.shared, target)
    if found.count:
        _count(found, _walker(cubin), threads)
    return found


@functools.lru_cache(maxsize=64)
def _walker(cubin: bytes) -> Walker:
    return Walker(sass.listing(cubin))


def _count(found: Kernel, walker: Walker, threads: int) -> None:
    launch = found.launch
    constants, tensors = _constants(launch, found.target)
    content, streamed = functools.partial(_content, tensors), _streamed(tensors)

    def walk(place: int) -> Walked:
        return walker.walk(Arguments(constants, _program(launch.grid, place), launch.grid, threads, content, streamed))

    walks: list[Walked] = []
    for place in _spread(found.count, _FEW):
        walks.append(walk(place))
        if walks[-1].truncated:
            break
    issued = [each.issued for each in walks]
    if found.count > _FEW and not walks[-1].truncated:
        # The first class is often the largest.
        issued.append(walk(0).issued)
        if max(issued) > 1.01 * min(issued) and max(issued) < _LONG:
            walks = [walk(place) for place in _spread(found.count, _MANY)]
            issued += [walk(found.count - 1).issued, *(each.issued for each in walks)]
    found.longest = float(threads * max(issued))
    weight = threads * found.count / len(walks)
    code = walker.listing.code
    counts = [sum(walk.counts[place] for walk in walks) for place in range(len(code))]
    in_loops = {place for loop in walker.listing.loops if counts[loop.branch] > 1
                for place in range(loop.first, loop.branch + 1)}  # fmt: skip
    found.instructions = weight * sum(counts)
    fp64 = [place for place, each in enumerate(code) if counts[place] and _FP64.match(each.op)]
    found.hot_fp64 = weight * sum(counts[place] for place in fp64 if place in in_loops or not in_loops)
    _count_products(found, walker, counts, weight)
    found.in_flight = max(walk.outstanding for walk in walks) * threads * found.programs
    found.unknown = len({place for walk in walks for place in walk.unknown_branches | walk.unknown_loops})
    found.truncated = any(walk.truncated for walk in walks)
    _count_traffic(found, walks, weight, tensors, walker, counts)


def _streamed(tensors: list[Any]) -> frozenset[int]:
    """The tensors that are no smaller than an eighth of the largest: the others stay in the caches."""
    sizes = {number: storage_bytes(each) for number, each in enumerate(tensors) if isinstance(each, Tensor)}
    return frozenset(number for number, size in sizes.items() if 8 * size >= max(sizes.values()))


def _count_products(found: Kernel, walker: Walker, counts: list[int], weight: float) -> None:
    gpu = H100
    for place, instruction in enumerate(walker.listing.code):
        product = _PRODUCT.match(instruction.op) if counts[place] else None
        if product is None:
            continue
        _, m, n, k, short, kind = product.groups()
        of_thread = 2 * int(m) * int(n) * int(k) / 128 if m else 2 * _SHORT.get(short, 0) / 32
        rate = gpu.products[torch.bfloat16] * (0.5 if kind == ".TF32" else 1.0) * (1.0 if m else _LEGACY_PRODUCTS)
        found.flops += of_thread * counts[place] * weight
        found.product_seconds += of_thread * counts[place] * weight / rate * gpu.processors


def _spread(count: int, samples: int) -> list[int]:
    """Places in the middle of equal parts; all, where there are no more."""
    if count <= samples:
        return list(range(count))
    return [int((2 * part + 1) * count / (2 * samples)) for part in range(samples)]


def _program(grid: tuple[int, int, int], place: int) -> tuple[int, int, int]:
    return place % grid[0], place // grid[0] % grid[1], place // grid[0] // grid[1]


def _constants(launch: Launch, target: str) -> tuple[bytes, list[Any]]:
    """The constant bank with the launch's arguments, and its tensors by number."""
    start = _PARAMETERS_AT[target[:4]]
    bank = bytearray(start)
    tensors: list[Any] = []
    for described, value in launch.arguments:
        kind = described.rsplit(": ", 1)[1]
        tensors.append(value if isinstance(value, Tensor) else None)
        size = 8 if kind.startswith("*") else _SIZES.get(kind, 4)
        bank += bytes(-(len(bank) - start) % size)
        if kind.startswith("*"):
            number = address_of(len(tensors) - 1) + (value.data_ptr() if isinstance(value, Tensor) else 0)
        elif isinstance(value, float):
            number = int.from_bytes(_float_bytes(value, kind), "little")
        else:
            number = int(value) if isinstance(value, int) else 0
        bank += (number & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    # Where the code asks the bank for the size of a program and of the grid.
    threads_at, grid_at = _SIZES_AT[target[:4]]
    for place, sizes in ((threads_at, (32 * launch.warps, 1, 1)), (grid_at, launch.grid)):
        bank[place : place + 12] = b"".join(size.to_bytes(4, "little") for size in sizes)
    return bytes(bank) + bytes(64), tensors


def _float_bytes(value: float, kind: str) -> bytes:
    dtype = {"fp64": torch.float64, "fp16": torch.float16, "bf16": torch.bfloat16}.get(kind, torch.float32)
    return bytes(torch.tensor([value], dtype=dtype, device="cpu").view(torch.uint8).tolist())


def _content(tensors: list[Any], argument: int, offset: int, size: int) -> bytes | None:
    """What lies in an argument's tensor, where that is known."""
    tensor = tensors[argument] if argument < len(tensors) else None
    if not isinstance(tensor, StandIn):
        return None
    known = tensor.known
    if known is None:
        return None
    place = (offset - tensor.data_ptr()) // tensor.element_size()
    count = max(1, size // tensor.element_size())
    last = known.storage_offset() + place + count
    if place < 0 or last * known.element_size() > known.untyped_storage().nbytes():
        return bytes(size)  # what nobody uses
    part = known.as_strided((count,), (1,), known.storage_offset() + place)
    return bytes(part.contiguous().view(torch.uint8).tolist())[:size]


def _count_traffic(
    found: Kernel, walks: list[Walked], weight: float, tensors: list[Any], walker: Walker, counts: list[int]
) -> None:
    """Bytes of memory: each tensor's once, and again where a later pass finds it no longer in the cache."""
    total: Counter[Access] = Counter()
    for walk in walks:
        total.update(walk.bytes)
    found.loads, found.stores = (_widths(total, store) for store in (False, True))
    by_tensor: dict[tuple[int, bool], Counter[int]] = {}
    for access, moved in total.items():
        by_tensor.setdefault((access.argument, access.store), Counter())[access.loop] += int(moved * weight)
    for (argument, store), by_loop in by_tensor.items():
        tensor = tensors[argument] if 0 <= argument < len(tensors) else None
        asked = sum(by_loop.values())
        if not isinstance(tensor, Tensor):
            found.bytes += asked
            continue
        size = storage_bytes(tensor)
        found.bytes += min(size, asked)
        # Tiles reach beyond a tensor's edges: less than twice its size is one pass.
        passes = sum(share if share >= 2 else min(share, 1) for share in (moved / size for moved in by_loop.values()))
        if store or passes <= 1:
            continue
        footprint = size / (found.count * _turns(walker, set(by_loop), counts, len(walks)))
        resident = footprint * min(found.count, found.programs * PROCESSORS[found.target])
        for gpu in GPUS:
            lost = min(1.0, max(0.0, 2 * resident / gpu.cache - 0.5) / 0.5)
            found.missed[gpu.name] = found.missed.get(gpu.name, 0.0) + lost * (passes - 1) * size


def _turns(walker: Walker, branches: set[int], counts: list[int], walks: int) -> float:
    """How often a program runs the loops around all of these places: a pass is over what lies within one turn."""
    turns = 1.0
    inner = [loop for loop in walker.listing.loops if loop.branch in branches]
    if -1 in branches or not inner:
        return turns
    for loop in walker.listing.loops:
        around = all(loop.first <= each.first and each.branch <= loop.branch for each in inner)
        if around and (len(inner) > 1 or loop not in inner):
            turns *= max(1.0, counts[loop.branch] / walks)
    return turns


def _widths(total: Counter[Access], store: bool) -> str:
    """The widths in bits that carry at least a tenth of the bytes, widest first."""
    by_width: Counter[int] = Counter()
    for access, moved in total.items():
        if access.store == store:
            by_width[8 * access.width] += moved
    everything = sum(by_width.values())
    shares = [(width, moved / everything) for width, moved in sorted(by_width.items(), reverse=True)]
    return " ".join(f"{width}:{100 * share:.0f}%" for width, share in shares if share >= 0.1)


def _judge_amd(found: Kernel) -> None:
    text = found.launch.compiled.asm.get("amdgcn", "")
    numbers = {name: int(value) for name, value in re.findall(r"\.(\w+_(?:count|size)):\s*(\d+)", text)}
    found.registers = numbers.get("vgpr_count", 0)
    found.shared = max(numbers.get("group_segment_fixed_size", 0), found.launch.compiled.metadata.shared)
    found.spilled = 4 * numbers.get("vgpr_spill_count", 0)
