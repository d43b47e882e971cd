"""A compact set of softmax_ce cases that any build of the kernels must pass; run as a script for one build.

    python tests/cases/softmax_battery.py [--extension path/of/_C.so] [--gradcheck]

prints the SIMD level and one line per failure, and exits with 1 where there is one. FUSEDLOSS_SIMD picks the
level.
"""

import argparse
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "oracles")]

from oracle import Case, check

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fused_terms(case: Case) -> list:
    """The package's terms of a case."""
    import fusedloss

    kinds = {
        "temperature": fusedloss.ClassTemperature,
        "scale": fusedloss.Scale,
        "prior": fusedloss.Prior,
        "soft cap": fusedloss.SoftCap,
        "additive": fusedloss.AdditiveMargin,
        "angular": fusedloss.AngularMargin,
        "combined": lambda m2, m1, *rest: fusedloss.CombinedMargin(m1, m2, *rest),
    }
    return [kinds[name](*values) for name, *values in case.terms]


def fused(case: Case) -> torch.Tensor:
    """The package's loss of a case."""
    import fusedloss

    penalty = None
    if case.penalty is not None:
        margin, over, mix = case.penalty
        penalty = fusedloss.MarginPenalty(margin, case.penalty_strength, over, mix)
    return fusedloss.cross_entropy(
        case.input,
        case.target,
        case.weight,
        case.ignore_index,
        case.reduction,
        case.label_smoothing,
        terms=fused_terms(case),
        focal_gamma=case.focal_gamma,
        poly_epsilon=case.poly_epsilon,
        z_loss=case.z_loss,
        margin_penalty=penalty,
        sample_weight=case.sample_weight,
    )


def random_case(rows, num_classes, *inner, dtype=torch.float32, seed=0, spread=4.0, soft=False, ignored=0.2, **options):
    """Logits, and labels of which some are ignored (or probabilities), for further options of a Case."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, num_classes, *inner) if rows is not None else (num_classes,)
    logits = (spread * torch.randn(shape, generator=generator)).to(dtype)
    if soft:
        target = torch.rand(shape, generator=generator, dtype=torch.float64)
        target = (target / target.sum(min(1, len(shape) - 1), keepdim=True)).to(dtype)
    else:
        row_shape = (rows, *inner) if rows is not None else ()
        target = torch.randint(num_classes, row_shape, generator=generator)
        target = torch.where(torch.rand(row_shape, generator=generator) < ignored, -100, target)
        if target.numel():
            target.reshape(-1)[0] = (num_classes - 1) // 2
    return Case(logits, target, **options)


def everything(case: Case, seed=1, terms=True) -> Case:
    """The case with every option at once, all of its tensors learned."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if case.input.dtype == torch.float64 else torch.float32
    num_classes = case.input.shape[1]
    rows = case.input.shape[:1] + case.input.shape[2:]

    def between(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=dtype)

    soft = case.target.is_floating_point()
    return replace(
        case,
        weight=between(0.2, 2.0, num_classes),
        label_smoothing=between(0.0, 0.5, *rows),
        sample_weight=between(0.1, 3.0, *rows),
        focal_gamma=0.0 if soft else 2.0,
        poly_epsilon=0.0 if soft else 0.6,
        z_loss=0.01,
        terms=(
            ("temperature", between(0.5, 2.0, num_classes)),
            ("prior", between(-3.0, 0.0, num_classes), 0.7),
            ("scale", between(0.5, 1.5, num_classes)),
        )
        if terms
        else (),
        upstream=0.37,
        learned=("input", "label_smoothing", "sample_weight", "term0", "term1", "term2"),
    )


def cases():
    """(name, case): every data type, layout, block boundary and option, small."""
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for num_classes in (1, 2, 3, 7, 16, 17, 31, 33, 100):
            yield f"{name} K={num_classes}", random_case(5, num_classes, dtype=dtype, seed=num_classes)
            smooth = random_case(5, num_classes, dtype=dtype, seed=num_classes, label_smoothing=0.1)
            yield f"{name} K={num_classes} smooth", smooth
        yield (
            f"{name} none",
            random_case(9, 21, dtype=dtype, reduction="none", upstream=torch.linspace(-1, 1, 9)),
        )
        for reduction in ("mean", "sum", "none"):
            case = replace(random_case(9, 21, dtype=dtype), reduction=reduction)
            yield f"{name} {reduction} everything", replace(everything(case), reduction=reduction)
        yield f"{name} soft everything", everything(random_case(6, 37, dtype=dtype, soft=True))
        yield f"{name} classes in the middle", everything(random_case(3, 19, 5, dtype=dtype))
        transposed = random_case(37, 21, dtype=dtype)
        yield f"{name} transposed", replace(transposed, input=transposed.input.t().contiguous().t())
        sliced = random_case(6, 50, dtype=dtype)
        narrow = replace(sliced, input=sliced.input[:, 1::2], target=sliced.target.clamp(-100, 24))
        yield f"{name} every second class", narrow
        confident = random_case(8, 33, dtype=dtype, ignored=0.0)
        logits = confident.input.clone()
        logits[torch.arange(8), confident.target] += 14
        yield f"{name} confident", replace(confident, input=logits)
        yield f"{name} focal", random_case(8, 33, dtype=dtype, focal_gamma=0.5)
        yield f"{name} poly", random_case(8, 33, dtype=dtype, poly_epsilon=-1.5)
        yield f"{name} poly smooth", random_case(8, 333, dtype=dtype, poly_epsilon=2.0, label_smoothing=0.1)
        masked = random_case(6, 37, dtype=dtype, soft=True)
        for tensor, value in ((masked.input, -torch.inf), (masked.target, 0.0)):
            tensor[:, ::5] = value
        yield f"{name} masked classes without probability", masked
    for num_classes in (4095, 4096, 4097, 8192, 8209):
        yield f"chunk {num_classes}", random_case(2, num_classes, ignored=0.0)
        yield f"chunk {num_classes} everything", everything(random_case(2, num_classes, ignored=0.0))
    yield "rows of two threads", everything(random_case(300, 257))


def failures(gradcheck=False, eager=False):
    """Messages of the cases that fail; `eager` formulas are not asked for digits that only kernels keep."""
    for name, case in cases():
        try:
            check(case, fused)
        except Exception as error:
            yield f"{name}: {type(error).__name__}: {error}"
    for dtype in () if eager else (torch.float32, torch.float64):
        try:
            check_exponential(dtype)
        except Exception as error:
            yield f"exponential {dtype}: {type(error).__name__}: {error}"
    for dtype in () if eager else (torch.float32, torch.bfloat16, torch.float16):
        for reduction, label in (("sum", 3), ("none", 18)):
            try:
                check_confident_row(label, dtype, reduction)
            except Exception as error:
                yield f"confident row {dtype} {reduction}: {type(error).__name__}: {error}"
    if gradcheck:
        for name, case in gradient_cases():
            try:
                check_gradients(case)
            except Exception as error:
                yield f"gradcheck {name}: {type(error).__name__}: {error}"


def check_exponential(dtype):
    """The exponential alone: p = e / (1 + e) of rows (0, -x) in units of p's last place, over the normal range."""
    limits = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(20000, generator=generator, dtype=dtype) * (700.0 if dtype == torch.float64 else 87.0)
    logits = torch.stack([torch.zeros_like(x), -x], 1).requires_grad_()
    loss = fused(Case(logits, torch.zeros(20000, dtype=torch.int64), reduction="sum"))
    (found,) = torch.autograd.grad(loss, logits)
    expected = torch.exp(-x.double()) / (1 + torch.exp(-x.double()))
    torch.testing.assert_close(found[:, 1].double(), expected, rtol=3 * limits.eps, atol=limits.smallest_normal)


def check_confident_row(label, dtype, reduction):
    """log p and 1 - p of a label with p near 1 keep their digits: a relative comparison, entry by entry."""
    for gap in (8.0, 12.0, 16.0, 30.0):
        x = torch.linspace(-1, 1, 19).to(dtype)
        x[label] += gap
        # In float64 too log p would lose its digits: all follows from the odds of the other classes.
        odds = torch.exp(x.double() - x[label].double())
        odds[label] = 0
        expected, gradient = odds.sum().log1p(), odds / (1 + odds.sum())
        gradient[label] = -gradient.sum()
        x = x.unsqueeze(0).requires_grad_()
        loss = fused(Case(x, torch.tensor([label]), reduction=reduction))
        (found,) = torch.autograd.grad(loss.sum(), x)
        # z - max is rounded once, to its own size.
        rtol = (4 + gap) * torch.finfo(torch.float32).eps
        torch.testing.assert_close(loss.sum().double(), expected, rtol=rtol, atol=0)
        stored = torch.finfo(dtype)
        torch.testing.assert_close(found[0].double(), gradient, rtol=rtol + stored.eps, atol=stored.smallest_normal)


def gradient_cases():
    """Small float64 cases with every option for torch.autograd.gradcheck."""
    double = torch.float64
    for reduction in ("mean", "sum", "none"):
        plain = random_case(4, 5, dtype=double, spread=1.0, reduction=reduction)
        yield f"{reduction} plain", plain
        yield f"{reduction} everything", replace(everything(plain), reduction=reduction)
        soft = random_case(3, 5, dtype=double, spread=1.0, soft=True, reduction=reduction)
        yield f"{reduction} soft", soft
        yield f"{reduction} soft everything", replace(everything(soft), reduction=reduction)
    yield "smoothing", random_case(4, 5, dtype=double, spread=1.0, label_smoothing=0.2)
    yield "focal", random_case(4, 5, dtype=double, spread=1.0, focal_gamma=0.5)
    yield "poly", random_case(4, 5, dtype=double, spread=1.0, poly_epsilon=1.5)
    yield "z_loss", random_case(4, 5, dtype=double, spread=1.0, z_loss=0.1)
    yield "one row", random_case(None, 5, dtype=double, spread=1.0)
    yield "classes in the middle", everything(random_case(2, 5, 3, dtype=double, spread=1.0))
    for name in ("temperature", "scale"):
        value = torch.tensor(1.3, dtype=double)
        terms = ((name, value), ("prior", torch.tensor([0.1, 0.2, 0.1, 0.3, 0.3], dtype=double).log(), 1.0))
        yield (
            f"one {name} for all",
            random_case(4, 5, dtype=double, terms=terms, learned=("input", "term0", "term1")),
        )


def check_gradients(case: Case) -> None:
    """torch.autograd.gradcheck over every tensor that the case learns."""
    names = [name for name in case.tensors() if name in case.learned]

    def loss_of(*tensors):
        given = dict(zip(names, tensors, strict=True))
        terms = tuple((t[0], given.get(f"term{i}", t[1]), *t[2:]) for i, t in enumerate(case.terms))
        fields = {name: value for name, value in given.items() if not name.startswith("term")}
        return fused(replace(case, terms=terms, **fields))

    tensors = [case.tensors()[name].detach().clone().requires_grad_() for name in names]
    torch.autograd.gradcheck(loss_of, tensors)


def _main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extension", help="load the kernels from this file")
    parser.add_argument("--gradcheck", action="store_true")
    arguments = parser.parse_args()
    if arguments.extension:
        spec = importlib.util.spec_from_file_location("fusedloss._C", arguments.extension)
        sys.modules["fusedloss._C"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["fusedloss._C"])
    from fusedloss.backends.cpp import extension, unavailable_reason

    if unavailable_reason("cpu"):
        sys.exit(f"no kernels: {unavailable_reason('cpu')}")
    torch.set_num_threads(2)
    print(f"level {extension.level()}")
    found = list(failures(arguments.gradcheck))
    print(*found, sep="\n")
    print(f"{len(found)} failures")
    sys.exit(bool(found))


if __name__ == "__main__":
    _main()
