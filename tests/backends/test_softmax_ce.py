"""cross_entropy on the CPU: every backend against float64, and against torch where torch has the option."""

from dataclasses import replace

import numpy as np
import oracle
import pytest
import softmax_battery as battery
import torch
import torch.nn.functional as F
from oracle import check
from softmax_battery import DTYPES, everything, fused, random_case

import fusedloss
from fusedloss.backends.cpp import unavailable_reason

CPP_ONLY = pytest.mark.skipif(unavailable_reason("cpu") is not None, reason="no compiled module")
CPP = pytest.param("cpp", marks=CPP_ONLY)
INF, NAN = float("inf"), float("nan")

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=["reference", CPP])
def backend(request):
    with fusedloss.backend(request.param):
        yield request.param


@CPP_ONLY
@pytest.mark.parametrize("name, case", [pytest.param(name, case, id=name) for name, case in battery.cases()])
def test_battery(name, case):
    torch.set_num_threads(2)
    check(case, fused)


def test_the_reference_on_the_battery():
    with fusedloss.backend("reference"):
        assert list(battery.failures(eager=True)) == []


def parity(input, target, weight=None, rtol=1e-5, atol=1e-7, **options):
    """torch's value and gradient, NaN and infinities included; returns both of ours."""
    ours, theirs = (input.detach().clone().requires_grad_() for _ in range(2))
    expected = F.cross_entropy(theirs, target.long() if target.dtype == torch.int32 else target, weight, **options)
    found = fusedloss.cross_entropy(ours, target, weight, **options)
    upstream = torch.ones_like(expected)
    expected.backward(upstream)
    found.backward(upstream)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=rtol, atol=atol, equal_nan=True)
    return found.detach(), ours.grad


REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


class TestParityWithTorch:
    @REDUCTIONS
    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
    @pytest.mark.parametrize("shape", [(7,), (5, 7), (4, 7, 3), (2, 7, 3, 2), (2, 7, 2, 1, 2), (5, 1), (1, 1)])
    def test_shapes(self, backend, shape, smoothing, reduction):
        input = torch.randn(shape)
        rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
        num_classes = shape[1] if len(shape) > 1 else shape[0]
        target = torch.randint(num_classes, rows)
        probabilities = torch.rand(shape)
        weight = torch.rand(num_classes) + 0.1
        for y in (target, probabilities):
            parity(input, y, reduction=reduction, label_smoothing=smoothing)
            parity(input, y, weight, reduction=reduction, label_smoothing=smoothing)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
    def test_label_types(self, backend, dtype):
        parity(torch.randn(5, 7), torch.tensor([0, 6, 3, 2, 2], dtype=dtype), ignore_index=2)

    @REDUCTIONS
    @pytest.mark.parametrize("ignore_index", [-100, 2, 0, 255, -1])
    def test_ignored_rows(self, backend, ignore_index, reduction):
        target = torch.tensor([1, 3, ignore_index, 1, ignore_index])
        for options in ({}, {"label_smoothing": 0.2}):
            parity(
                torch.randn(5, 4),
                target,
                torch.rand(4),
                ignore_index=ignore_index,
                reduction=reduction,
                **options,
            )

    @REDUCTIONS
    def test_all_rows_ignored(self, backend, reduction):
        loss, gradient = parity(torch.randn(3, 4), torch.full((3,), -100), reduction=reduction)
        assert torch.isnan(loss).all() if reduction == "mean" else (loss == 0).all()
        assert (gradient == 0).all()

    @REDUCTIONS
    @pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (2, 4, 0)])
    def test_no_rows(self, backend, shape, reduction):
        for target in (torch.zeros(shape[:1] + shape[2:], dtype=torch.int64), torch.zeros(shape)):
            parity(torch.randn(shape), target, reduction=reduction)
            weight = torch.ones(shape[:1] + shape[2:])
            found = fusedloss.cross_entropy(torch.randn(shape), target, sample_weight=weight, reduction=reduction)
            assert torch.isnan(found).all() if reduction == "mean" else (found == 0).all()

    def test_one_class(self, backend):
        loss, gradient = parity(torch.randn(3, 1), torch.zeros(3, dtype=torch.int64), label_smoothing=0.1)
        assert loss == 0
        assert (gradient == 0).all()

    def test_weight_zero_for_the_only_class_present(self, backend):
        loss, _ = parity(torch.randn(3, 2), torch.ones(3, dtype=torch.int64), torch.tensor([1.0, 0.0]))
        assert torch.isnan(loss)

    def test_weighted_probabilities_divide_by_rows(self, backend):
        input, target = torch.randn(5, 4), torch.randint(4, (5,))
        one_hot, weight = F.one_hot(target, 4).float(), torch.tensor([0.2, 3.0, 1.0, 0.5])
        soft, hard = parity(input, one_hot, weight)[0], parity(input, target, weight)[0]
        torch.testing.assert_close(soft * 5, hard * weight[target].sum())

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_minus_infinity(self, backend, dtype, smoothing):
        for num_classes in (5, 33, 8300):
            input = torch.randn(6, num_classes, dtype=dtype)
            target = torch.full((6,), num_classes - 2)
            input[0, 0] = -INF  # another class
            input[1, : num_classes // 2] = -INF  # the first block
            input[2, target[2]] = -INF  # the label
            input[3] = -INF  # the whole row
            input[4, torch.arange(num_classes) != target[4]] = -INF  # all but the label
            for rows in ([0], [1], [2], [3], [4], [5], list(range(6))):
                for reduction in ("none", "sum"):
                    parity(input[rows], target[rows], label_smoothing=smoothing, reduction=reduction)

    @pytest.mark.parametrize("value", [NAN, INF])
    @pytest.mark.parametrize("num_classes", [5, 8300])
    def test_a_bad_logit_poisons_its_row_alone(self, backend, value, num_classes):
        target = torch.tensor([1, 2, 3])
        for column in (0, 2, num_classes - 1):
            input = torch.randn(3, num_classes)
            input[1, column] = value
            rows, gradient = parity(input, target, reduction="none")
            assert torch.isnan(rows[1]) or torch.isinf(rows[1])
            assert torch.isfinite(rows[[0, 2]]).all()
            assert torch.isfinite(gradient[[0, 2]]).all()
            _, gradient = parity(input, target)
            assert torch.isfinite(gradient[[0, 2]]).all()
            assert torch.isnan(gradient[1]).any()

    def test_large_logits_are_exact(self, backend):
        loss, gradient = parity(torch.tensor([[1e4, -1e4]]), torch.tensor([1]))
        assert loss == 20000
        assert gradient.tolist() == [[1.0, -1.0]]
        half = torch.tensor([[6e4, -6e4]], dtype=torch.float16)
        loss = fusedloss.cross_entropy(half, torch.tensor([1]))
        assert loss.dtype == torch.float32
        assert loss == 2 * float(half[0, 0])

    def test_a_random_input_of_every_option(self, backend):
        for seed in range(20):
            torch.manual_seed(seed)
            shape = (int(torch.randint(1, 9, ())), int(torch.randint(1, 300, ())))
            options = {"label_smoothing": 0.3 * (seed % 2), "reduction": ("mean", "sum", "none")[seed % 3]}
            parity(
                5 * torch.randn(shape),
                torch.randint(shape[1], shape[:1]),
                torch.rand(shape[1]) + 0.1,
                **options,
            )


class TestPrecision:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("soft", [False, True])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_a_common_offset_in_float32(self, backend, soft, smoothing, reduction):
        case = random_case(5, 100, soft=soft, label_smoothing=smoothing, reduction=reduction, ignored=0.0)
        check(replace(case, input=case.input + 2.0**24), fused)

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("soft", [False, True])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_a_common_offset_in_float64(self, backend, soft, smoothing, reduction):
        options = {"label_smoothing": smoothing, "reduction": reduction}
        case = random_case(5, 100, dtype=torch.float64, soft=soft, ignored=0.0, **options)
        check(replace(case, input=case.input + 2.0**24), fused)

    @CPP_ONLY
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("reduction", ["sum", "none"])
    def test_a_confident_row_keeps_the_digits_of_one_minus_p(self, reduction, dtype):
        for label in range(19):
            battery.check_confident_row(label, dtype, reduction)

    @REDUCTIONS
    def test_the_label_of_a_row_that_hardly_counts_it(self, backend, reduction):
        # Its slope is of the size of p_y, far below that of 1 - p_y.
        for num_classes in (300, 4096, 5000):
            case = random_case(3, num_classes, spread=0.1, ignored=0.0, reduction=reduction)
            check(replace(case, label_smoothing=1.0), fused)
            check(replace(case, label_smoothing=torch.tensor([1.0, 0.999, 1.0])), fused)
            weight = torch.ones(num_classes)
            weight[case.target[:2]] = 0
            check(replace(case, label_smoothing=0.1, weight=weight), fused)

    def test_the_gradient_of_log_sum_exp_is_softmax_at_the_label_too(self, backend):
        for num_classes in (10, 300, 5000):
            x = (0.1 * torch.randn(3, num_classes)).requires_grad_()
            target = torch.tensor([0, 5, num_classes - 1])
            _, stats = fusedloss.cross_entropy(x, target, return_stats=True)
            (gradient,) = torch.autograd.grad(stats.log_sum_exp.sum(), x)
            truth = x.detach().double().softmax(1)
            torch.testing.assert_close(gradient.double(), truth, rtol=4e-6, atol=0)

    @CPP_ONLY
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_exponential(self, dtype):
        battery.check_exponential(dtype)

    @CPP_ONLY
    @pytest.mark.skipif(np.finfo(np.longdouble).eps >= np.finfo(np.double).eps, reason="no extended precision")
    @pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
    @pytest.mark.parametrize("smoothing", [0.0, 0.05])
    @pytest.mark.parametrize("num_classes", [40, 4097])
    def test_float64_in_extended_precision(self, num_classes, smoothing, gamma):
        x, label = 20 * torch.randn(1, num_classes, dtype=torch.float64), num_classes // 2
        x.requires_grad_()
        options = {"label_smoothing": smoothing, "focal_gamma": gamma}
        loss = fusedloss.cross_entropy(x, torch.tensor([label]), **options)
        (gradient,) = torch.autograd.grad(loss, x)

        z = x.detach().numpy()[0].astype(np.longdouble)
        e = np.exp(z - z.max())
        p, log_p = e / e.sum(), z - z.max() - np.log(e.sum())
        rest = np.delete(p, label).sum()
        share = np.longdouble(smoothing) / num_classes
        mixed = -(1 - np.longdouble(smoothing)) * log_p[label] - share * log_p.sum()
        slope = p - share
        slope[label] -= 1 - np.longdouble(smoothing)
        focus = rest ** np.longdouble(gamma)
        rest_slope = p[label] * p
        rest_slope[label] = -p[label] * rest
        expected = focus * slope + (gamma * rest ** np.longdouble(gamma - 1) * mixed * rest_slope if gamma else 0)
        assert abs(loss.item() - focus * mixed) <= 4e-16 * abs(focus * mixed)
        assert np.abs(gradient.numpy()[0] - expected).max() <= 8e-16 * np.abs(expected).max()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("num_classes", [262144, 262145])
    def test_rows_whose_exponentials_are_recomputed(self, num_classes, dtype):
        case = random_case(2, num_classes, dtype=dtype, ignored=0.0)
        case.target[1] = num_classes - 1
        check(case, fused)
        if dtype == torch.float32:
            check(everything(case), fused)

    def test_long_transposed_rows(self):
        case = random_case(2, 262145, ignored=0.0)
        check(replace(case, input=case.input.t().contiguous().t(), label_smoothing=0.1), fused)

    def test_temperatures_in_another_dtype_are_not_rounded(self, backend):
        for dtype, other in ((torch.float64, torch.float32), (torch.float32, torch.bfloat16)):
            case = random_case(5, 9, dtype=dtype, ignored=0.0)
            for name in ("temperature", "scale"):
                terms = ((name, (torch.rand(9) + 0.5).to(other)), (name, (torch.rand(9) + 0.5).to(other)))
                check(replace(case, terms=terms, learned=("input", "term0", "term1")), fused)


def layouts():
    """(name, logits (6, 10, ...)) in every layout a caller may have."""
    base = 3 * torch.randn(6, 10)
    yield "transposed", base.t().contiguous().t()
    yield "every second class", (3 * torch.randn(6, 20))[:, ::2]
    yield "every second row", (3 * torch.randn(12, 10))[::2]
    yield "a narrow slice", (3 * torch.randn(6, 33))[:, 7:17]
    yield "one row for all", base[:1].expand(6, 10)
    yield "one class for all", base[:, :1].expand(6, 10)
    yield "one number for all", base[:1, :1].expand(6, 10)
    yield "unaligned", (3 * torch.randn(61))[1:].view(6, 10)
    yield "channels last", (3 * torch.randn(6, 10, 3, 2)).to(memory_format=torch.channels_last)
    yield "classes last of three", (3 * torch.randn(6, 4, 10)).transpose(1, 2)
    yield "a permuted image", (3 * torch.randn(3, 6, 2, 10)).permute(1, 3, 0, 2)
    yield "a sliced image", (3 * torch.randn(6, 10, 4, 5))[:, :, 1:3, ::2]
    yield "overlapping windows", (3 * torch.randn(15)).as_strided((6, 10), (1, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, logits", [pytest.param(name, x, id=name) for name, x in layouts()])
@pytest.mark.parametrize("soft", [False, True])
def test_layouts(name, logits, soft, dtype):
    logits = (
        torch.empty_strided(logits.shape, logits.stride(), dtype=dtype).copy_(logits)
        if _dense(logits)
        else (logits if dtype == torch.float32 else _same_strides(logits, dtype))
    )
    rows = logits.shape[:1] + logits.shape[2:]
    target = torch.rand(logits.shape).to(dtype) if soft else torch.randint(10, rows)
    check(oracle.Case(logits, target), fused)
    check(oracle.Case(logits, target, reduction="none", upstream=torch.randn(rows)), fused)
    check(everything(oracle.Case(logits, target)), fused)


def _dense(tensor):
    return torch.empty_like(tensor).stride() == tensor.stride()


def _same_strides(tensor, dtype):
    """`tensor` in `dtype` with the same strides over storage of its own."""
    storage = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // 4,), (1,), 0).to(dtype)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def test_layouts_of_everything_but_the_logits(backend):
    case = everything(random_case(6, 10, ignored=0.0))
    target = case.target.repeat_interleave(2)[::2]
    weights = torch.stack([case.weight, case.weight], 1)[:, 0]
    terms = tuple((t[0], t[1].repeat_interleave(3)[::3], *t[2:]) for t in case.terms)
    smoothing = case.label_smoothing[:1].expand(6)
    check(replace(case, target=target, weight=weights, terms=terms, label_smoothing=smoothing), fused)
    check(replace(case, target=target[:1].expand(6)), fused)
    soft = random_case(6, 10, soft=True)
    for q in (soft.target.t().contiguous().t(), soft.target[:1].expand(6, 10), torch.rand(6, 20)[:, ::2]):
        check(everything(replace(soft, target=q)), fused)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target_dtype", DTYPES)
def test_probabilities_in_any_dtype(backend, dtype, target_dtype):
    case = random_case(4, 9, dtype=dtype, soft=True)
    q = case.target.to(target_dtype)
    check(replace(case, target=q if dtype == torch.float64 else q.float().to(target_dtype)), fused)


def test_probability_targets_get_a_gradient_when_they_require_one(backend):
    x, q = torch.randn(4, 5, dtype=torch.float64), torch.rand(4, 5, dtype=torch.float64)
    q[0, 0] = 0
    leaves = [(x.clone().requires_grad_(), q.clone().requires_grad_()) for _ in range(2)]
    weight = torch.rand(5, dtype=torch.float64)
    F.cross_entropy(*leaves[0], weight, label_smoothing=0.1).backward()
    fusedloss.cross_entropy(*leaves[1], weight, label_smoothing=0.1).backward()
    for expected, found in zip(*leaves, strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_a_masked_class_without_probability_counts_zero(backend):
    x, q = torch.randn(3, 5), torch.rand(3, 5)
    x[:, 2], q[:, 2] = -INF, 0
    keep = [0, 1, 3, 4]
    full, small = x.clone().requires_grad_(), x[:, keep].clone().requires_grad_()
    for reduction in ("mean", "none"):
        expected = F.cross_entropy(small, q[:, keep], reduction=reduction)
        found = fusedloss.cross_entropy(full, q, reduction=reduction)
        torch.testing.assert_close(found, expected)
        (g,), (e,) = (torch.autograd.grad(v.sum(), leaf) for v, leaf in ((found, full), (expected, small)))
        torch.testing.assert_close(g[:, keep], e)
        assert (g[:, 2] == 0).all()


def test_a_prior_of_zero_gives_its_class_no_probability(backend):
    log_prior = torch.tensor([0.5, 0.5, 0.0]).log().requires_grad_()
    tau = torch.tensor([1.0, 2.0, 0.5], requires_grad=True)
    x = torch.randn(4, 3, requires_grad=True)
    terms = [fusedloss.Prior(log_prior), fusedloss.ClassTemperature(tau)]
    loss = fusedloss.cross_entropy(x, torch.tensor([0, 1, 1, 0]), terms=terms)
    loss.backward()
    small = x.detach()[:, :2].clone().requires_grad_()
    expected = F.cross_entropy((small + log_prior.detach()[:2]) / tau.detach()[:2], torch.tensor([0, 1, 1, 0]))
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(x.grad[:, :2], small.grad)
    assert (x.grad[:, 2] == 0).all()
    assert log_prior.grad[2] == 0
    assert torch.isfinite(tau.grad[:2]).all()


def test_a_masked_logit_leaves_the_gradients_of_temperatures_finite():
    x = torch.randn(4, 5)
    x[:, 3] = -INF
    tau = torch.ones(5, requires_grad=True)
    fusedloss.cross_entropy(x, torch.tensor([0, 1, 2, 4]), terms=[fusedloss.ClassTemperature(tau)]).backward()
    assert torch.isfinite(tau.grad).all()
    assert tau.grad[3] == 0


class TestStatistics:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(7,), (6, 7), (3, 7, 2, 2), (3, 8209)])
    def test_values(self, backend, shape, dtype):
        x = 3 * torch.randn(shape).to(dtype)
        num_classes = shape[1] if len(shape) > 1 else shape[0]
        rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
        y = torch.randint(num_classes, rows)
        tau = torch.rand(num_classes) + 0.5
        _, stats = fusedloss.cross_entropy(x, y, terms=[fusedloss.ClassTemperature(tau)], return_stats=True, z_loss=0.1)
        axis = 1 if len(shape) > 1 else 0
        z = x.double() / tau.double().reshape(-1, *[1] * (len(shape) - 2))
        computing = torch.float64 if dtype == torch.float64 else torch.float32
        rtol = 1e-12 if dtype == torch.float64 and backend == "reference" else 1e-5
        lse, target_logit = z.logsumexp(axis), z.gather(axis, y.unsqueeze(axis)).squeeze(axis)
        confidence, prediction = z.softmax(axis).max(axis)
        expected = (lse, target_logit, prediction, confidence, lse - target_logit + 0.1 * lse**2)
        for field, value in zip(stats, expected, strict=True):
            assert field.shape == rows
            assert field.dtype == (torch.int64 if value.dtype == torch.int64 else computing)
            torch.testing.assert_close(field.double(), value.double(), rtol=rtol, atol=1e-6)

    @REDUCTIONS
    def test_gradients(self, backend, reduction):
        x, tau = torch.randn(6, 7, dtype=torch.float64), torch.rand(7, dtype=torch.float64) + 0.5
        y = torch.tensor([0, 6, -100, 3, 3, -100])
        a, b = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

        def with_stats(x, tau):
            terms = [fusedloss.ClassTemperature(tau)]
            options = {"label_smoothing": 0.1, "focal_gamma": 2.0, "z_loss": 0.1, "reduction": reduction}
            loss, stats = fusedloss.cross_entropy(x, y, terms=terms, return_stats=True, **options)
            return loss.sum() + (a * stats.log_sum_exp + b * stats.target_logit).sum()

        assert torch.autograd.gradcheck(with_stats, (x.requires_grad_(), tau.requires_grad_()))

    def test_ignored_rows(self, backend):
        x, y = torch.randn(4, 5), torch.tensor([1, -100, 2, -100])
        for options in ({}, {"z_loss": 0.3}, {"label_smoothing": 0.2, "focal_gamma": 1.0}):
            rows, stats = fusedloss.cross_entropy(x, y, return_stats=True, reduction="none", **options)
            assert (rows[[1, 3]] == 0).all()
            assert (stats.row_loss[[1, 3]] == 0).all()
            torch.testing.assert_close(stats.log_sum_exp, x.logsumexp(1))
            assert stats.prediction.equal(x.argmax(1))

    def test_row_loss_and_predictions_are_detached(self, backend):
        x = torch.randn(4, 5, requires_grad=True)
        _, stats = fusedloss.cross_entropy(x, torch.tensor([0, 1, 2, 3]), return_stats=True)
        assert stats.log_sum_exp.requires_grad
        assert stats.target_logit.requires_grad
        assert not stats.row_loss.requires_grad
        assert not stats.confidence.requires_grad
        assert not stats.prediction.requires_grad

    @pytest.mark.parametrize("num_classes", [6, 40, 8300])
    def test_predictions_of_ties_and_nan_are_torchs(self, backend, num_classes):
        x = torch.randn(6, num_classes)
        x[0] = 0.0
        x[1, 2], x[1, num_classes - 1] = 50.0, 50.0
        x[2, num_classes - 2] = NAN
        x[3] = -INF
        x[4, : num_classes // 2] = -INF
        _, stats = fusedloss.cross_entropy(x, torch.zeros(6, dtype=torch.int64), return_stats=True)
        assert (
            stats.prediction.tolist()[:3] + stats.prediction.tolist()[4:]
            == x.argmax(1).tolist()[:3] + x.argmax(1).tolist()[4:]
        )

    def test_the_loss_is_the_one_without_statistics(self, backend):
        for reduction in ("mean", "sum", "none"):
            for dtype in DTYPES:
                case = replace(everything(random_case(5, 9, dtype=dtype)), reduction=reduction)
                case.label_smoothing = 0.1
                options = {
                    "label_smoothing": 0.1,
                    "reduction": reduction,
                    "sample_weight": case.sample_weight,
                }
                with_stats, _ = fusedloss.cross_entropy(case.input, case.target, return_stats=True, **options)
                torch.testing.assert_close(with_stats, fusedloss.cross_entropy(case.input, case.target, **options))


class TestInvariance:
    def test_reruns_give_the_same_bits(self, backend):
        torch.set_num_threads(2)
        for reduction in ("mean", "none"):
            case = replace(everything(random_case(300, 257)), reduction=reduction)
            first, second = (oracle.loss_and_gradients(oracle.cast(case, torch.float32), fused) for _ in range(2))
            assert all(first[name].equal(second[name]) for name in first)

    def test_the_number_of_threads_changes_no_row(self, backend):
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            case = everything(random_case(300, 257))
            found.append(oracle.loss_and_gradients(oracle.cast(case, torch.float32), fused))
        rtol = 1e-6 if backend == "cpp" else 1e-4
        for name in found[0]:
            if backend == "cpp" and name in ("loss", "input", "label_smoothing", "sample_weight"):
                assert found[0][name].equal(found[1][name]), name
            else:
                torch.testing.assert_close(found[0][name], found[1][name], rtol=rtol, atol=1e-6)

    def test_the_order_of_rows_and_classes(self, backend):
        case = random_case(20, 70, ignored=0.0, label_smoothing=0.1, reduction="none")
        rows, classes = torch.randperm(20), torch.randperm(70)
        plain = fused(case)
        assert fused(replace(case, input=case.input[rows], target=case.target[rows])).equal(plain[rows])
        moved = replace(case, input=case.input[:, classes], target=classes.argsort()[case.target])
        torch.testing.assert_close(fused(moved), plain, rtol=1e-6, atol=1e-6)

    def test_a_shift_of_the_logits(self, backend):
        case = random_case(20, 70, ignored=0.0, label_smoothing=0.1, reduction="none")
        whole = replace(case, input=(16 * case.input).round())
        assert torch.allclose(fused(replace(whole, input=whole.input + 4096)), fused(whole), rtol=1e-6)


class TestOptions:
    def test_per_row_values_broadcast_over_positions(self, backend):
        case = random_case(3, 5, 4, ignored=0.0)
        for name in ("label_smoothing", "sample_weight"):
            value = torch.rand(3)
            short = fused(replace(case, **{name: value}))
            full = fused(replace(case, **{name: value[:, None].expand(3, 4).contiguous()}))
            assert short.equal(full)
            check(replace(case, learned=("input", name), **{name: value}), fused)

    @REDUCTIONS
    def test_a_row_whose_smoothing_is_zero_still_has_its_slope(self, backend, reduction):
        smoothing = torch.tensor([0.0, 0.1, 0.0, 1.0])
        for soft in (False, True):
            case = random_case(4, 6, soft=soft, label_smoothing=smoothing, reduction=reduction, ignored=0.0)
            check(replace(case, learned=("input", "label_smoothing")), fused)

    @pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
    def test_focal_is_finite_where_a_row_is_certain(self, backend, gamma):
        x = torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        for reduction in ("sum", "none"):
            loss = fusedloss.cross_entropy(x, torch.tensor([0, 0, 0]), focal_gamma=gamma, reduction=reduction)
            (gradient,) = torch.autograd.grad(loss.sum(), x)
            assert torch.isfinite(loss).all()
            assert torch.isfinite(gradient).all()
            assert (gradient[0] == 0).all()
        assert fusedloss.cross_entropy(torch.zeros(1, 1), torch.tensor([0]), focal_gamma=gamma) == 0

    @pytest.mark.parametrize("gamma", [0.5, 1.0, 2.5])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_focal(self, backend, dtype, gamma):
        for reduction in ("mean", "none"):
            check(random_case(7, 40, dtype=dtype, focal_gamma=gamma, reduction=reduction), fused)
            check(
                random_case(7, 40, dtype=dtype, focal_gamma=gamma, label_smoothing=0.1, reduction=reduction),
                fused,
            )

    @pytest.mark.parametrize("poly", [-1.0, 0.5, 3.0])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_poly(self, backend, dtype, poly):
        for num_classes in (7, 40, 300):
            for reduction in ("mean", "none"):
                case = random_case(7, num_classes, dtype=dtype, poly_epsilon=poly, reduction=reduction)
                check(case, fused)
                # Neither the class weight nor focal's factor multiplies it; the penalty's mix does.
                weight = torch.rand(num_classes) + 0.1
                check(replace(case, weight=weight, focal_gamma=2.0, label_smoothing=0.1), fused)
                check(replace(case, penalty=(0.5, "mean", True), penalty_strength=0.3), fused)
        check(random_case(7, 40, dtype=dtype, poly_epsilon=poly, soft=True), fused)

    def test_poly_of_a_certain_and_of_a_hopeless_row(self, backend):
        x = torch.tensor([[200.0, 0.0, 0.0], [-INF, 1.0, 0.0]], requires_grad=True)
        for gamma in (0.0, 0.5):
            options = {"poly_epsilon": 2.0, "focal_gamma": gamma, "reduction": "none"}
            loss = fusedloss.cross_entropy(x[:1], torch.tensor([0]), **options)
            assert loss.tolist() == [0.0]
            (gradient,) = torch.autograd.grad(loss.sum(), x)
            assert (gradient == 0).all()
        loss = fusedloss.cross_entropy(x[1:], torch.tensor([0]), poly_epsilon=2.0, reduction="none")
        assert loss.tolist() == [INF]

    @pytest.mark.parametrize("z_loss", [1e-4, -0.1, 2.0])
    def test_z_loss(self, backend, z_loss):
        for soft in (False, True):
            for reduction in ("mean", "none"):
                check(random_case(7, 40, z_loss=z_loss, soft=soft, reduction=reduction), fused)

    @pytest.mark.parametrize("order", range(6))
    @pytest.mark.parametrize(
        "learned", [("input",), ("term0",), ("term1", "term2"), ("input", "term0", "term1", "term2")]
    )
    def test_terms_in_any_order(self, backend, order, learned):
        kinds = [
            ("temperature", torch.rand(9) + 0.5),
            ("scale", torch.tensor(1.7)),
            ("prior", torch.randn(9), 0.5),
        ]
        terms = tuple(kinds[(order + i * (1 + order // 3)) % 3] for i in range(3))
        check(random_case(5, 9, terms=terms, learned=learned), fused)

    def test_the_same_term_twice_and_floats(self, backend):
        tau = torch.rand(9) + 0.5
        terms = (("temperature", tau), ("temperature", 2.0), ("scale", -0.5), ("prior", torch.randn(9), 0.0))
        check(random_case(5, 9, terms=terms, learned=("input", "term0")), fused)

    def test_sample_weights_divide_the_mean(self, backend):
        case = everything(random_case(6, 9))
        weights = torch.tensor([0.0, 1.0, 2.0, 0.0, 0.5, 3.0])
        for soft in (False, True):
            target = torch.rand(6, 9) if soft else case.target
            check(
                oracle.Case(case.input, target, sample_weight=weights, learned=("input", "sample_weight")),
                fused,
            )

    def test_nothing_learned(self, backend):
        check(replace(everything(random_case(5, 9)), learned=()), fused)

    @pytest.mark.parametrize(
        "learned", [("label_smoothing",), ("sample_weight",), ("term2",), ("input", "sample_weight")]
    )
    @REDUCTIONS
    def test_only_some_learned(self, backend, learned, reduction):
        check(replace(everything(random_case(5, 9)), learned=learned, reduction=reduction), fused)


def streamed_options(name, logits):
    """What the loss is asked for, and the target."""
    rows, num_classes = logits.shape
    labels = torch.randint(num_classes, (rows,))
    # In the vectors at both ends of a row, and in each of their lanes.
    labels[:40], labels[40:80], labels[80:90] = torch.arange(40), num_classes - 1 - torch.arange(40), -100
    weight = torch.rand(num_classes) + 0.5
    if name == "plain":
        return labels, {}
    if name == "probabilities":
        return torch.rand(logits.shape).to(logits.dtype), {"weight": weight, "label_smoothing": 0.1}
    if name == "terms":
        terms = [fusedloss.ClassTemperature(weight), fusedloss.AdditiveMargin(0.2)]
        return labels, {"terms": terms, "focal_gamma": 2.0, "label_smoothing": 0.1}
    return labels, {
        "terms": [fusedloss.SoftCap(3.0)],
        "weight": weight,
        "margin_penalty": fusedloss.MarginPenalty(1.0, 0.1),
    }


@CPP_ONLY
@pytest.mark.parametrize("name", ["plain", "probabilities", "terms", "penalty"])
@pytest.mark.parametrize("num_classes, dtype", [(1003, dtype) for dtype in DTYPES] + [(70_001, torch.float32)])
def test_gradients_beyond_the_caches(name, num_classes, dtype):
    """They are written past the caches, by whole cache lines: the same bits as those of fewer rows."""
    rows = (33 << 20) // (num_classes * dtype.itemsize)
    logits = (3 * torch.randn(rows, num_classes)).to(dtype).requires_grad_()
    target, options = streamed_options(name, logits)

    def gradient(part):
        return torch.autograd.grad(
            fusedloss.cross_entropy(logits[part], target[part], reduction="sum", **options), logits
        )[0][part]

    everywhere = gradient(slice(0, rows))
    for first in range(0, rows, rows // 3):
        part = slice(first, first + rows // 3)
        assert torch.equal(everywhere[part], gradient(part))
