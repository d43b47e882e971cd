"""Cases of ``fusedloss.supcon`` for every backend; as a script, on the SIMD level that FUSEDLOSS_SIMD asks for.

Prints the level and what is wrong, one line for each case; exits with 1 if anything is.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))

from supcon_oracle import Case, wrong_with

import fusedloss
from fusedloss.backends.cpp import supcon as panels

OWN_ROWS = panels.MOST_ROWS


def fused(case):
    """The package's loss of a case, in panels of 16 rows, so that small cases have several."""
    if len(case.features) < 128:
        panels.MOST_ROWS = 16
    try:
        return whole_panels(case)
    finally:
        panels.MOST_ROWS = OWN_ROWS


def whole_panels(case):
    """The package's loss of a case."""
    arguments = {name: value for name, value in vars(case).items() if name not in ("features", "labels", "upstream")}
    return fusedloss.supcon(case.features, case.labels, **arguments)


def make(samples=37, width=11, classes=6, *, views=0, dtype=torch.float32, seed=0, mask=False, labels=True,
         prototypes=False, contrast="", **options):  # fmt: skip
    """Inputs of one case."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    shape = (samples, views, width) if views else (samples, width)
    features = (normal(*shape) + 0.3).to(dtype)
    case = Case(features, **options)
    if mask:
        case.mask = torch.rand(samples, samples, generator=generator) < 0.15
    elif labels:
        case.labels = torch.randint(classes, (samples,), generator=generator) * 7 - 3
    if prototypes:
        case.prototypes, case.prototype_labels = normal(classes, width), torch.arange(classes) * 7 - 3
    if contrast:
        case.contrast = normal(19, width)
        if contrast == "labelled":
            case.contrast_labels = torch.randint(classes, (19,), generator=generator) * 7 - 3
    return case


def cases():
    """(name, case) of every option, small."""
    ten = torch.randn(6, generator=torch.Generator().manual_seed(1))
    some_absent = ten.masked_fill(torch.tensor([True, False, False, True, False, False]), -torch.inf)
    everything = {
        "prototypes": True, "contrast": "labelled", "class_balance": True, "prototype_weight": 0.3,
        "prototype_bias": ten, "focal_gamma": 2.0,
    }  # fmt: skip
    options = {
        "labels": {},
        "views": {"views": 2},
        "three views": {"views": 3, "samples": 13},
        "first view": {"views": 2, "contrast_mode": "one"},
        "no labels": {"views": 2, "labels": False},
        "mask": {"mask": True},
        "mask, views": {"mask": True, "views": 2, "contrast_mode": "one"},
        "mask, small T": {"mask": True, "views": 2, "temperature": 0.005},
        "sum": {"reduction": "sum", "upstream": 0.25},
        "all anchors": {"reduction": "mean_all", "classes": 30},
        "all anchors, ignored": {"reduction": "mean_all", "classes": 30, "ignore_index": 4},
        "all anchors, ignored, focal": {"reduction": "mean_all", "ignore_index": 4, "focal_gamma": 1.0},
        "each anchor": {"reduction": "none", "views": 2, "upstream": torch.linspace(-1, 2, 74)},
        "T of 0.005": {"temperature": 0.005},
        "T of 0.02": {"temperature": 0.02, "views": 2},
        "T of 5": {"temperature": 5.0},
        "not normalised": {"normalize": False, "temperature": 1.0},
        "ignored": {"ignore_index": 4},
        "ignored, everything": {"ignore_index": 4, **everything},
        "prototypes": {"prototypes": True},
        "prototypes, ignored": {"prototypes": True, "ignore_index": 4, "class_balance": True},
        "prototype bias": {"prototypes": True, "prototype_bias": ten, "prototype_weight": 2.0},
        "absent prototypes": {"prototypes": True, "prototype_bias": some_absent, "samples": 9},
        "absent prototypes, everything": {**everything, "prototype_bias": some_absent, "ignore_index": 4},
        "prototypes of weight 0": {"prototypes": True, "prototype_weight": 0.0, "classes": 6},
        "balanced": {"class_balance": True, "views": 2},
        "balanced, prototypes": {"class_balance": True, "prototypes": True},
        "balanced, small T": {"class_balance": True, "prototypes": True, "temperature": 0.01},
        "bank": {"contrast": "labelled"},
        "bank without labels": {"contrast": "negatives", "views": 2},
        "bank, no labels at all": {"contrast": "negatives", "views": 2, "labels": False},
        "bank, small T": {"contrast": "labelled", "temperature": 0.01, "views": 2, "contrast_mode": "one"},
        "focal": {"focal_gamma": 1.5},
        "focal, no negatives": {"focal_gamma": 1.5, "classes": 1, "temperature": 1.0},
        "everything": everything,
        "everything, small T": {**everything, "temperature": 0.01, "views": 2, "contrast_mode": "one"},
        "several panels": {"samples": 141, "classes": 20},
        "several panels, everything": {"samples": 41, **everything, "contrast_mode": "one", "views": 2},
        "several panels, small T": {"samples": 41, "temperature": 0.01, "mask": True},
        "one feature": {"width": 1},
        "many features": {"width": 300, "samples": 21},
        "one class": {"classes": 1},
        "labels all distinct": {"samples": 9, "classes": 1000},
        "one row": {"samples": 1},
        "two rows": {"samples": 2, "classes": 1},
        "one sample, views": {"samples": 1, "views": 2},
    }  # fmt: skip
    for name, chosen in options.items():
        yield name, make(**chosen)
    weighted = make(classes=6)
    weighted.labels = (weighted.labels + 3) // 7
    weighted.class_weight = torch.rand(6)
    for reduction in ("mean", "mean_all", "none"):
        yield f"class weights, {reduction}", Case(**{**shallow(weighted), "reduction": reduction})
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        word = str(dtype).removeprefix("torch.")
        for name in ("labels", "mask, views", "T of 0.005", "everything", "several panels"):
            yield f"{name}, {word}", make(**options[name], dtype=dtype)
    yield from special_cases()


def shallow(case):
    return {name: getattr(case, name) for name in asdict(case)}


def special_cases():
    """(name, case) where other implementations give NaN or lose their digits."""
    base = make(samples=12, classes=3).features
    labels = torch.arange(12) % 3
    for temperature in (0.1, 0.005):
        word = f"T = {temperature}"
        yield f"duplicates, {word}", Case(base[labels], labels, temperature=temperature)
        yield f"duplicates of other classes, {word}", Case(base[labels], labels.flip(0), temperature=temperature)
        antipodes = torch.cat([base[:6], -base[:6]])
        yield f"antipodes, {word}", Case(antipodes, labels, temperature=temperature)
        yield f"antipodal pairs, {word}", Case(antipodes, torch.arange(12) % 6, temperature=temperature)
        yield f"orthonormal, {word}", Case(torch.eye(12), labels, temperature=temperature)
        yield f"orthonormal float16, {word}", Case(torch.eye(12, dtype=torch.float16), labels, temperature=temperature)
    yield "long rows, not normalised", Case(base * 1e4, labels, normalize=False)
    yield "long duplicates, not normalised", Case(base[labels] * 1e4, labels, normalize=False)
    for length in (1e-20, 1e20):
        yield f"rows of length {length:g}", Case(base * length, labels, upstream=length)
    zero = base.clone()
    zero[3] = 0
    yield "a zero row", Case(zero, labels)


def main():
    from fusedloss.backends.cpp import extension

    print(f"level {extension.level()}")
    failed = False
    for name, case in cases():
        for line in wrong_with(case, fused):
            failed = True
            print(f"{name}: {line}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
