"""Cases of the Triton backend's contrastive kernels: the battery's, in small tiles and in their own, and mutants."""

import contextlib
import dataclasses
import math

import supcon_battery
import torch
import triton
import triton.language as tl
from supcon_oracle import wrong_with

import fusedloss
from fusedloss import backends

# Rows, columns, features of a step and of a block: loops of several ragged steps. Triton 3.6 takes none below 16.
STEPS, OBLONG, OWN = (16, 16, 16, 16), (32, 16, 16, 32), None
NAMES = (
    "labels", "views", "first view", "no labels", "mask", "mask, views", "each anchor", "T of 0.005", "not normalised",
    "ignored, everything", "prototypes, ignored", "prototype bias", "absent prototypes", "balanced, small T",
    "bank without labels", "focal, no negatives", "everything", "everything, small T", "one feature", "one class",
    "labels all distinct",
    "one row", "a zero row", "duplicates, T = 0.005", "antipodes, T = 0.005", "long rows, not normalised",
    "labels, float64", "everything, float64", "labels, bfloat16", "mask, views, float16",
)  # fmt: skip


@contextlib.contextmanager
def resolve_backend(device):
    """The backend takes tensors of `device`, though they be of a CPU and kernels only compiled."""
    known = dict(backends._reasons)
    backends._reasons["triton", device] = None
    try:
        with fusedloss.backend("triton"):
            yield
    finally:
        backends._reasons.clear()
        backends._reasons.update(known)


def contrast(name, tile, dtype=None):
    """One case of the battery, forward and backward; rows of `dtype` where it is given."""
    return checked(lambda: in_dtype(widened(dict(supcon_battery.cases())[name]), dtype), tile)


def in_dtype(case, dtype):
    rows = {name: getattr(case, name) for name in ("features", "prototypes", "contrast")}
    return dataclasses.replace(
        case, **{name: given if given is None or dtype is None else given.to(dtype) for name, given in rows.items()}
    )


def checked(make, tile):
    def run(device):
        from fusedloss.backends.triton import launch

        case = make()
        # Tiles of several widths need rows of length 1.
        sides = tile if tile is None or case.normalize else (16, 16, *tile[2:])
        forced = None if sides is None else launch.ProductTile(*sides, 4)
        with resolve_backend(device), launch.forced(products=forced):
            return wrong_with(case, lambda given: on(device, given), narrow=True)

    return run


def widened(case):
    """The case with twice its features, so that narrow ones take several steps; equal and opposite rows stay so."""

    def wide(rows):
        return None if rows is None else torch.cat([rows, 0.5 * rows.flip(-1)], -1)

    columns = {name: wide(getattr(case, name)) for name in ("features", "prototypes", "contrast")}
    return dataclasses.replace(case, **columns)


def on(device, case):
    """The loss of a case whose tensors go to `device` and come back, gradients included."""
    moved = {
        name: value.to(device) if hasattr(value, "to") else value
        for name, value in supcon_battery.shallow(case).items()
    }
    return supcon_battery.whole_panels(supcon_battery.Case(**moved)).cpu()


def reruns(device):
    """Two runs give the same bits."""
    case = supcon_battery.make(50, 20, views=2)
    with resolve_backend(device):
        found = []
        for _ in range(2):
            x = case.features.to(device).requires_grad_()
            loss = fusedloss.supcon(x, case.labels.to(device))
            loss.backward()
            found.append((loss.detach(), x.grad))
    same = all(bool((a == b).all()) for a, b in zip(*found, strict=True))
    return [] if same else ["two runs differ"]


CASES = {f"contrast {name} {tile}": contrast(name, tile) for name in NAMES for tile in (STEPS,)}
CASES |= {f"contrast {name} {tile}": contrast(name, tile) for name in NAMES[:6] for tile in (OBLONG, OWN)}
# Of 16 bits, prototypes and contrasts too: in steps, with all features at a time, and in tiles of their own.
HALF_STEPS = (STEPS, (32, 16, 32, 32), OWN)
HALF_NAMES = (
    "labels", "first view", "mask, views", "mask, small T", "each anchor", "T of 0.005", "T of 0.02", "sum",
    "not normalised", "ignored, everything", "absent prototypes", "balanced, small T", "bank, small T", "everything",
    "focal, no negatives", "one feature", "one class", "labels all distinct", "one row", "a zero row",
    "duplicates, T = 0.005", "antipodes, T = 0.1", "orthonormal, T = 0.1",
)  # fmt: skip
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
CASES |= {
    f"contrast {name} {tile} {word}": contrast(name, tile, dtype)
    for number, name in enumerate(HALF_NAMES)
    for tile in HALF_STEPS[:: 1 if number < 4 else 2]
    for word, dtype in list(_DTYPES.items())[number % 2 : 2 if number < 4 else 1 + number % 2]
}


def large(dtype, **options):
    """300 rows of 200 features: several tiles of each kernel's own size, and steps."""
    return checked(lambda: supcon_battery.make(300, 200, classes=20, dtype=dtype, **options), OWN)


def lengths(dtype, factors):
    """Rows of very different lengths, whose directions alone count."""

    def make():
        case = supcon_battery.make(40, 24, dtype=torch.float32)
        each = torch.tensor(factors)[torch.arange(40) % len(factors)]
        return dataclasses.replace(case, features=(case.features * each.unsqueeze(1)).to(dtype))

    return checked(make, OWN)


CASES |= {f"contrast 300 x 200 {word}": large(dtype) for word, dtype in (("float32", torch.float32), *_DTYPES.items())}
CASES["contrast 300 x 200 bfloat16, T = 0.01"] = large(torch.bfloat16, temperature=0.01, contrast_mode="one")
CASES["contrast lengths bfloat16"] = lengths(torch.bfloat16, (1e-30, 1.0, 1e30))
CASES["contrast lengths float16"] = lengths(torch.float16, (1e-4, 1.0, 1e4))


def not_finite(device):
    """A row that is not finite makes every anchor's loss NaN, and nothing when it is ignored."""
    wrong = []
    for dtype in (torch.float32, *_DTYPES.values()):
        for bad in (math.nan, math.inf, -math.inf):
            rows, labels = (
                torch.randn(40, 20, generator=torch.Generator().manual_seed(2)).to(dtype),
                torch.arange(40) % 4,
            )
            rows[7, 3] = bad
            x = rows.to(device).requires_grad_()
            ignored = labels.masked_fill(torch.arange(40) == 7, -100).to(device)
            with resolve_backend(device):
                loss = fusedloss.supcon(x, labels.to(device), reduction="none")
                kept = fusedloss.supcon(x, ignored)
                kept.backward()
            if not (loss.isnan().all() and kept.isfinite() and x.grad.isfinite().all() and (x.grad[7] == 0).all()):
                wrong.append(f"{dtype} {bad}: {loss.tolist()}, ignored {kept.item()}")
    return wrong


def empty(device):
    """No rows, no features, one row."""
    wrong = []
    for shape, expected in (((0, 5), 0.0), ((3, 0), math.log(2)), ((0, 0), 0.0), ((1, 7), 0.0)):
        x = torch.ones(shape, dtype=torch.bfloat16, device=device, requires_grad=True)
        with resolve_backend(device):
            loss = fusedloss.supcon(x, torch.zeros(shape[0], dtype=torch.int64, device=device))
            loss.backward()
        if abs(float(loss) - expected) > 1e-6 or x.grad is None or x.grad.shape != shape or bool(x.grad.any()):
            wrong.append(f"{shape}: {float(loss)}, not {expected}; {x.grad}")
    return wrong


CASES["contrast of rows that are not finite"], CASES["contrast of nothing"] = not_finite, empty
CASES["contrast several panels"] = contrast("several panels", OWN)
CASES["contrast twice"] = reruns


@triton.jit
def share_of(column):
    return column.share * 1.001


@triton.jit
def weight_of(column, positive):
    return tl.broadcast_to(column.negative[None, :], positive.shape)


@triton.jit
def same_row(row, column):
    # The row itself counts, and its neighbour doesn't.
    return (row.lane + (row.start - column.start) + 1)[:, None] == column.lane[None, :]


@triton.jit
def similarities(product, row, column, temperature, rows, MASKED: tl.constexpr, spec):
    # Lengths of the columns are forgotten.
    z = product * (row.inverse * (1.4426950408889634 / temperature))[:, None]
    if MASKED:
        z = z + column.bias[None, :]
    return z


def mutants(device):
    """Wrong kernels must fail the comparison."""
    from fusedloss.backends.triton import supcon_kernels

    checks = {
        share_of: contrast("prototype bias", STEPS),
        weight_of: contrast("balanced, small T", STEPS),
        same_row: contrast("labels", STEPS),
        similarities: contrast("labels", STEPS, torch.bfloat16),
    }
    wrong = []
    for function, check in checks.items():
        name = function.__name__
        right = getattr(supcon_kernels, name)
        setattr(supcon_kernels, name, function)
        try:
            if not check(device):
                wrong.append(f"a wrong {name} passed")
        finally:
            setattr(supcon_kernels, name, right)
    return wrong
