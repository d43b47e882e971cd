"""Random combinations of shape, data type, layout and option, judged against float64; run as a script for one build.

    python tests/cases/property_cases.py --family own --cases 2000 --backend cpp

prints the SIMD level, the share of the cases that uses each option and the rarest pairs; it fails where a case does, or
where 2000 cases or more leave a pair of options with fewer than 20. FUSEDLOSS_SIMD picks the level.

    for seed in 1 2 3 4; do python tests/cases/property_cases.py --cases 500 --seed $seed --add-to counts.pickle; done

makes as many in pieces of other cases each, whose counts add up in the file: shares and pairs are those of the sum.
"""

import argparse
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "oracles")]

from oracle import Case, check
from property_slopes import check_direction
from property_tally import Tally
from softmax_battery import fused

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LAYOUTS = ("contiguous", "unaligned", "transposed", "sliced", "expanded")
# The kernels walk a row in blocks of at most this many classes.
BLOCK = 4096


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


class Draft:
    """A case in the making: its random numbers, and one value for every dimension of choice."""

    def __init__(self, draw):
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        self.used: dict[str, str] = {}

    def choose(self, dimension, *values):
        """One of the values, each as often as it is listed; "" and "no ..." are what is not an option."""
        value = draw_from(self.draw, values)
        self.used[dimension] = value
        return value

    def option(self, name):
        return self.choose(name, name, "") == name

    def uniform(self, low, high, *size):
        return low + (high - low) * torch.rand(size, generator=self.generator, dtype=self.computing)

    def logits_and_target(self, soft, cosines=False):
        """A case with logits in some shape, type and layout, and labels or probabilities."""
        dtype = self.choose("dtype", *DTYPES)
        self.dtype, self.computing = DTYPES[dtype], torch.float64 if dtype == "float64" else torch.float32
        sizes = ("small", "hundreds", "more than one block")
        num_classes = self.draw(
            {
                "small": st.integers(1, 40),
                "hundreds": st.integers(41, 600),
                "more than one block": st.sampled_from([BLOCK + 1, BLOCK + 17, 5000, 2 * BLOCK, 2 * BLOCK + 7]),
            }[self.choose("classes", *sizes)]
        )
        inner = {"rows": (), "a block behind the classes": self.draw(st.sampled_from([(1,), (3,), (2, 2)]))}[
            self.choose("dimensions", "rows", "rows", "a block behind the classes")
        ]
        rows = self.draw(st.integers(1, 3 if num_classes > BLOCK else 12))
        self.rows, self.shape, self.num_classes = (rows, *inner), (rows, num_classes, *inner), num_classes
        if cosines:
            logits = self.uniform(-0.99, 0.99, *self.shape)
        else:
            spread = self.draw(st.sampled_from([0.1, 1.0, 5.0, 20.0]))
            logits = spread * torch.randn(self.shape, generator=self.generator)
        logits = laid_out(logits.to(self.dtype), self.choose("layout", *LAYOUTS))
        if soft:
            target = torch.rand(self.shape, generator=self.generator)
            target = target * (torch.rand(self.shape, generator=self.generator) > 0.3)
            target = laid_out(target.to(self.dtype), self.draw(st.sampled_from(LAYOUTS)))
        else:
            target = torch.randint(num_classes, self.rows, generator=self.generator)
        reduction = self.choose("reduction", "reduction mean", "reduction sum", "reduction none")
        return Case(logits, target, reduction=reduction.removeprefix("reduction "))

    def ignored(self, case):
        """Ignores some rows, by a label outside the classes or by one of them; now and then every row."""
        index = self.draw(st.sampled_from([-100, 0, self.num_classes - 1]))
        share = self.draw(st.sampled_from([0.4, 0.4, 0.4, 1.1]))
        drawn = torch.rand(self.rows, generator=self.generator)
        return replace(case, ignore_index=index, target=torch.where(drawn < share, index, case.target))

    def upstream(self, case):
        case.upstream = torch.randn(self.rows, generator=self.generator) if case.reduction == "none" else -0.3


def draw_from(draw, values):
    return values[draw(st.integers(0, len(values) - 1))]


@st.composite
def torch_cases(draw):
    """(case, what it uses) with torch's own options: the truth is ``F.cross_entropy``."""
    draft = Draft(draw)
    soft = draft.choose("target", "labels", "labels", "probabilities") == "probabilities"
    case = draft.logits_and_target(soft)
    if not soft:
        kind = draft.choose("labels", "int64", "int32", "uint8", "uint8", "uint8")
        if draft.option("ignored rows"):
            case = draft.ignored(case)
        if kind == "uint8" and (draft.num_classes > 256 or bool((case.target < 0).any())):
            kind = draft.used["labels"] = "int64"
        case.target = case.target.to(getattr(torch, kind))
    if draft.option("class weight"):
        case.weight = draft.uniform(0.1, 2.0, draft.num_classes)
        if draft.option("a class of weight zero"):
            case.weight[0] = 0
    smoothing = draft.choose("smoothing", "no smoothing", "label smoothing", "label smoothing")
    if smoothing == "label smoothing":
        case.label_smoothing = draw(st.sampled_from([0.05, 0.3, 1.0]))
    if draft.option("upstream"):
        draft.upstream(case)
    if draft.choose("gradient", "gradient", "gradient", "") != "gradient":
        case.learned = ()
    return case, draft.used


@st.composite
def own_cases(draw):
    """(case, what it uses) with every option that torch lacks: the truth is the formula in float64."""
    draft = Draft(draw)
    margin = draft.choose("margin", "", "", "additive margin", "angular margin", "combined margin")
    soft = margin == "" and draft.choose("target", "labels", "probabilities") == "probabilities"
    draft.used["target"] = "probabilities" if soft else "labels"
    case = draft.logits_and_target(soft, cosines=margin in ("angular margin", "combined margin"))
    if not soft and draft.option("ignored rows"):
        case = draft.ignored(case)
    if draft.option("class weight"):
        case.weight = draft.uniform(0.1, 2.0, draft.num_classes)
    smoothing = draft.choose("smoothing", "no smoothing", "label smoothing", "smoothing per row")
    if smoothing == "label smoothing":
        case.label_smoothing = draw(st.sampled_from([0.05, 0.3, 1.0]))
    elif smoothing == "smoothing per row":
        case.label_smoothing = draft.uniform(0.0, 1.0, *(draft.rows if draw(st.booleans()) else draft.rows[:1]))
    if draft.option("sample weight"):
        case.sample_weight = draft.uniform(0.1, 2.0, *draft.rows)
    if draft.option("z-loss"):
        case.z_loss = draw(st.sampled_from([1e-3, 0.1]))
    if draft.option("focal"):
        case.focal_gamma = draw(st.sampled_from([0.5, 1.0, 2.0, 3.5]))
    if draft.option("poly"):
        case.poly_epsilon = draw(st.sampled_from([-1.0, 0.5, 2.0]))
    penalty(draft, case)
    case.terms = terms(draft, margin)
    if draft.option("upstream"):
        draft.upstream(case)
    case.learned = tuple(name for name in sorted(case.tensors()) if draw(st.integers(0, 2)) > 0)
    for name in case.learned:
        draft.used[f"learned {name}"] = "learned term" if name.startswith("term") else f"learned {name}"
    return case, draft.used


def penalty(draft, case):
    """A margin penalty, added or mixed, over the classes' mean or sum, of one strength or one per row."""
    kind = draft.choose("penalty", "", "penalty added", "penalty mixed")
    if not kind:
        return
    over = draft.choose("penalty over", "penalty over mean", "penalty over sum").removeprefix("penalty over ")
    case.penalty = (float(draft.uniform(0.1, 3.0)), over, kind == "penalty mixed")
    case.penalty_strength = float(draft.uniform(0.0, 1.0))
    if draft.choose("strength per row", "strength per row", "strength per row", "") == "strength per row":
        case.penalty_strength = draft.uniform(0.0, 1.0, *(draft.rows if draft.draw(st.booleans()) else draft.rows[:1]))


def terms(draft, margin):
    """Terms in any order; those that need cosines come first, or after a scale that keeps them cosines."""
    found = []
    if margin and margin != "additive margin":
        if draft.option("scale before the margin"):
            found.append(("scale", draft.uniform(0.5, 1.0)))
        found.append(cosine_margin(draft, margin))
    further = []
    for name in ("temperature", "scale", "prior", "one temperature", "soft cap"):
        if draft.choose(name, name, "", "") != name:
            continue
        if name == "prior":
            factor = draft.draw(st.sampled_from([0.5, 1.0]))
            further.append((name, draft.uniform(-4.0, 0.0, draft.num_classes), factor))
        elif name == "soft cap":
            further.append((name, float(draft.uniform(2.0, 30.0))))
        else:
            width = () if name.startswith("one") else (draft.num_classes,)
            further.append((name.removeprefix("one "), draft.uniform(0.5, 2.0, *width)))
    if margin == "additive margin":
        further.append(("additive", margin_value(draft, 0.0, 1.0)))
    order = torch.randperm(len(further), generator=draft.generator).tolist()
    return (*found, *(further[i] for i in order))


def cosine_margin(draft, margin):
    gradient = draft.choose("slope", "slope exact", "slope exact", "slope straight_through").removeprefix("slope ")
    fallback = draft.choose("fallback", "fallback monotone", "fallback easy", "fallback none").removeprefix("fallback ")
    if margin == "angular margin":
        return "angular", margin_value(draft, 0.1, 1.0), fallback, gradient
    m1 = draft.draw(st.sampled_from([1.0, 0.9, 1.35]))
    return "combined", margin_value(draft, 0.1, 0.5), m1, 0.2, fallback, gradient


def margin_value(draft, low, high):
    kind = draft.choose("margins", "one margin", "margin per class", "margin per row")
    if kind == "one margin":
        return float(draft.uniform(low, high))
    return draft.uniform(low, high, *((draft.num_classes,) if kind == "margin per class" else (draft.rows[0], 1)))


FAMILIES = {"torch": torch_cases, "own": own_cases}


def run(family, count, new=False, chosen=None, roundings=1):
    """Judges `count` random cases of a family; the tally of what they used.

    New ones each time where `new`, those of the seed `chosen` where given, else always the same. 16-bit gradients may
    be rounded `roundings` times.
    """
    tally = Tally()

    @settings(
        max_examples=count,
        derandomize=not new and chosen is None,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(FAMILIES[family]())
    def judged(drawn):
        case, used = drawn
        found = check(case, fused, roundings=roundings)
        if family == "own":
            told = check_direction(case, found)
            tally.finite_differences += told is True
            tally.at_a_kink += told is None
        tally.add(used)

    (judged if chosen is None else seed(chosen)(judged))()
    return tally


def added_up(tally, file, name):
    """The tally with those of the same name that earlier pieces left in the file, which then holds the sum."""
    tallies = pickle.loads(file.read_bytes()) if file.exists() else {}
    if name in tallies:
        tally.take_in(tallies[name])
    tallies[name] = tally
    file.write_bytes(pickle.dumps(tallies))
    return tally


def _main():
    import fusedloss
    from fusedloss.backends import cpp

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, nargs="+", default=list(FAMILIES))
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--backend", default="cpp")
    parser.add_argument("--new", action="store_true", help="new cases each time")
    parser.add_argument("--seed", type=int, help="other cases for each number")
    parser.add_argument("--add-to", type=Path, metavar="FILE", help="adds the counts to those in the file")
    arguments = parser.parse_args()
    level = cpp.extension.level() if arguments.backend == "cpp" else "none"
    with fusedloss.backend(arguments.backend):
        for family in arguments.family:
            name = f"{arguments.backend}, level {level}, {family}"
            # Triton's interpreter cuts off what a GPU rounds.
            roundings = 2 if arguments.backend == "triton" else 1
            tally = run(family, arguments.cases, arguments.new, arguments.seed, roundings)
            if arguments.add_to:
                tally = added_up(tally, arguments.add_to, name)
            print(f"{name}: {tally.report()}")
            tally.check()


if __name__ == "__main__":
    _main()
