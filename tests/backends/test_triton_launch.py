"""Launches without a GPU: plans against Triton's own keys, and what is passed to a driver that isn't there."""

import ctypes
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction, create_function_from_signature

import fusedloss
from fusedloss.backends.triton import capture, launch, plans, tiles, tuning

ROOT = Path(__file__).parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") == "1", reason="Triton's interpreter has no launches"
)


class Pair(NamedTuple):
    pointer: Any
    number: Any


class Other(NamedTuple):
    pointer: Any
    number: Any


class Constants(NamedTuple):
    function: Any
    first: Any
    second: Any


@triton.jit
def one(x):
    return x


@triton.jit
def two(x):
    return x + x


@triton.jit
def any_kernel(pair, single, constants, FLAG: tl.constexpr, SIZE: tl.constexpr):
    pass


@triton.jit
def other_kernel(pair, single, constants, FLAG: tl.constexpr, SIZE: tl.constexpr):
    pass


@triton.jit
def last_is_a_number(pair, number):
    pass


class Launcher:
    """In the place of a driver's: notes what it was called with."""

    launches: ClassVar[list[tuple[Any, ...]]] = []

    def __call__(self, gridX, gridY, gridZ, stream, function, kernel_metadata, launch_metadata, launch_enter_hook,
                 launch_exit_hook, *args):  # fmt: skip
        self.launches.append((function, (gridX, gridY, gridZ), kernel_metadata, args))


class OtherLauncher:
    def __call__(self, grid, *args):
        raise AssertionError("called as if it were known")


class Compiled:
    """In the place of a kernel that was compiled and loaded."""

    numbers = itertools.count(1)
    launcher: type = Launcher

    def __init__(self, source: Any, **_: Any) -> None:
        self.module, self.function, self.packed_metadata = object(), next(self.numbers), (4, 1, 0)
        self._run = self.run = self.launcher()
        self.src = source

    def launch_metadata(self, *_: Any) -> None:
        return None


@pytest.fixture(autouse=True)
def no_plans():
    plans.clear()
    tiles.forget()
    yield
    plans.clear()
    tiles.forget()


@pytest.fixture
def jit(monkeypatch):
    """Triton's JIT over a driver without a GPU and a compiler that compiles nothing; counts the JIT's launches."""
    active = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: active.device,
        get_current_stream=lambda device: 7,
        device=0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", active)
    monkeypatch.setattr(triton.compiler, "compile", Compiled)
    active.through_jit = 0
    run = JITFunction.run

    def counted(self, *arguments, **keywords):
        active.through_jit += 1
        return run(self, *arguments, **keywords)

    monkeypatch.setattr(JITFunction, "run", counted)
    monkeypatch.setattr(plans, "_JIT_RUN", counted)
    for kernel in (any_kernel, other_kernel, last_is_a_number):
        kernel.device_caches.clear()
    Launcher.launches.clear()
    return active


# Sixteen elements into it, and one: the address of the second isn't divisible by 16.
MEMORY = {dtype: torch.zeros(64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.int64)}
CONSTANTS = [
    Constants(function, tl.constexpr(first), tl.constexpr(second))
    for function in (one, two, None)
    for first in (True, 1, False)
    for second in (tl.float32, tl.float64, 16)
]
NUMBERS = st.sampled_from([0, 1, 2, 15, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, 2**40, 2**63, True, False])
TENSORS = st.builds(
    lambda dtype, start: MEMORY[dtype][start:], st.sampled_from([*MEMORY]), st.sampled_from([0, 16, 1, 2, 3])
)
LEAVES = st.one_of(
    st.none(), NUMBERS, TENSORS, st.sampled_from([1.0, 0.5, 16.0, tl.constexpr(1), tl.constexpr(True), one])
)
PAIRS = st.one_of(
    st.builds(Pair, LEAVES, NUMBERS), st.builds(Other, LEAVES, NUMBERS), st.tuples(LEAVES, NUMBERS), st.tuples(LEAVES)
)
CALLS = st.tuples(
    st.sampled_from([any_kernel, other_kernel]),
    st.tuples(PAIRS, st.one_of(LEAVES, st.tuples(LEAVES)), st.sampled_from(CONSTANTS)),
    st.fixed_dictionaries({"FLAG": st.sampled_from([True, False, 1, 0]), "SIZE": st.sampled_from([1, 16, tl.float32])}),
    st.sampled_from([0, 1]),
    st.sampled_from([4, 8]),
    st.sampled_from([1, 2]),
)


def triton_key(kernel, arguments, constants, index, warps, stages):
    """Triton's own specialisation of a call."""
    backend = triton.compiler.make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, options = binder(*arguments, **constants, **launch.options(warps, stages))
    return kernel.__name__, index, repr(specialization), repr(options)


@settings(max_examples=400, deadline=None)
@given(CALLS, CALLS)
def test_plan_keys_differ_where_tritons_do(first, second):
    keys = [plans.key_of(*call) for call in (first, second)]
    assert None not in keys
    if triton_key(*first) != triton_key(*second):
        assert (id(keys[0].layout), keys[0].facts) != (id(keys[1].layout), keys[1].facts)


@settings(max_examples=400, deadline=None)
@given(CALLS, st.data())
def test_plan_keys_differ_by_one_change(call, data):
    """Calls that differ in one place alone are the ones that a careless key takes for the same."""
    kernel, arguments, constants, index, warps, stages = call
    at = data.draw(st.integers(0, 2))
    other = list(arguments)
    if at == 2:
        other[at] = data.draw(st.sampled_from(CONSTANTS))
    elif at == 0:
        kind = type(arguments[0])
        replaced = [*arguments[0]]
        place = data.draw(st.integers(0, len(replaced) - 1))
        replaced[place] = data.draw(LEAVES)
        other[at] = tuple(replaced) if kind is tuple else kind(*replaced)
    else:
        other[at] = data.draw(LEAVES)
    second = (kernel, tuple(other), constants, index, warps, stages)
    keys = [plans.key_of(*each) for each in (call, second)]
    if triton_key(*call) != triton_key(*second):
        assert (id(keys[0].layout), keys[0].facts) != (id(keys[1].layout), keys[1].facts)


def test_launches_are_those_of_the_jit(jit):
    """Random calls, each of them several times: the kernel is always the one that the JIT takes."""
    cases = st.lists(CALLS, min_size=1, max_size=4)

    @settings(max_examples=300, deadline=None)
    @given(cases)
    def launched(calls):
        for kernel, arguments, constants, _, warps, stages in calls * 3:
            launch.start(kernel, (2, 3), arguments, CPU, warps, stages, **constants)
            function, grid, metadata, passed = Launcher.launches[-1]
            expected = kernel[(2, 3)](*arguments, **constants, **launch.options(warps, stages))
            assert (function, grid, metadata) == (expected.function, (2, 3, 1), (4, 1, 0))
            assert passed == (*arguments, constants["FLAG"], constants["SIZE"])

    launched()


def start(kernel=any_kernel, pointer=MEMORY[torch.float32], number=2, single=None, device=CPU, **changes):
    constants = {"FLAG": False, "SIZE": 16, **changes}
    launch.start(kernel, (5,), (Pair(pointer, number), single, CONSTANTS[0]), device, 4, **constants)


def test_the_third_launch_goes_around_the_jit(jit):
    # The second finds that the constants are the same object.
    for _ in range(5):
        start()
    assert jit.through_jit == 2
    assert len(Launcher.launches) == 5
    assert len({call[0] for call in Launcher.launches}) == 1


@pytest.mark.parametrize(
    "change",
    [{"pointer": MEMORY[torch.float32][1:]}, {"pointer": MEMORY[torch.bfloat16]}, {"pointer": None}, {"number": 1},
     {"number": 16}, {"number": 2**31}, {"single": 3}, {"single": MEMORY[torch.int64]}, {"FLAG": True}, {"SIZE": 32},
     {"maxnreg": 64}],
)  # fmt: skip
def test_each_change_takes_another_kernel(jit, change):
    for _ in range(3):
        start()
    usual = Launcher.launches[-1][0]
    for _ in range(4):
        start(**change)
    changed = {call[0] for call in Launcher.launches[3:]}
    assert len(changed) == 1 and usual not in changed
    start()
    assert Launcher.launches[-1][0] == usual


def test_numbers_that_change_nothing_share_a_kernel_and_arrive(jit):
    for number in (2, 3, 5, 2, 3, 5):
        start(number=number)
    assert len({call[0] for call in Launcher.launches}) == 1
    assert [call[3][0].number for call in Launcher.launches] == [2, 3, 5, 2, 3, 5]


def test_other_tensors_are_passed_on(jit):
    for _ in range(3):
        start()
    other = torch.zeros(8)
    start(pointer=other)
    assert Launcher.launches[-1][3][0].pointer is other
    assert jit.through_jit == 2


def test_numbers_given_by_name_are_those_of_the_call(jit):
    for number in (3, 3, 5, 5):
        launch.start(last_is_a_number, (1,), (Pair(None, None),), CPU, 4, number=number)
    assert [call[3][-1] for call in Launcher.launches] == [3, 3, 5, 5]
    assert jit.through_jit == 2


def test_each_device_has_its_own_plan(jit):
    for _ in range(3):
        start()
    jit.device = 1
    start()
    assert jit.through_jit == 3
    assert Launcher.launches[-1][0] != Launcher.launches[-2][0]


def test_another_driver_has_no_plans(jit, monkeypatch):
    for _ in range(3):
        start()
    other = SimpleNamespace(**vars(jit))
    monkeypatch.setattr(triton.runtime.driver, "_active", other)
    start()
    assert jit.through_jit == 3


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook", "debug", "other run", "pre-run hook"])
def test_hooks_and_debugging_go_through_the_jit(jit, monkeypatch, name):
    for _ in range(3):
        start()
    runtime = triton.knobs.runtime
    if name == "debug":
        monkeypatch.setattr(runtime, "debug", True)
    elif name == "other run":
        run = JITFunction.run
        monkeypatch.setattr(JITFunction, "run", lambda *args, **keywords: run(*args, **keywords))
    elif name == "pre-run hook":
        monkeypatch.setattr(any_kernel, "pre_run_hooks", [lambda *args, **keywords: None])
    else:
        monkeypatch.setattr(runtime, name, lambda metadata: None)
    before = jit.through_jit
    start()
    start()
    assert jit.through_jit == before + 2


@pytest.mark.parametrize("pointer", [torch.zeros(2).numpy(), "tensor subclass", 1j])
def test_unknown_arguments_have_no_key(pointer):
    if isinstance(pointer, str):
        pointer = torch.zeros(2).as_subclass(type("Wrapped", (torch.Tensor,), {}))
    assert plans.key_of(any_kernel, (Pair(pointer, 2), None, CONSTANTS[0]), {}, 0, 4, 1) is None


def test_unknown_launchers_go_through_the_jit(jit, monkeypatch):
    monkeypatch.setattr(Compiled, "launcher", OtherLauncher)
    monkeypatch.setattr(JITFunction, "__getitem__", lambda self, grid: lambda *a, **k: Compiled(None))
    for _ in range(4):
        start()
    assert all(not layout.plans for layout in plans._layouts.values())


def test_plans_are_bounded(jit, monkeypatch):
    monkeypatch.setattr(plans, "_MOST", 8)
    for number in range(100, 140):
        start(number=number)
    assert 0 < sum(len(layout.plans) for layout in plans._layouts.values()) <= 8
    assert [call[3][0].number for call in Launcher.launches] == [*range(100, 140)]


def test_an_empty_grid_launches_nothing(jit):
    launch.start(any_kernel, (0, 4), (None, None, None), CPU, 4, FLAG=False, SIZE=1)
    assert not Launcher.launches


def test_the_launchers_of_this_triton_are_known():
    from triton.backends.amd.driver import HIPLauncher
    from triton.backends.nvidia.driver import CudaLauncher

    for launcher in (CudaLauncher, HIPLauncher):
        compiled = SimpleNamespace(_run=launcher.__new__(launcher), module=1, function=2, packed_metadata=3)
        assert plans._launch_of(compiled) is not None


# ---- a driver that isn't there


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_driver_gets_the_same_from_a_plan_and_from_the_jit(tmp_path):
    """Real kernels, Triton's real launcher and a libcuda.so.1 that notes grid, block and parameters of a launch."""
    library = tmp_path / "libcuda.so.1"
    source = ROOT / "bench" / "stand_in" / "libcuda.c"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True, capture_output=True
    )
    (tmp_path / "libcuda.so").symlink_to(library)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(tmp_path),
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "cases")]),
    }
    result = subprocess.run(
        [sys.executable, "tests/cases/triton_plans.py"], env=environment, cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert {"row_kernel", "label_kernel"} <= set(found["kernels"])
    assert found["through_plans"] >= len(found["kernels"])
    assert found["different"] == []


# ---- tiles that don't fit


def too_large(limit, number="shared memory"):
    """A kernel's launch that takes as much shared memory as its tile has values."""

    def kernel_call(*arguments, BLOCK, ROWS, **options):
        required = BLOCK * ROWS * options["num_stages"]
        if required > limit:
            raise OutOfResources(required, limit, number)

    class Kernel:
        __name__ = "kernel"

        def __getitem__(self, grid):
            return kernel_call

    return Kernel()


def operation(kernel, used, shape_class="1024 columns", dtype=torch.float32):
    @tiles.fitted
    def call():
        tile = tiles.tile_of(launch.Tile, CPU, "softmax_ce", dtype, shape_class)
        used.append(tile)
        launch.start(kernel, (1,), (), CPU, tile.warps, tile.stages, ROWS=tile.rows, BLOCK=tile.block)
        return tile

    return call


def test_a_smaller_tile_is_used_and_kept_and_the_warning_comes_once():
    used = []
    call = operation(too_large(512), used)
    with pytest.warns(
        RuntimeWarning, match=r"takes 2048 of shared memory in Tile.*'cpu' has 512; .*bench.tune softmax_ce"
    ):
        assert call() == launch.Tile(1, 512, 8, 1)
    assert used[-1] == call()
    assert [tile[:2] for tile in used] == [(2, 1024), (1, 1024), (1, 512), (1, 512)]
    # Other types, and other shape classes, keep theirs.
    assert operation(too_large(2**20), used, dtype=torch.bfloat16)() == launch.Tile(2, 1024, 8, 1)
    assert operation(too_large(2**20), used, "loop")() == launch.Tile(1, 4096, 16, 1)


def test_what_fits_in_no_tile_is_an_error():
    with pytest.warns(RuntimeWarning, match="smaller tiles"), pytest.raises(OutOfResources, match="Hardware limit: 3"):
        operation(too_large(3), [])()


def test_a_tile_that_was_asked_for_is_not_replaced():
    with launch.forced(launch.Tile(2, 1024, 4)), pytest.raises(OutOfResources):
        call = operation(too_large(512), [])
        tile = launch.row_tile(1000, torch.float32, True, 8, False, False, CPU)
        launch.start(too_large(512), (1,), (), CPU, tile.warps, 1, ROWS=tile.rows, BLOCK=tile.block)
        call()
    assert not tiles._smaller


def test_the_tile_of_the_kernel_that_failed_is_the_one_replaced():
    """Two tiles were asked for before; the sizes among the constants of the launch tell which it was."""
    first = tiles.tile_of(launch.Tile, CPU, "softmax_ce", torch.float32, "loop")
    tiles.tile_of(launch.Tile, CPU, "softmax_ce", torch.float32, "columns")
    error = OutOfResources(2, 1, "shared memory")
    spec = Constants(None, tl.constexpr(first.rows), tl.constexpr(first.block))
    tiles.name_tile(error, (spec, 3), {}, first.warps)
    assert error.entry == (CPU, "softmax_ce", torch.float32, "loop")
    unknown = OutOfResources(2, 1, "shared memory")
    tiles.name_tile(unknown, (), {"ROWS": 7}, first.warps)
    assert not hasattr(unknown, "entry")


@pytest.mark.parametrize("stem", tuning.DEVICES[tuning.DEFAULT]["tiles"])
def test_every_tile_has_a_way_down(stem):
    kinds = {"softmax_ce": launch.Tile, "class_stats": launch.FeatureTile}
    for types in tuning.DEVICES[tuning.DEFAULT]["tiles"][stem].values():
        for entry in types.values():
            if len(entry) > 1:
                chain = [kinds.get(stem, launch.ProductTile)(*entry)]
                while (less := tiles.smaller(chain[-1])) is not None:
                    chain.append(less)
                    assert len(chain) < 40
                sides = [
                    size for tile in chain for name, size in tile._asdict().items() if name in ("block", "columns")
                ]
                assert min(sides) >= 16 and chain[-1].stages == 1
                squares = {tile.rows == tile.columns for tile in chain if isinstance(tile, launch.ProductTile)}
                assert True not in squares or chain[0].rows != chain[0].columns or squares == {True}


def test_operations_of_this_backend_are_fitted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    fusedloss.backends._kernels.clear()
    fusedloss.backends._reasons.clear()
    try:
        with fusedloss.backend("triton"):
            function = fusedloss.backends.kernel("class_stats", "row_magnitudes", "cpu")
        from fusedloss.backends.triton import class_stats

        assert function is not class_stats.row_magnitudes
        assert function.__wrapped__ is class_stats.row_magnitudes
    finally:
        fusedloss.backends._kernels.clear()
        fusedloss.backends._reasons.clear()


# ---- ROCm, and capture


def test_rocm_gets_no_register_limit_and_no_tf32(monkeypatch):
    constants = {"maxnreg": 64, "BLOCK": 16}
    assert launch.compile_options(32, 2, constants) == {
        "num_warps": 32, "num_stages": 2, "enable_fp_fusion": True, "maxnreg": 64, "BLOCK": 16,
    }  # fmt: skip
    assert launch.precision(torch.float32) == "tf32x3"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert launch.compile_options(32, 2, constants) == {
        "num_warps": 16, "num_stages": 2, "enable_fp_fusion": True, "BLOCK": 16,
    }  # fmt: skip
    assert launch.precision(torch.float32) == launch.precision(torch.float64) == "ieee"


def test_rocm_devices_have_keys_of_their_own(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName="gfx942:sramecc+")
    )
    tuning.device_key.cache_clear()
    assert tuning.device_key(GPU) == "gfx942"
    tuning.device_key.cache_clear()


class Driver:
    """In the place of the driver's function: exchanges a thread's capture mode."""

    def __init__(self, fails=False):
        self.mode, self.seen, self.fails = 0, [], fails

    def __call__(self, pointer):
        if self.fails:
            return 1
        mode = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))
        self.mode, mode[0] = mode[0], self.mode
        self.seen.append(self.mode)
        return 0


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    exchange = Driver()
    monkeypatch.setattr(capture, "_exchange", lambda: exchange)
    return exchange


def test_kernels_are_loaded_in_a_relaxed_mode_during_a_capture(capturing):
    with capture.loading(any_kernel, GPU):
        assert capturing.mode == 2
    assert capturing.mode == 0 and capturing.seen == [2, 0]


def test_a_load_that_fails_during_a_capture_says_what_to_do(capturing):
    message = r"any_kernel must have been launched once before.*got its first launch inside"
    with pytest.raises(RuntimeError, match=message), capture.loading(any_kernel, GPU):
        raise RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")
    assert capturing.mode == 0
    with pytest.raises(OutOfResources), capture.loading(any_kernel, GPU):
        raise OutOfResources(2, 1, "shared memory")


@pytest.mark.parametrize("exchange", [None, Driver(fails=True)])
def test_without_the_drivers_function_the_mode_stays(capturing, monkeypatch, exchange):
    monkeypatch.setattr(capture, "_exchange", lambda: exchange)
    with capture.loading(any_kernel, GPU):
        pass
    assert capturing.seen == []


def test_outside_of_a_capture_nothing_is_exchanged(capturing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(RuntimeError, match=r"^as it is$"), capture.loading(any_kernel, GPU):
        raise RuntimeError("as it is")
    assert capturing.seen == []


# ---- on a GPU


def on_gpu(code):
    """Runs in a process of its own, where no kernel is loaded."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.gpu
def test_a_first_launch_inside_a_capture_works_or_says_what_to_do():
    result = on_gpu(
        "import torch, fusedloss\n"
        "x = torch.randn(40, 77, device='cuda', requires_grad=True)\n"
        "y = torch.randint(77, (40,), device='cuda')\n"
        "truth = torch.nn.functional.cross_entropy(x, y)\n"
        "graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()\n"
        "try:\n"
        "    with torch.cuda.graph(graph, stream=side):\n"
        "        loss = fusedloss.cross_entropy(x, y)\n"
        "except RuntimeError as error:\n"
        "    print('refused:', error)\n"
        "else:\n"
        "    graph.replay()\n"
        "    torch.testing.assert_close(loss, truth)\n"
        "    print('captured')\n"
    )
    assert "captured" in result.stdout or "must have been launched once" in result.stdout, result.stdout + result.stderr


@pytest.mark.gpu
def test_a_tile_that_is_too_large_for_the_gpu_is_replaced():
    result = on_gpu(
        "import torch, fusedloss\n"
        "from fusedloss.backends.triton import tuning\n"
        "for table in tuning.DEVICES.values():\n"
        "    for name in table['tiles'].get('supcon', {}).get('float32', {}):\n"
        "        if name.startswith('sums'):\n"
        "            table['tiles']['supcon']['float32'][name] = [128, 128, 64, 64, 8, 6]\n"
        "x = torch.nn.functional.normalize(torch.randn(300, 128, device='cuda'))\n"
        "y = torch.randint(9, (300,), device='cuda')\n"
        "loss = fusedloss.supcon(x, y, temperature=0.1)\n"
        "with fusedloss.backend('reference'):\n"
        "    truth = fusedloss.supcon(x.double(), y, temperature=0.1)\n"
        "torch.testing.assert_close(loss.double(), truth, rtol=1e-4, atol=1e-5)\n"
    )
    assert result.returncode == 0, result.stderr
    assert "smaller tiles are used" in result.stderr


@pytest.mark.gpu
def test_plans_launch_on_the_stream_and_device_of_the_call():
    x, y = torch.randn(64, 100, device="cuda"), torch.randint(100, (64,), device="cuda")
    expected = fusedloss.cross_entropy(x, y)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = [fusedloss.cross_entropy(x, y) for _ in range(4)]
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(each, expected) for each in found)
    assert any(layout.plans for layout in plans._layouts.values())
