"""Every bad input of cross_entropy and its terms: an error that names the argument and what is allowed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedloss
from fusedloss.backends.cpp import unavailable_reason

ROOT = Path(__file__).parents[2]
CPP = pytest.param("cpp", marks=pytest.mark.skipif(unavailable_reason("cpu") is not None, reason="no compiled module"))
NAN, INF = float("nan"), float("inf")
X, Y = torch.randn(3, 5), torch.tensor([0, 1, 2])
META = torch.device("meta")

# (id, error, words of the message, arguments)
BAD_CALLS = [
    ("input a list", TypeError, "input .*list", ([[1.0, 2.0]], Y), {}),
    ("input integers", TypeError, "input .*float32.*int64", (X.long(), Y), {}),
    ("input complex", TypeError, "input .*float32.*complex64", (X.cfloat(), Y), {}),
    ("input 8 bit", TypeError, "input .*float32.*float8", (X.to(torch.float8_e4m3fn), Y), {}),
    (
        "input a number",
        ValueError,
        "input .*class dimension.*0-dim",
        (torch.tensor(1.0), torch.tensor(0)),
        {},
    ),
    (
        "input without classes",
        ValueError,
        r"input .*at least one class.*\(3, 0\)",
        (torch.randn(3, 0), Y),
        {},
    ),
    ("input sparse", TypeError, "input .*dense.*sparse", (X.to_sparse(), Y), {}),
    ("target a list", TypeError, "target .*tensor.*list", (X, [0, 1, 2]), {}),
    ("target bool", TypeError, "target .*int64.*bool", (X, Y.bool()), {}),
    ("target int16", TypeError, "target .*int64.*int16", (X, Y.short()), {}),
    ("target too short", ValueError, r"target .*\(3,\).*\(2,\)", (X, Y[:2]), {}),
    ("target a column", ValueError, r"target .*\(3,\).*\(3, 1\)", (X, Y[:, None]), {}),
    ("target one number", ValueError, r"target .*\(3,\).*\(\)", (X, torch.tensor(1)), {}),
    ("float labels", ValueError, r"target .*\(3, 5\).*probabilities.*int64.*\(3,\)", (X, Y.float()), {}),
    ("probabilities of another shape", ValueError, r"target .*\(3, 5\).*\(3, 4\)", (X, torch.rand(3, 4)), {}),
    ("target sparse", TypeError, "target .*dense", (X, torch.rand(3, 5).to_sparse()), {}),
    ("target elsewhere", ValueError, "target .*device.*cpu.*meta", (X, Y.to(META)), {}),
    ("weight a list", TypeError, "weight .*list", (X, Y, [1.0] * 5), {}),
    ("weight integers", TypeError, "weight .*int64", (X, Y, torch.ones(5, dtype=torch.int64)), {}),
    ("weight too short", ValueError, r"weight .*\(5,\).*\(4,\)", (X, Y, torch.ones(4)), {}),
    ("weight a column", ValueError, r"weight .*\(5,\).*\(5, 1\)", (X, Y, torch.ones(5, 1)), {}),
    ("weight elsewhere", ValueError, "weight .*device.*cpu.*meta", (X, Y, torch.ones(5, device=META)), {}),
    ("weight learned", ValueError, "weight .*gradient", (X, Y, torch.ones(5, requires_grad=True)), {}),
    ("ignore_index a float", TypeError, "ignore_index .*integer.*float", (X, Y), {"ignore_index": 1.5}),
    ("ignore_index None", TypeError, "ignore_index .*integer.*NoneType", (X, Y), {"ignore_index": None}),
    ("ignore_index too large", ValueError, "ignore_index .*64 bits", (X, Y), {"ignore_index": 2**63}),
    (
        "ignore_index with probabilities",
        ValueError,
        "ignore_index .*0",
        (X, torch.rand(3, 5)),
        {"ignore_index": 0},
    ),
    ("reduction", ValueError, "reduction must be 'mean', 'sum' or 'none'; got 'avg'", (X, Y), {"reduction": "avg"}),
    ("reduction None", ValueError, "reduction must be 'mean', 'sum' or 'none'; got None", (X, Y), {"reduction": None}),
    (
        "smoothing above 1",
        ValueError,
        r"label_smoothing must be in \[0, 1\]; got 1.5",
        (X, Y),
        {"label_smoothing": 1.5},
    ),
    ("smoothing below 0", ValueError, "label_smoothing .*-0.1", (X, Y), {"label_smoothing": -0.1}),
    ("smoothing NaN", ValueError, "label_smoothing .*nan", (X, Y), {"label_smoothing": NAN}),
    ("smoothing text", TypeError, "label_smoothing .*number.*str", (X, Y), {"label_smoothing": "0.1"}),
    (
        "smoothing of one number",
        ValueError,
        r"label_smoothing .*\(3,\).*\(\)",
        (X, Y),
        {"label_smoothing": torch.tensor(0.1)},
    ),
    (
        "smoothing too short",
        ValueError,
        r"label_smoothing .*\(3,\).*\(2,\)",
        (X, Y),
        {"label_smoothing": torch.rand(2)},
    ),
    (
        "smoothing elsewhere",
        ValueError,
        "label_smoothing .*cpu.*meta",
        (X, Y),
        {"label_smoothing": torch.rand(3, device=META)},
    ),
    ("sample_weight a list", TypeError, "sample_weight .*list", (X, Y), {"sample_weight": [1.0, 2.0, 3.0]}),
    (
        "sample_weight complex",
        TypeError,
        "sample_weight .*complex",
        (X, Y),
        {"sample_weight": torch.ones(3).cfloat()},
    ),
    (
        "sample_weight too long",
        ValueError,
        r"sample_weight .*\(3,\).*\(4,\)",
        (X, Y),
        {"sample_weight": torch.ones(4)},
    ),
    (
        "sample_weight elsewhere",
        ValueError,
        "sample_weight .*cpu.*meta",
        (X, Y),
        {"sample_weight": torch.ones(3, device=META)},
    ),
    (
        "sample_weight of an image",
        ValueError,
        r"sample_weight .*\(3, 4\) or \(3,\).*\(4,\)",
        (torch.randn(3, 5, 4), torch.zeros(3, 4, dtype=torch.int64)),
        {"sample_weight": torch.ones(4)},
    ),
    ("focal below a half", ValueError, "focal_gamma .*at least 0.5.*0.3", (X, Y), {"focal_gamma": 0.3}),
    ("focal negative", ValueError, "focal_gamma .*-2", (X, Y), {"focal_gamma": -2.0}),
    ("focal NaN", ValueError, "focal_gamma .*nan", (X, Y), {"focal_gamma": NAN}),
    ("focal infinite", ValueError, "focal_gamma .*inf", (X, Y), {"focal_gamma": INF}),
    ("focal a tensor", TypeError, "focal_gamma .*number.*Tensor", (X, Y), {"focal_gamma": torch.tensor(2.0)}),
    ("focal text", TypeError, "focal_gamma .*number.*str", (X, Y), {"focal_gamma": "2"}),
    ("z_loss NaN", ValueError, "z_loss .*finite.*nan", (X, Y), {"z_loss": NAN}),
    ("z_loss infinite", ValueError, "z_loss .*finite.*inf", (X, Y), {"z_loss": INF}),
    ("z_loss None", TypeError, "z_loss .*number.*NoneType", (X, Y), {"z_loss": None}),
    ("terms a number", TypeError, "terms .*sequence.*int", (X, Y), {"terms": 3}),
    ("terms a class", TypeError, "terms .*fusedloss.terms.*Scale", (X, Y), {"terms": [fusedloss.Scale]}),
    ("terms a tensor", TypeError, "terms .*Tensor", (X, Y), {"terms": [torch.ones(5)]}),
    ("a bare Term", TypeError, "terms .*Term", (X, Y), {"terms": [fusedloss.terms.Term()]}),
    (
        "temperature too short",
        ValueError,
        r"tau .*\(5,\).*\(4,\)",
        (X, Y),
        {"terms": [fusedloss.ClassTemperature(torch.ones(4))]},
    ),
    (
        "temperature a column",
        ValueError,
        r"tau .*\(5,\).*\(5, 1\)",
        (X, Y),
        {"terms": [fusedloss.ClassTemperature(torch.ones(5, 1))]},
    ),
    (
        "scale too long",
        ValueError,
        r"scale .*\(5,\).*\(6,\)",
        (X, Y),
        {"terms": [fusedloss.Scale(torch.ones(6))]},
    ),
    (
        "scale elsewhere",
        ValueError,
        "scale .*cpu.*meta",
        (X, Y),
        {"terms": [fusedloss.Scale(torch.ones(5, device=META))]},
    ),
    (
        "temperature elsewhere",
        ValueError,
        "tau .*cpu.*meta",
        (X, Y),
        {"terms": [fusedloss.ClassTemperature(torch.ones(5, device=META))]},
    ),
    (
        "prior too short",
        ValueError,
        r"log_prior .*\(5,\).*\(2,\)",
        (X, Y),
        {"terms": [fusedloss.Prior(torch.zeros(2))]},
    ),
    (
        "prior of one number",
        ValueError,
        r"log_prior .*\(5,\).*\(\)",
        (X, Y),
        {"terms": [fusedloss.Prior(torch.tensor(0.0))]},
    ),
]


@pytest.mark.parametrize("backend", ["reference", CPP])
@pytest.mark.parametrize("name, error, message, arguments, options", BAD_CALLS, ids=[bad[0] for bad in BAD_CALLS])
def test_bad_calls(backend, name, error, message, arguments, options):
    with fusedloss.backend(backend), pytest.raises(error, match=message):
        fusedloss.cross_entropy(*arguments, **options)


BAD_TERMS = [
    (lambda: fusedloss.ClassTemperature(0), ValueError, "tau .*above 0.*0"),
    (lambda: fusedloss.ClassTemperature(-1.0), ValueError, "tau .*above 0.*-1"),
    (lambda: fusedloss.ClassTemperature(NAN), ValueError, "tau .*finite.*nan"),
    (lambda: fusedloss.ClassTemperature(INF), ValueError, "tau .*finite.*inf"),
    (
        lambda: fusedloss.ClassTemperature(torch.tensor([1.0, 0.0])),
        ValueError,
        "tau .*positive.*0.0 for class 1",
    ),
    (
        lambda: fusedloss.ClassTemperature(torch.tensor([NAN, 1.0])),
        ValueError,
        "tau .*positive.*nan for class 0",
    ),
    (lambda: fusedloss.ClassTemperature(torch.tensor([1, 2])), TypeError, "tau .*floating-point.*int64"),
    (lambda: fusedloss.ClassTemperature("1"), TypeError, "tau .*float.*str"),
    (lambda: fusedloss.ClassTemperature(True), TypeError, "tau .*float.*bool"),
    (lambda: fusedloss.ClassTemperature(None), TypeError, "tau .*float.*NoneType"),
    (lambda: fusedloss.Scale(INF), ValueError, "scale .*finite.*inf"),
    (lambda: fusedloss.Scale(torch.tensor([1.0, NAN])), ValueError, "scale must be finite; got nan for class 1"),
    (lambda: fusedloss.Scale([1.0]), TypeError, "scale .*float.*list"),
    (lambda: fusedloss.Prior([0.5, 0.5]), TypeError, "log_prior .*tensor.*list"),
    (lambda: fusedloss.Prior(torch.tensor([0.0, NAN])), ValueError, "log_prior .*NaN"),
    (lambda: fusedloss.Prior(torch.tensor([0.0, INF])), ValueError, r"log_prior .*\+inf"),
    (lambda: fusedloss.Prior(torch.tensor([0, 1])), TypeError, "log_prior .*int64"),
    (lambda: fusedloss.Prior(torch.zeros(2), strength=NAN), ValueError, "strength .*finite.*nan"),
    (
        lambda: fusedloss.Prior(torch.zeros(2), strength=torch.tensor(1.0)),
        TypeError,
        "strength .*float.*tensor",
    ),
]


@pytest.mark.parametrize("make, error, message", BAD_TERMS)
def test_bad_terms(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("label", [5, -1, -101, 2**40, -(2**63)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 2), (300, 5)])
def test_labels_out_of_range(label, reduction, shape):
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    target[2] = label
    row = 2 * (shape[2] if len(shape) == 3 else 1)
    message = rf"target must lie in \[0, 5\) or be ignore_index=-100; got label {label} at row {row}$"
    with pytest.raises(IndexError, match=message):
        fusedloss.cross_entropy(torch.randn(shape, requires_grad=True), target, reduction=reduction)


def test_labels_out_of_range_on_the_reference():
    with fusedloss.backend("reference"):
        for label in (5, -1):
            with pytest.raises(IndexError, match=rf"target must lie in \[0, 5\) .*; got label {label} at row 1"):
                fusedloss.cross_entropy(X, torch.tensor([0, label, 1]))


def test_a_bad_label_of_another_ignore_index():
    with pytest.raises(IndexError, match=r"ignore_index=-1; got label -100 at row 0"):
        fusedloss.cross_entropy(X, torch.tensor([-100, 1, 2]), ignore_index=-1)


def test_a_temperature_learned_below_zero_is_an_error_at_the_call():
    tau = torch.ones(5, requires_grad=True)
    term = fusedloss.ClassTemperature(tau)
    with torch.no_grad():
        tau[3] = -0.5
    with pytest.raises(ValueError, match=r"tau .*positive.*-0.5 for class 3"):
        fusedloss.cross_entropy(X, Y, terms=[term])


def test_a_backend_that_does_not_exist_or_cannot_answer():
    with pytest.raises(ValueError, match="backend must be one of 'reference', 'cpp', 'triton'; got 'cuda'"):
        fusedloss.backend("cuda").__enter__()
    if not os.environ.get("TRITON_INTERPRET"):
        with (
            fusedloss.backend("triton"),
            pytest.raises(RuntimeError, match="backend 'triton' can't serve device 'cpu'"),
        ):
            fusedloss.cross_entropy(X, Y)
    assert fusedloss.cross_entropy(X, Y).isfinite()


def test_a_backend_of_the_environment_that_does_not_exist():
    environment = {**os.environ, "FUSEDLOSS_BACKEND": "cuda", "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", "import fusedloss"], env=environment, capture_output=True, text=True)
    assert "FUSEDLOSS_BACKEND must be one of 'reference', 'cpp', 'triton'; got 'cuda'" in found.stderr


def test_the_synchronous_label_check_says_the_same():
    code = (
        "import torch, fusedloss\n"
        "with fusedloss.backend('reference'):\n"
        "    try: fusedloss.cross_entropy(torch.randn(3, 5), torch.tensor([0, 7, 1]))\n"
        "    except IndexError as error: print(error)\n"
    )
    environment = {**os.environ, "FUSEDLOSS_CHECK": "1", "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.stdout == "target must lie in [0, 5) or be ignore_index=-100; got label 7 at row 1\n", found.stderr


VALUES = {
    "label_smoothing must be between 0 and 1; got 1.5 at (1,)": "y, label_smoothing=torch.tensor([0.0, 1.5, 0.1])",
    "sample_weight must be finite and at least 0; got -1.0 at (0,)": "y, sample_weight=-torch.ones(3)",
    "weight must be finite and at least 0; got nan at (2,)": "y, torch.tensor([1.0, 1.0, float('nan'), 1.0, 1.0])",
    "target must be finite and at least 0; got -0.5 at (0, 1)": "torch.tensor([[1.5, -0.5, 0, 0, 0]]).expand(3, 5)",
    "target must hold probabilities that sum to 1; got 2.0 at row (0,)": "torch.full((3, 5), 0.4)",
    "MarginPenalty: strength must be between 0 and 1; got 2.0 at (0,)": (
        "y, margin_penalty=fusedloss.MarginPenalty(1.0, torch.full((3,), 2.0), mix=True)"
    ),
}


def test_the_synchronous_value_checks():
    lines = ["import torch, fusedloss", "x, y = torch.randn(3, 5), torch.tensor([0, 1, 2])"]
    for arguments in VALUES.values():
        lines += [f"try: fusedloss.cross_entropy(x, {arguments})", "except ValueError as error: print(error)"]
    environment = {**os.environ, "FUSEDLOSS_CHECK": "1", "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", "\n".join(lines)], env=environment, capture_output=True, text=True)
    assert found.stdout.splitlines() == list(VALUES), found.stderr


@pytest.mark.parametrize("weight", [-1.0, NAN])
def test_a_module_refuses_class_weights_that_are_none(weight):
    with pytest.raises(ValueError, match="weight must be at least 0"):
        fusedloss.CrossEntropyLoss(torch.tensor([1.0, weight]))
