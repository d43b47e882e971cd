"""cross_entropy under random combinations of shape, data type, layout and option, against float64.

    FUSEDLOSS_PROPERTY_CASES=2000 pytest tests/test_properties.py -s

runs that many accepted cases, new ones each time, and prints how often each option came up.
"""

import collections
import os
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Case, check
from softmax_battery import fused

import fusedloss

WANTED = os.environ.get("FUSEDLOSS_PROPERTY_CASES")
COUNT = int(WANTED or 250)
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "unaligned")
NUM_CLASSES = st.one_of(st.integers(1, 40), st.integers(1, 300), st.sampled_from([511, 4095, 4096, 4097, 4113]))
TERMS = st.lists(st.sampled_from(["temperature", "scale", "prior", "one temperature", "one scale"]), max_size=3)

shares = collections.Counter()


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers (the same first row for all, when expanded) in another layout."""
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        wide = torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1)
        return wide[..., 0]
    if layout == "expanded" and len(tensor):
        return tensor[:1].expand(tensor.shape)
    if layout == "unaligned":
        flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        return flat[1:].view(tensor.shape).copy_(tensor)
    return tensor


@st.composite
def random_cases(draw):
    """(case, backend, names of what it uses)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    name = draw(st.sampled_from(sorted(DTYPES)))
    dtype, computing = DTYPES[name], torch.float64 if name == "float64" else torch.float32
    num_classes = draw(NUM_CLASSES)
    rows = draw(st.integers(1, 6 if num_classes > 300 else 20))
    inner = draw(st.sampled_from([(), (), (), (3,), (2, 2)]))
    shape, row_shape = (rows, num_classes, *inner), (rows, *inner)

    def uniform(low, high, *size):
        return low + (high - low) * torch.rand(size, generator=generator, dtype=computing)

    spread = draw(st.sampled_from([0.1, 1.0, 5.0, 20.0]))
    layout = draw(st.sampled_from(LAYOUTS))
    logits = laid_out((spread * torch.randn(shape, generator=generator)).to(dtype), layout)
    soft = draw(st.booleans())
    if soft:
        target = torch.rand(shape, generator=generator).to(dtype)
        target = target * (torch.rand(shape, generator=generator) > 0.3)
        target = laid_out(target, draw(st.sampled_from(LAYOUTS)))
    else:
        target = torch.randint(num_classes, row_shape, generator=generator)
        if draw(st.booleans()):
            target = target.to(torch.int32)
    case = Case(logits, target, reduction=draw(st.sampled_from(["mean", "sum", "none"])))
    used = {name, layout, case.reduction, "probabilities" if soft else "labels", f"{len(shape)} dimensions"}

    def option(what):
        if draw(st.booleans()):
            used.add(what)
            return True
        return False

    if option("class weight"):
        case.weight = uniform(0.1, 2.0, num_classes)
    smoothing = draw(st.sampled_from(["none", "number", "per row"]))
    if smoothing == "number":
        case.label_smoothing = draw(st.sampled_from([0.05, 0.3, 1.0]))
    elif smoothing == "per row":
        case.label_smoothing = uniform(0.0, 1.0, *(row_shape if draw(st.booleans()) else row_shape[:1]))
    used.add(f"smoothing {smoothing}")
    if option("sample weight"):
        case.sample_weight = uniform(0.1, 2.0, *row_shape)
    if option("z_loss"):
        case.z_loss = draw(st.sampled_from([1e-3, 0.1]))
    if not soft and option("focal"):
        case.focal_gamma = draw(st.sampled_from([0.5, 1.0, 2.0, 3.5]))
    if not soft and option("ignored rows"):
        case.ignore_index = draw(st.sampled_from([-100, 0, num_classes - 1]))
        case.target = torch.where(torch.rand(row_shape, generator=generator) < 0.4, case.ignore_index, case.target)
    terms = []
    for kind in draw(TERMS):
        if kind == "prior":
            terms.append((kind, uniform(-4.0, 0.0, num_classes), draw(st.sampled_from([0.5, 1.0]))))
        else:
            value = uniform(0.5, 2.0, *(() if kind.startswith("one") else (num_classes,)))
            terms.append((kind.removeprefix("one "), value))
        used.add(kind)
    case.terms = tuple(terms)
    if option("upstream"):
        case.upstream = torch.randn(row_shape, generator=generator) if case.reduction == "none" else -0.3
    case.learned = tuple(name for name in sorted(case.tensors()) if draw(st.booleans()))
    used |= {f"learned {'term' if name.startswith('term') else name}" for name in case.learned} or {"nothing learned"}
    backend = draw(st.sampled_from(["cpp", "cpp", "cpp", "reference"]))
    return case, backend, used | {backend}


@settings(max_examples=COUNT, derandomize=not WANTED, database=None)
@given(random_cases())
def test_random_combinations(drawn):
    case, backend, used = drawn
    with fusedloss.backend(backend):
        check(case, fused)
    shares.update(used)
    shares["cases"] += 1


def test_the_share_of_every_option():
    """Runs after the cases: none of the options may be missing from them."""
    assert shares["cases"] >= COUNT
    if WANTED:
        print(f"\n{shares['cases']} accepted cases")
        for name, count in sorted(shares.items()):
            print(f"  {name:24} {count / shares['cases']:6.1%}")
    assert {"focal", "z_loss", "class weight", "sample weight", "prior", *DTYPES, *LAYOUTS} <= set(shares)


@settings(max_examples=60)
@given(random_cases(), st.integers(0, 2**31))
def test_rows_do_not_see_each_other(drawn, seed):
    """Each row's loss is bitwise what it is alone."""
    case = replace(drawn[0], reduction="none", upstream=1.0, learned=())
    rows = len(case.input)
    row = seed % rows

    def only(value):
        one_per_row = isinstance(value, torch.Tensor) and value.dim() > 0
        return value[row : row + 1] if one_per_row else value

    alone = replace(
        case,
        input=case.input[row : row + 1],
        target=case.target[row : row + 1],
        label_smoothing=only(case.label_smoothing),
        sample_weight=only(case.sample_weight),
    )
    together = fused(case)[row : row + 1]
    torch.testing.assert_close(fused(alone), together, rtol=1e-5, atol=1e-5, equal_nan=True)
