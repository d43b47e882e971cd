"""Cases of the Triton backend's contrastive kernels: the battery's, in small tiles and in their own, and mutants."""

import contextlib
import dataclasses

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


def contrast(name, tile):
    """One case of the battery, forward and backward."""

    def run(device):
        from fusedloss.backends.triton import launch

        case = widened(dict(supcon_battery.cases())[name])
        # Tiles of several widths need rows of length 1.
        sides = tile if tile is None or case.normalize else (16, 16, *tile[2:])
        forced = None if sides is None else launch.ProductTile(*sides, 4)
        with resolve_backend(device), launch.forced(products=forced):
            return wrong_with(case, lambda given: on(device, given))

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
CASES["contrast several panels"] = contrast("several panels", OWN)
CASES["contrast twice"] = reruns


@triton.jit
def share_of(rows, right):
    return tl.load(rows.weights + 2 * rows.count + right, mask=right < rows.count, other=0.0) * 1.001


@triton.jit
def weight_of(rows, right, positive):
    inside = right < rows.count
    negative = tl.load(rows.weights + right, mask=inside, other=0.0)
    return tl.broadcast_to(negative[None, :], positive.shape)


@triton.jit
def contrasts(rows, left, right, IGNORED: tl.constexpr):
    # The row itself counts.
    counted = (left < rows.anchors)[:, None] & (right < rows.count)[None, :]
    code = tl.load(rows.codes + left, mask=left < rows.anchors, other=IGNORED)
    other = tl.load(rows.codes + right, mask=right < rows.count, other=IGNORED)
    return counted, counted & (code[:, None] == other[None, :])


def mutants(device):
    """Wrong kernels must fail the comparison."""
    from fusedloss.backends.triton import supcon

    checks = {
        share_of: contrast("prototype bias", STEPS),
        weight_of: contrast("balanced, small T", STEPS),
        contrasts: contrast("labels", STEPS),
    }
    wrong = []
    for function, check in checks.items():
        name = function.__name__
        right = getattr(supcon, name)
        setattr(supcon, name, function)
        try:
            if not check(device):
                wrong.append(f"a wrong {name} passed")
        finally:
            setattr(supcon, name, right)
    return wrong
