"""fusedloss.supcon and SupConLoss: values and gradients on every CPU backend, and what surrounds them."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import supcon_battery
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from supcon_oracle import wrong_with

import fusedloss
from fusedloss import ops
from fusedloss.backends.cpp import extension, unavailable_reason

ROOT = Path(__file__).parents[2]
needs_kernels = pytest.mark.skipif(unavailable_reason("cpu") is not None, reason="no compiled module")
BACKENDS = ["reference", pytest.param("cpp", marks=needs_kernels)]
CASES = dict(supcon_battery.cases())
# torch's own compiler warns about its own plans, differently in each version.
COMPILER_NOISE = "ignore:::torch"


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fusedloss.backend(request.param):
        yield request.param


def batch(samples=20, width=8, classes=4, views=0, dtype=torch.float32):
    case = supcon_battery.make(samples, width, classes, views=views, dtype=dtype)
    return case.features.requires_grad_(), case.labels


@pytest.mark.parametrize("name", CASES)
def test_against_float64(backend, name):
    assert wrong_with(CASES[name], supcon_battery.fused) == []


@needs_kernels
@pytest.mark.parametrize("level", ["baseline", pytest.param("avx2", marks=pytest.mark.slow), "avx512"])
def test_simd_level(level):
    if level == extension.level():
        pytest.skip("the level of this process, where test_against_float64 runs the battery")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FUSEDLOSS_SIMD": level}
    command = [sys.executable, str(ROOT / "tests" / "cases" / "supcon_battery.py")]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "this processor and build allow" in found.stderr:
        pytest.skip(f"this machine has no {level}")
    assert (found.returncode, found.stdout) == (0, f"level {level}\n"), found.stdout + found.stderr


@needs_kernels
@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_is_written():
    with fusedloss.backend("cpp"):
        for name in ("labels", "everything", "several panels, small T", "ignored, everything", "first view"):
            assert wrong_with(CASES[name], supcon_battery.fused) == [], name


@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.01}, {"class_balance": True}, {"contrast_mode": "one"}, {"normalize": False},
    {"ignore_index": -3}, {"reduction": "none"},
])  # fmt: skip
def test_gradcheck(backend, options):
    case = supcon_battery.make(4, 3, 2, views=2, dtype=torch.float64, prototypes=True)
    features, prototypes = case.features.requires_grad_(), case.prototypes.double().requires_grad_()
    temperature = torch.tensor(options.get("temperature", 0.3), dtype=torch.float64, requires_grad=True)

    def loss(x, p, t):
        kept = {key: value for key, value in options.items() if key != "temperature"}
        centres = {"prototypes": p, "prototype_labels": case.prototype_labels}
        return fusedloss.supcon(x, case.labels, temperature=t, **centres, **kept)

    assert torch.autograd.gradcheck(loss, (features, prototypes, temperature))


@given(seed=st.integers(0, 10**6), samples=st.integers(1, 40), views=st.integers(0, 3), classes=st.integers(1, 50))
@settings(max_examples=15)
def test_the_order_of_samples_does_not_matter(seed, samples, views, classes):
    case = supcon_battery.make(samples, 5, classes, views=views, seed=seed, dtype=torch.float64)
    order = torch.randperm(samples)
    loss = fusedloss.supcon(case.features, case.labels)
    other = fusedloss.supcon(case.features[order], case.labels[order] * -5 + 2)
    torch.testing.assert_close(loss, other)


# The formulas of two public implementations, written anew from their definitions.
def supcontrast(features, labels, temperature, base_temperature):
    """Mean over all anchors, times temperature / base_temperature."""
    contrast = torch.cat(features.unbind(1))
    s = contrast @ contrast.t() / temperature
    keep = ~torch.eye(len(s), dtype=torch.bool)
    y = labels.repeat(features.shape[1])
    positive = (y[:, None] == y) & keep
    log_p = s - torch.logsumexp(s.masked_fill(~keep, -torch.inf), 1, keepdim=True)
    per_anchor = -(log_p * positive).sum(1) / positive.sum(1).clamp(min=1)
    return (temperature / base_temperature * per_anchor).mean()


def metric_learning(features, labels, temperature):
    """Rows are normalised; mean over the anchors whose loss is above 0, and 0 for a batch of one class."""
    x = F.normalize(features, dim=1)
    s = x @ x.t() / temperature
    keep = ~torch.eye(len(s), dtype=torch.bool)
    positive = (labels[:, None] == labels) & keep
    if not positive.any() or (positive == keep).all():
        return s.sum() * 0
    log_p = s - torch.logsumexp(s.masked_fill(~keep, -torch.inf), 1, keepdim=True)
    per_anchor = -(log_p * positive).sum(1) / positive.sum(1).clamp(min=1)
    return per_anchor[per_anchor > 0].mean()


def test_values_of_supcontrast(backend):
    features = F.normalize(torch.randn(12, 2, 7), dim=2)
    labels = torch.arange(12) % 5
    ours = fusedloss.SupConLoss(temperature=0.07, contrast_mode="all", base_temperature=0.1)(features, labels)
    torch.testing.assert_close(ours, supcontrast(features, labels, 0.07, 0.1))
    # Without positives for every anchor the means differ: ours leaves those anchors out.
    single, some = features[:, :1], torch.tensor([0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 8])
    theirs = supcontrast(single, some, 0.07, 0.07)
    torch.testing.assert_close(fusedloss.SupConLoss(0.07, reduction="mean_all")(single, some), theirs)
    torch.testing.assert_close(fusedloss.SupConLoss(0.07)(single, some), theirs * 12 / 5)


def test_values_of_metric_learning(backend):
    features, labels = torch.randn(15, 6) * 3, torch.arange(15) % 6
    torch.testing.assert_close(fusedloss.SupConLoss()(features, labels), metric_learning(features, labels, 0.1))
    one_class = torch.zeros(15, dtype=torch.int64)
    assert metric_learning(features, one_class, 0.1) == 0
    assert fusedloss.SupConLoss()(features, one_class) > 1


def test_the_calls_of_supcontrast():
    features = torch.rand(10, 3, 16)
    labels, mask = torch.arange(10) % 4, torch.eye(10)
    criterion = fusedloss.SupConLoss(temperature=0.07)
    by_labels, simclr, by_mask = criterion(features, labels), criterion(features), criterion(features, mask=mask)
    torch.testing.assert_close(simclr, by_mask)
    torch.testing.assert_close(by_labels, criterion(features, labels.unsqueeze(1)))
    torch.testing.assert_close(by_labels, criterion(features, mask=(labels[:, None] == labels).float()))
    torch.testing.assert_close(by_labels, criterion(features.unflatten(2, (4, 4)), labels))


def test_where_nothing_can_be_contrasted_loss_and_gradient_are_zero(backend):
    for samples, labels in ((1, None), (1, [3]), (5, [0, 1, 2, 3, 4]), (4, [-100] * 4), (0, []), (3, [7, -100, -100])):
        features = torch.randn(samples, 4, requires_grad=True)
        loss = fusedloss.supcon(features, None if labels is None else torch.tensor(labels, dtype=torch.int64))
        loss.backward()
        assert loss.item() == 0 and not features.grad.any(), labels


def test_zero_rows_get_no_gradient_and_long_rows_their_own(backend):
    features, labels = batch()
    with torch.no_grad():
        features[2] = 0
        features[3] *= 1e20
        features[4] *= 1e-20
    fusedloss.supcon(features, labels).backward()
    assert torch.isfinite(features.grad).all() and not features.grad[2].any()
    long, short = features.grad[3:5].double().norm(dim=1)
    assert 1e-25 < long < 1e-18 and 1e15 < short < 1e22


def test_a_bank_gets_no_gradient(backend):
    features, labels = batch()
    bank = torch.randn(30, 8, requires_grad=True)
    fusedloss.supcon(features, labels, contrast=bank, contrast_labels=torch.arange(30) % 4).backward()
    assert bank.grad is None and features.grad.any()


def test_only_what_requires_a_gradient_gets_one(backend):
    features, labels = batch()
    temperature = torch.tensor(0.2, requires_grad=True)
    fusedloss.supcon(features.detach(), labels, temperature=temperature).backward()
    alone = temperature.grad.clone()
    temperature.grad = None
    fusedloss.supcon(features, labels, temperature=temperature).backward()
    torch.testing.assert_close(temperature.grad, alone)
    with torch.no_grad():
        assert not fusedloss.supcon(features, labels, temperature=temperature).requires_grad


def test_backward_twice_and_two_losses_at_once(backend):
    features, labels = batch(views=2)
    first, second = fusedloss.supcon(features, labels), fusedloss.supcon(features, labels, temperature=0.5)
    (expected,) = torch.autograd.grad(first, features, retain_graph=True)
    for _ in range(2):
        (found,) = torch.autograd.grad(first, features, retain_graph=True)
        assert torch.equal(found, expected)
    (sum_of_both,) = torch.autograd.grad(first + second, features, retain_graph=True)
    torch.testing.assert_close(sum_of_both, expected + torch.autograd.grad(second, features)[0])


def test_reruns_give_the_same_bits(backend):
    for name in ("several panels", "several panels, small T", "several panels, everything"):
        case = CASES[name]
        results = []
        for _ in range(2):
            x = case.features.detach().clone().requires_grad_()
            loss = supcon_battery.fused(supcon_battery.Case(**{**supcon_battery.shallow(case), "features": x}))
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), x)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), name


@needs_kernels
def test_second_derivatives_need_the_reference():
    features, labels = batch(6, dtype=torch.float64)
    with fusedloss.backend("cpp"):
        (gradient,) = torch.autograd.grad(fusedloss.supcon(features, labels), features, create_graph=True)
        with pytest.raises(RuntimeError, match="backend\\('reference'\\)"):
            gradient.sum().backward()
    with fusedloss.backend("reference"):
        assert torch.autograd.gradgradcheck(lambda x: fusedloss.supcon(x, labels, temperature=0.5), features)


def test_strides_and_integer_types(backend):
    features, labels = batch(dtype=torch.float64)
    expected = fusedloss.supcon(features, labels)
    wide = torch.full((20, 17), torch.nan, dtype=torch.float64)
    wide[:, 1:17:2] = features.detach()
    for other in (wide[:, 1:17:2], features.detach().t().contiguous().t()):
        torch.testing.assert_close(fusedloss.supcon(other, labels), expected)
    for dtype in (torch.int32, torch.int16, torch.int8):
        torch.testing.assert_close(fusedloss.supcon(features, labels.to(dtype)), expected)
    torch.testing.assert_close(fusedloss.supcon(features, labels.repeat_interleave(2)[::2]), expected)
    same = torch.randn(1, 8, dtype=torch.float64).expand(6, 8)
    torch.testing.assert_close(
        fusedloss.supcon(same, torch.arange(6) % 2), torch.tensor(5.0, dtype=torch.float64).log()
    )


def test_autocast_leaves_similarities_in_float32(backend):
    features, labels = batch(200, 16, 10)
    expected = fusedloss.supcon(features, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fusedloss.supcon(features, labels)
        half = fusedloss.supcon(features.bfloat16(), labels)
    assert loss.dtype == half.dtype == torch.float32
    if backend == "cpp":
        assert torch.equal(loss, expected)
    torch.testing.assert_close(half, expected, rtol=0.02, atol=0)


@needs_kernels
@pytest.mark.filterwarnings(COMPILER_NOISE)
def test_compiled_whole_with_a_dynamic_batch():
    def step(x, y, t):
        return fusedloss.supcon(x, y, temperature=t, class_balance=True)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples in (12, 20, 33):
        features, labels = batch(samples, dtype=torch.float64)
        temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        results = []
        for function in (step, compiled):
            loss = function(features, labels, temperature)
            results.append((loss, *torch.autograd.grad(loss, (features, temperature))))
        torch.testing.assert_close(*results)


@needs_kernels
def test_memory_grows_with_the_rows_alone():
    code = (
        "import torch, fusedloss\nfrom bench import memory\n"
        "x, y = torch.randn(6000, 32, requires_grad=True), torch.randint(50, (6000,))\n"
        "def step():\n    x.grad = None\n    fusedloss.supcon(x, y).backward()\n"
        "print(memory.peak_bytes(step, lambda _: None))\n"
    )
    from bench.memory import ENVIRONMENT

    environment = {**os.environ, "PYTHONPATH": str(ROOT), **ENVIRONMENT}
    found = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    if found.stdout.strip() == "None":
        pytest.skip("this system can't reset a process's peak memory")
    # The matrix of similarities alone would take 144 MB.
    assert int(found.stdout) < 24e6


def test_learned_temperature_and_state():
    loss = fusedloss.SupConLoss(0.2, learn_temperature=True)
    features, labels = batch()
    loss(features, labels).backward()
    assert loss.log_temperature.grad != 0
    assert list(loss.state_dict()) == ["log_temperature"]
    assert torch.equal(copy.deepcopy(loss)(features, labels), loss(features, labels))
    fixed = fusedloss.SupConLoss(class_weight=torch.ones(3))
    assert list(fixed.state_dict()) == ["class_weight"] and not list(fixed.parameters())


def test_reb_style_is_class_weights_and_focus():
    case = supcon_battery.make(samples=30)
    labels = (case.labels + 3) // 7
    weight = torch.rand(6) + 0.5
    rows = fusedloss.supcon(case.features, labels, reduction="none")
    focused = fusedloss.supcon(case.features, labels, reduction="none", focal_gamma=2.0)
    factor = weight[labels] * focused / rows
    found = fusedloss.supcon(case.features, labels, class_weight=weight, focal_gamma=2.0)
    torch.testing.assert_close(found, (factor * rows).sum() / factor.sum())


X, Y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
MASK = torch.ones(4, 4)
ONE_HOT = torch.eye(4, dtype=torch.int64)
PROTOTYPES = {"prototypes": torch.ones(2, 3), "prototype_labels": Y[:2]}
BAD_CALLS = [
    (TypeError, "^features must be a floating-point tensor; got list", {"features": [[1.0]]}),
    (TypeError, "^features must be a floating-point tensor; got NoneType", {"features": None}),
    (TypeError, "^features must be a floating-point tensor; got str", {"features": "rows"}),
    (TypeError, "^features must be a floating-point tensor; got ndarray", {"features": X.numpy()}),
    (TypeError, "^features must be float32, .*; got torch.int64", {"features": X.long()}),
    (TypeError, "^features must be float32, .*; got torch.complex64", {"features": X.to(torch.complex64)}),
    (TypeError, "^features must be a dense tensor", {"features": X.to_sparse()}),
    (ValueError, r"^features must have shape \(B, D\) or .*; got \(4,\)", {"features": X[:, 0]}),
    (ValueError, r"^features must have shape \(B, D\) or .*; got \(\)", {"features": X[0, 0]}),
    (ValueError, r"^features must have at least one view .*; got \(4, 0, 3\)", {"features": torch.ones(4, 0, 3)}),
    (ValueError, r"^labels must have shape \(4,\).*; got \(3,\)", {"labels": Y[:3]}),
    (ValueError, r"^labels must have shape \(4,\).*; got \(4, 4\) \(labels.argmax", {"labels": ONE_HOT}),
    (ValueError, r"^labels must have shape \(4,\).*; got \(\)", {"labels": Y[0]}),
    (TypeError, "^labels must be integers .*; got torch.float32", {"labels": Y.float()}),
    (TypeError, "^labels must be integers .*; got torch.bool", {"labels": Y.bool()}),
    (TypeError, "^labels must be a tensor of integers; got list", {"labels": [0, 1, 0, 1]}),
    (ValueError, "^labels must be on the device of features, cpu; got meta", {"labels": Y.to("meta")}),
    (ValueError, r"^mask must have shape \(4, 4\).*; got \(4, 3\)", {"labels": None, "mask": torch.ones(4, 3)}),
    (ValueError, "^mask must hold 0 and 1 .*; got 0.5", {"labels": None, "mask": torch.full((4, 4), 0.5)}),
    (TypeError, "^mask must be bool, .*; got torch.complex64", {"labels": None, "mask": MASK.to(torch.complex64)}),
    (TypeError, "^mask must be a tensor; got list", {"labels": None, "mask": MASK.tolist()}),
    (ValueError, "^mask must be None where there are labels", {"mask": MASK}),
    (ValueError, "^class_balance must be left out with a mask", {"labels": None, "mask": MASK, "class_balance": True}),
    (ValueError, "^focal_gamma must be left out with a mask", {"labels": None, "mask": MASK, "focal_gamma": 1.0}),
    (ValueError, "^contrast must be None with a mask", {"labels": None, "mask": MASK, "contrast": X}),
    (ValueError, "^temperature must be finite and above 0; got -0.1", {"temperature": -0.1}),
    (ValueError, "^temperature must be finite and above 0; got 0", {"temperature": 0}),
    (ValueError, "^temperature must be finite and above 0; got 0.0", {"temperature": torch.tensor(0.0)}),
    (ValueError, "^temperature must be finite and above 0; got nan", {"temperature": float("nan")}),
    (ValueError, "^temperature must be finite and above 0; got inf", {"temperature": torch.tensor(torch.inf)}),
    (ValueError, r"^temperature must be .*one element; got torch.float32 of shape \(2,\)",
     {"temperature": torch.ones(2)}),
    (ValueError, "^temperature must be .*one element; got torch.int64", {"temperature": torch.tensor(1)}),
    (TypeError, "^temperature must be a number; got NoneType", {"temperature": None}),
    (TypeError, "^temperature must be a number; got bool", {"temperature": True}),
    (TypeError, "^temperature must be a number; got str", {"temperature": "0.1"}),
    (TypeError, "^temperature must be a number; got list", {"temperature": [0.1]}),
    (TypeError, "^temperature must be a number; got ndarray", {"temperature": X.numpy()}),
    (ValueError, "^reduction must be 'mean', .*; got 'avg'", {"reduction": "avg"}),
    (ValueError, "^reduction must be 'mean', .*; got None", {"reduction": None}),
    (ValueError, "^contrast_mode must be 'all' or 'one'; got 'two'", {"contrast_mode": "two"}),
    (TypeError, "^normalize must be True or False; got str", {"normalize": "no"}),
    (TypeError, "^class_balance must be True or False; got int", {"class_balance": 1}),
    (TypeError, "^ignore_index must be an integer; got float", {"ignore_index": 0.5}),
    (TypeError, "^ignore_index must be an integer; got NoneType", {"ignore_index": None}),
    (ValueError, r"^prototypes must have shape \(rows, 3\).*; got \(2, 4\)",
     {"prototypes": torch.ones(2, 4), "prototype_labels": Y[:2]}),
    (TypeError, "^prototypes must be a floating-point tensor; got list", {**PROTOTYPES, "prototypes": [[1.0]]}),
    (ValueError, "^prototype_labels must be given .*; got None", {"prototypes": torch.ones(2, 3)}),
    (ValueError, "^prototypes must be given .*; got None", {"prototype_labels": Y[:2]}),
    (ValueError, "^labels must be given with prototypes.*; got None", {**PROTOTYPES, "labels": None}),
    (ValueError, r"^prototype_labels must have shape \(2,\).*; got \(4,\)", {**PROTOTYPES, "prototype_labels": Y}),
    (ValueError, "^prototype_bias must be None where there are no prototypes", {"prototype_bias": torch.ones(2)}),
    (ValueError, r"^prototype_bias must have shape \(2,\); got \(3,\)", {**PROTOTYPES, "prototype_bias": X[0]}),
    (TypeError, "^prototype_bias must be a floating-point tensor; got list",
     {**PROTOTYPES, "prototype_bias": [0.0, 0.0]}),
    (TypeError, "^prototype_bias must be a floating-point tensor; got torch.int64",
     {**PROTOTYPES, "prototype_bias": Y[:2]}),
    (ValueError, "^prototype_bias must be at most 80 .*; got nan at 1",
     {**PROTOTYPES, "prototype_bias": torch.tensor([0.0, torch.nan])}),
    (ValueError, "^prototype_bias must be at most 80 .*; got inf at 0",
     {**PROTOTYPES, "prototype_bias": torch.tensor([torch.inf, 0.0])}),
    (ValueError, "^contrast must be given with contrast_labels", {"contrast_labels": Y}),
    (ValueError, "^labels must be given with contrast_labels", {"labels": None, "contrast": X, "contrast_labels": Y}),
    (ValueError, r"^contrast_labels must have shape \(2,\)", {"contrast": torch.ones(2, 3), "contrast_labels": Y}),
    (ValueError, "^contrast must be on the device of features", {"contrast": X.to("meta")}),
    (ValueError, r"^class_weight must have shape \(K,\); got \(2, 2\)", {"class_weight": torch.ones(2, 2)}),
    (ValueError, r"^class_weight must have shape \(K,\) .*; got \(0,\)", {"class_weight": torch.ones(0)}),
    (TypeError, "^class_weight must be a floating-point tensor; got list", {"class_weight": [1.0, 1.0]}),
    (ValueError, "^class_weight must be at least 0 and finite; got -1.0 at 1",
     {"class_weight": torch.tensor([1.0, -1.0])}),
    (IndexError, "labels must lie in .*; got label 1 at row 1", {"class_weight": torch.ones(1)}),
    (ValueError, "^class_weight must be None without labels", {"labels": None, "class_weight": torch.ones(2)}),
    (ValueError, "^focal_gamma must be finite and at least 0; got -1", {"focal_gamma": -1.0}),
    (TypeError, "^focal_gamma must be a number; got str", {"focal_gamma": "2"}),
    (ValueError, "^prototype_weight must be finite and at least 0; got inf", {"prototype_weight": float("inf")}),
    (TypeError, "^prototype_weight must be a number; got NoneType", {"prototype_weight": None}),
]  # fmt: skip


@pytest.mark.parametrize("error, words, arguments", BAD_CALLS, ids=[words for _, words, _ in BAD_CALLS])
def test_bad_input(error, words, arguments):
    arguments = {"features": X, "labels": Y, **arguments}
    with pytest.raises(error, match=words):
        fusedloss.supcon(arguments.pop("features"), arguments.pop("labels"), **arguments)


def test_non_finite_rows_are_named_on_request():
    code = (
        "import torch, fusedloss\nx = torch.randn(6, 3)\nx[1, 0], x[4, 2] = float('nan'), float('inf')\n"
        "fusedloss.supcon(x, torch.tensor([0, 1, 0, 1, 0, 1]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FUSEDLOSS_CHECK": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "features must be finite; got other values in rows 1, 4 " in found.stderr


def test_a_bad_module_is_refused_when_it_is_made():
    for error, arguments, words in (
        (ValueError, {"temperature": 0.0}, "^temperature must be finite and above 0; got 0.0"),
        (TypeError, {"temperature": True}, "^temperature must be a number; got bool"),
        (TypeError, {"temperature": None}, "^temperature must be a number; got NoneType"),
        (TypeError, {"temperature": torch.tensor(0.1)}, "^temperature must be a number; got Tensor"),
        (ValueError, {"base_temperature": -1.0}, "^base_temperature must be finite and above 0; got -1.0"),
        (TypeError, {"base_temperature": "0.1"}, "^base_temperature must be a number; got str"),
        (ValueError, {"contrast_mode": "both"}, "^contrast_mode must be 'all' or 'one'; got 'both'"),
        (ValueError, {"reduction": "max"}, "^reduction must be 'mean', .*; got 'max'"),
        (TypeError, {"class_weight": [1.0]}, "^class_weight must be a floating-point tensor; got list"),
        (TypeError, {"normalize": None}, "^normalize must be True or False; got NoneType"),
        (TypeError, {"learn_temperature": "yes"}, "^learn_temperature must be True or False; got str"),
        (TypeError, {"ignore_index": None}, "^ignore_index must be an integer; got NoneType"),
        (ValueError, {"focal_gamma": float("nan")}, "^focal_gamma must be .*; got nan"),
    ):
        with pytest.raises(error, match=words):
            fusedloss.SupConLoss(**arguments)


def test_repr_shows_what_differs_from_the_defaults():
    assert repr(fusedloss.SupConLoss()) == "SupConLoss()"
    loss = fusedloss.SupConLoss(0.07, base_temperature=0.1, class_weight=torch.ones(3), learn_temperature=True)
    shown = "temperature=0.07, base_temperature=0.1, class_weight=tensor(3,), learn_temperature=True"
    assert repr(loss) == f"SupConLoss({shown})"


def test_no_rows_and_no_prototypes_are_a_loss_too(backend):
    empty = torch.zeros(0, 2, 3, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    for options in ({"labels": none}, {}, {"mask": torch.zeros(0, 0)}):
        loss = fusedloss.supcon(empty, **options)
        assert loss == 0 and torch.autograd.grad(loss, empty)[0].shape == empty.shape
    without = fusedloss.supcon(X, Y, prototypes=torch.zeros(0, 3), prototype_labels=none)
    torch.testing.assert_close(without, fusedloss.supcon(X, Y))


def test_ignored_rows_leave_every_sum(backend):
    features, labels = batch(12)
    labels[8:] = -100
    with torch.no_grad():
        features[9], features[10, 0] = torch.nan, torch.inf
    kept = features.detach()[:8].clone().requires_grad_()
    for options in ({}, {"reduction": "mean_all"}, {"reduction": "sum"}, {"class_balance": True}, {"focal_gamma": 1.0}):
        loss, expected = fusedloss.supcon(features, labels, **options), fusedloss.supcon(kept, labels[:8], **options)
        torch.testing.assert_close(loss, expected)
        (grad,), (of_kept,) = torch.autograd.grad(loss, features), torch.autograd.grad(expected, kept)
        torch.testing.assert_close(grad[:8], of_kept)
        assert not grad[8:].any()


@pytest.mark.parametrize("value, options", [
    (torch.nan, {}), (torch.nan, {"temperature": 0.001}), (torch.nan, {"normalize": False}), (torch.inf, {}),
    (-torch.inf, {"temperature": 0.001}),
])  # fmt: skip
def test_a_non_finite_row_makes_every_loss_nan(backend, value, options):
    features, labels = batch(9, classes=2)
    with torch.no_grad():
        features[3, 1] = value
    assert fusedloss.supcon(features, labels, reduction="none", **options).isnan().all()


def test_a_bias_of_minus_infinity_leaves_a_prototype_out(backend):
    features, labels = batch(14)
    labels = labels % 3
    centres, of = torch.randn(4, 8, requires_grad=True), torch.tensor([0, 1, 2, 1])
    for gone in (0, 1, 3):
        left = [i for i in range(4) if i != gone]
        for options in ({}, {"class_balance": True, "prototype_weight": 0.5, "focal_gamma": 1.0}):
            bias = torch.tensor([0.1, -0.2, 0.3, 0.0])
            with_bias = {"prototype_bias": bias[left], **options}
            expected = fusedloss.supcon(
                features, labels, prototypes=centres[left], prototype_labels=of[left], **with_bias
            )
            bias[gone] = -torch.inf
            loss = fusedloss.supcon(
                features, labels, prototypes=centres, prototype_labels=of, **{**options, "prototype_bias": bias}
            )
            torch.testing.assert_close(loss, expected)
            grads = [torch.autograd.grad(value, (features, centres)) for value in (loss, expected)]
            torch.testing.assert_close(*grads)
            assert not grads[0][1][gone].any()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["plain", "small T", "balanced", "mask", "any length"])
def test_the_same_bits_at_any_number_of_threads(monkeypatch, dtype, name):
    options = {
        "small T": {"temperature": 0.01},
        "balanced": {"class_balance": True},
        "any length": {"normalize": False},
    }
    x, labels = torch.randn(700, 24, dtype=dtype) + 0.2, torch.randint(30, (700,))
    positives = {"mask": labels[:, None] == labels} if name == "mask" else {"labels": labels}
    # torch's own products may add up in another order: they are to be those of one thread.
    own = torch.mm, torch.Tensor.addmm_

    def by_one_thread(function):
        def run(*arguments, **keywords):
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return function(*arguments, **keywords)
            finally:
                torch.set_num_threads(threads)

        return run

    monkeypatch.setattr(torch, "mm", by_one_thread(own[0]))
    monkeypatch.setattr(torch.Tensor, "addmm_", by_one_thread(own[1]))
    results = []
    with fusedloss.backend("cpp"):
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            given = {"temperature": 0.1, **options.get(name, {})}
            temperature = torch.tensor(given.pop("temperature"), dtype=dtype, requires_grad=True)
            loss = fusedloss.supcon(leaf, temperature=temperature, reduction="none", **positives, **given)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), (leaf, temperature))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernels
def test_forward_and_backward_of_different_backends():
    for name in ("labels", "everything", "T of 0.005", "everything, small T", "mask, small T", "ignored, everything",
                 "balanced, small T"):  # fmt: skip
        case = CASES[name]
        results = []
        for forward, backward in (("cpp", "cpp"), ("cpp", "reference"), ("reference", "cpp")):
            x = case.features.detach().clone().double().requires_grad_()
            inputs = operation_inputs(supcon_battery.Case(**{**supcon_battery.shallow(case), "features": x}))
            with fusedloss.backend(forward):
                loss = torch.ops.fusedloss.supcon_stats.default(*inputs)[0].sum()
            with fusedloss.backend(backward):
                results.append(torch.autograd.grad(loss, x)[0])
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-12, msg=name)


def operation_inputs(case):
    """What the functional layer gives the operation."""
    seen, operation = [], ops.supcon_stats

    def record(inputs):
        seen.append(inputs)
        return operation(inputs)

    with pytest.MonkeyPatch.context() as patch, fusedloss.backend("cpp"):
        patch.setattr(ops, "supcon_stats", record)
        supcon_battery.whole_panels(case)
    return seen[0]
