"""linear_cross_entropy against float64: every option, every chunking, each subset of gradients, and refusals."""

import itertools
from dataclasses import replace

import pytest
import torch
from linear_cases import COSINES, OPTIONS, check, fused, gradients, in_dtype, ramp, random_head, truth
from oracle import Case

import fusedloss
from fusedloss.backends.chunked import head as chunked_head
from fusedloss.backends.chunked import panels, products

BACKENDS = ("cpp", "reference")
REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fusedloss.backend(request.param):
        yield request.param


@pytest.fixture
def small_chunks(monkeypatch):
    """Two to four rows of logits at a time, and a few classes."""
    monkeypatch.setattr(chunked_head, "_CHUNK_BYTES", 4 * 23 * 4)
    small_panels(monkeypatch, 5)
    monkeypatch.setattr(products, "_ADDED_AT_ONCE", 7 * 5)


def small_panels(monkeypatch, classes):
    monkeypatch.setattr(panels, "_PANEL_CLASSES", classes)
    monkeypatch.setattr(panels, "_GROUP_BYTES", 2 * 23 * 4)
    monkeypatch.setattr(panels, "_GROUP_BYTES_WITH_SUMS", 3 * 23 * 4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_linear_logits(backend, small_chunks, poisoned_memory, name, reduction, bias):
    for width in (7, 10):  # fewer features than rows, and more
        check(random_head(width=width, bias=bias, reduction=reduction, **OPTIONS[name]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", COSINES)
def test_cosine_logits(backend, small_chunks, poisoned_memory, name, reduction):
    for width in (7, 10):
        check(random_head(width=width, normalize=True, reduction=reduction, **COSINES[name]))


@pytest.mark.parametrize("name", ["plain", "weight and smoothing", "temperature"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_probability_targets(backend, small_chunks, name, reduction):
    for width in (7, 10):
        check(random_head(width=width, soft=True, reduction=reduction, **OPTIONS[name]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_data_types(backend, small_chunks, dtype, normalize, reduction):
    options = COSINES["angular"] if normalize else OPTIONS["smoothing"]
    check(random_head(dtype=dtype, normalize=normalize, reduction=reduction, **options))


@pytest.mark.parametrize("width", [7, 33, 40])
@pytest.mark.parametrize("panel", [1, 5, 23, 1024])
def test_one_chunk_and_many_agree(monkeypatch, poisoned_memory, panel, width):
    # Panels hold as many rows as features are wide.
    head = random_head(rows=33, width=width, normalize=True, **COSINES["angular"])
    whole = check(head)
    small_panels(monkeypatch, panel)
    for rows in (1, 2, 5, 32):
        monkeypatch.setattr(chunked_head, "_CHUNK_BYTES", 4 * 23 * rows)
        for name, tensor in check(head).items():
            torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("normalize", [False, True])
def test_each_subset_of_gradients(backend, small_chunks, normalize, reduction):
    options = COSINES["angular"] if normalize else OPTIONS["temperature"]
    head = random_head(width=10, normalize=normalize, bias=not normalize, reduction=reduction, **options)
    for count in range(4):
        for learned in itertools.combinations(("x", "w", "b"), count):
            for terms in ((), options["learned"]):
                check(replace(head, learned=learned, case=replace(head.case, learned=terms)))


def test_a_frozen_weight_forms_no_gradient(monkeypatch):
    products = []
    for name in ("mm", "addmm"):
        product = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _p=product, **k: products.append(1) or _p(*a, **k))
    expected = {("x", "w"): 3, ("x",): 2, ("w",): 2, (): 1}
    with fusedloss.backend("cpp"):
        for learned, count in expected.items():
            products.clear()
            fused(in_dtype(replace(random_head(), learned=learned), torch.float32))
            assert len(products) == count, learned


@pytest.mark.parametrize("upstream", [0.25, -3.0, 0.0])
def test_upstream_gradients(backend, upstream):
    check(random_head(upstream=upstream))
    check(random_head(reduction="none", upstream=upstream * ramp(0.5, 2.0, 9)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice(backend, reduction):
    head = in_dtype(random_head(normalize=True, reduction=reduction, **COSINES["angular"]), torch.float32)
    loss = fused(head).sum()
    first = torch.autograd.grad(loss * 3, (head.x, head.w), retain_graph=True)
    second = torch.autograd.grad(loss, (head.x, head.w), retain_graph=True)
    third = torch.autograd.grad(loss, (head.x, head.w))
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(a, 3 * b)
        assert b.equal(c)


def test_double_backward_is_an_error():
    head = in_dtype(random_head(), torch.float32)
    (gradient,) = torch.autograd.grad(fused(head), head.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", ["angular", "combined"])
def test_gradcheck(small_chunks, name):
    head = in_dtype(random_head(rows=5, num_classes=23, normalize=True, **COSINES[name]), torch.float64)

    def loss(x, w):
        return fused(replace(head, x=x, w=w))

    assert torch.autograd.gradcheck(loss, (head.x, head.w))


def test_statistics(backend, small_chunks):
    head = in_dtype(random_head(normalize=True, **COSINES["angular"]), torch.float32)
    loss, found = fused(head, return_stats=True)
    cosine = torch.nn.functional.linear(*(torch.nn.functional.normalize(rows) for rows in (head.x, head.w)))
    torch.testing.assert_close(found.prediction, cosine.argmax(1))
    torch.testing.assert_close(found.confidence, (8 * cosine).softmax(1).amax(1))
    torch.testing.assert_close(loss, fused(head))
    torch.autograd.grad(found.log_sum_exp.sum(), (head.x, head.w))


@pytest.mark.parametrize("shape", [(0, 5, 3), (1, 1, 1), (3, 1, 4), (4, 5, 0)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_edge_shapes(backend, shape, reduction):
    rows, num_classes, width = shape
    head = random_head(rows, num_classes, width, ignored=0.0, reduction=reduction)
    head.case = Case(torch.zeros(rows, num_classes), torch.zeros(rows, dtype=torch.int64), reduction=reduction,
                     learned=())  # fmt: skip
    check(head)


def test_means_over_nothing(backend):
    ignored = random_head(ignored=2.0)
    ignored.case.target[:] = -100
    empty = random_head(0)
    for each in (ignored, empty, replace(empty, case=replace(empty.case, sample_weight=torch.ones(0)))):
        leaves = in_dtype(each, torch.float32)
        assert torch.isnan(fused(leaves))
    assert float(gradients(in_dtype(replace(ignored, case=replace(ignored.case, reduction="sum")), torch.float32),
                           fused)["w"].abs().sum()) == 0  # fmt: skip


def test_one_row(backend):
    head = in_dtype(random_head(), torch.float32)
    expected = fused(replace(head, case=replace(head.case, reduction="none")))[0]
    torch.testing.assert_close(fusedloss.linear_cross_entropy(head.x[0], head.w, head.case.target[0]), expected)


def test_layouts(backend, small_chunks):
    head = random_head()
    expected = check(head)
    wide = torch.full((23, 14), torch.nan)
    wide[:, ::2] = head.w
    strided = replace(head, w=wide[:, ::2], x=head.x.t().contiguous().t())
    x, w = strided.x.requires_grad_(), strided.w.requires_grad_()
    for ours, theirs in zip(torch.autograd.grad(fused(strided), (x, w)), (expected["x"], expected["w"]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_mixed_types_and_autocast(backend):
    head = in_dtype(random_head(normalize=True, **COSINES["angular"]), torch.float32)
    expected = gradients(head, fused)
    rounded = replace(head, x=head.x.detach().bfloat16().requires_grad_())
    found = gradients(rounded, fused)
    assert (found["x"].dtype, found["w"].dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found["w"], expected["w"], rtol=0.05, atol=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(head, fused)
    assert found["loss"].dtype == found["w"].dtype == found["x"].dtype == torch.float32
    torch.testing.assert_close(found["w"], expected["w"], rtol=0.05, atol=0.03)


def test_reruns_are_bitwise_equal():
    head = in_dtype(random_head(rows=64, num_classes=301, width=33, normalize=True), torch.float32)
    head.case = replace(head.case, target=torch.randint(301, (64,)) // 4, terms=COSINES["angular"]["terms"])
    first, second = gradients(head, fused), gradients(head, fused)
    assert all(first[name].equal(second[name]) for name in first)


class TestCompile:
    @pytest.mark.parametrize("normalize", [False, True])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_fullgraph(self, normalize, reduction):
        torch.compiler.reset()
        options = COSINES["angular"] if normalize else OPTIONS["smoothing"]
        head = in_dtype(random_head(normalize=normalize, reduction=reduction, **options), torch.float32)

        def loss(x, w):
            return fused(replace(head, x=x, w=w))

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        ours, theirs = compiled(head.x, head.w), loss(head.x, head.w)
        torch.testing.assert_close(ours, theirs)
        for a, b in zip(
            torch.autograd.grad(ours.sum(), (head.x, head.w)),
            torch.autograd.grad(theirs.sum(), (head.x, head.w)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


class TestSampledClasses:
    def test_value_and_gradient_are_those_of_the_classes_kept(self, backend):
        head = in_dtype(random_head(num_classes=50, normalize=True, ignored=0.3), torch.float32)
        options = {"terms": [fusedloss.AngularMargin(torch.linspace(0.1, 0.5, 50)), fusedloss.Scale(8.0)]}
        torch.manual_seed(3)
        loss = fusedloss.linear_cross_entropy(
            head.x, head.w, head.case.target, normalize=True, sample_rate=0.4, **options
        )
        found = torch.autograd.grad(loss, (head.x, head.w))
        kept = found[1].abs().sum(1) > 0
        assert int(kept.sum()) == 20
        classes = kept.nonzero().flatten()
        place = torch.full((50,), -100).scatter(0, classes, torch.arange(20))
        target = torch.where(head.case.target == -100, -100, place[head.case.target.clamp(min=0)])
        assert (target >= 0).sum() == (head.case.target >= 0).sum()
        terms = [fusedloss.AngularMargin(torch.linspace(0.1, 0.5, 50)[classes]), fusedloss.Scale(8.0)]
        expected = fusedloss.linear_cross_entropy(head.x, head.w[classes], target, normalize=True, terms=terms)
        torch.testing.assert_close(loss, expected)
        for ours, theirs in zip(found, torch.autograd.grad(expected, (head.x, head.w)), strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_seeded(self):
        head = random_head(num_classes=50)
        losses = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            losses.append(float(fused(head, sample_rate=0.5)))
        assert losses[0] == losses[1] != losses[2]

    def test_all_classes_is_no_sampling(self):
        head = random_head()
        torch.testing.assert_close(fused(head, sample_rate=1.0), fused(head))

    def test_predictions_name_classes(self):
        head = random_head(rows=2, num_classes=50)
        _, found = fused(head, sample_rate=0.2, return_stats=True)
        assert (found.prediction < 50).all()
        torch.testing.assert_close(
            fused(head, sample_rate=1.0, return_stats=True)[1].prediction, (head.x @ head.w.t()).argmax(1)
        )

    def test_refusals(self):
        head = random_head()
        for rate in (0.0, -1.0, 1.5, float("nan")):
            with pytest.raises(ValueError, match=r"sample_rate must be in \(0, 1\]"):
                fused(head, sample_rate=rate)
        with pytest.raises(ValueError, match="must leave a negative class"):
            fusedloss.linear_cross_entropy(torch.ones(1, 2), torch.ones(9, 2), torch.tensor([0]), sample_rate=0.1)
        with pytest.raises(ValueError, match="must hold labels with sample_rate"):
            fused(random_head(soft=True), sample_rate=0.5)


class TestRefusals:
    def test_shapes_types_and_labels(self, backend):
        x, w, y = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 4])
        loss = fusedloss.linear_cross_entropy
        wrong = [
            (ValueError, r"input must have shape \(B, D\)", (x[None], w, y), {}),
            (ValueError, r"linear_weight must have shape \(K, D\)", (x, w[0], y), {}),
            (ValueError, "linear_weight must have as many columns as input, 3", (x, w[:, :2], y), {}),
            (ValueError, "at least one class", (x, w[:0], y), {}),
            (ValueError, r"linear_bias must have shape \(5,\)", (x, w, y), {"linear_bias": torch.zeros(4)}),
            (TypeError, "linear_bias must be a floating-point", (x, w, y), {"linear_bias": y}),
            (TypeError, "input must be float32", (x.long(), w, y), {}),
            (TypeError, "linear_weight must be a tensor", (x, [1], y), {}),
            (ValueError, r"target must have shape \(4,\)", (x, w, y[:3]), {}),
            (ValueError, "reduction must be 'mean', 'sum' or 'none'; got 'max'", (x, w, y), {"reduction": "max"}),
            (IndexError, r"target must lie in \[0, 5\) .*; got label 5 at row 3", (x, w, y + 1), {}),
            (IndexError, "target must lie in .*; got label -1 at row 0", (x, w, y - 1), {"normalize": True}),
            (
                IndexError,
                "target must lie in .*; got label 5",
                (x, w, y + 1),
                {"terms": [fusedloss.AdditiveMargin(0.1)]},
            ),
            (ValueError, "must hold cosines", (9 * x, w, y), {"terms": [fusedloss.AngularMargin(0.1)]}),
        ]
        for error, match, arguments, keywords in wrong:
            with pytest.raises(error, match=match):
                loss(*arguments, **keywords)


def test_the_truth_here_is_torch():
    head = in_dtype(random_head(bias=True), torch.float64)
    expected = torch.nn.functional.linear_cross_entropy(head.x, head.w, head.case.target, linear_bias=head.b)
    torch.testing.assert_close(truth(head), expected)


class TestUnitRows:
    """Class rows are divided by their lengths before anything is rounded to 16 bits."""

    def test_float16_rows_longer_than_float16_reaches(self, backend):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4, 8192, generator=generator).half()
        w = (1000 * torch.randn(5, 8192, generator=generator)).half()
        assert float(w.double().norm(dim=1).min()) > 65504
        y = torch.tensor([0, 1, 2, 4])
        terms = [fusedloss.AngularMargin(0.3), fusedloss.Scale(16.0)]
        found = fusedloss.linear_cross_entropy(x, w, y, normalize=True, terms=terms)
        expected = fusedloss.linear_cross_entropy(x.double(), w.double(), y, normalize=True, terms=terms)
        torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=0)
        logits = fusedloss.margin_logits(x, w)
        torch.testing.assert_close(logits.double(), fusedloss.margin_logits(x.double(), w.double()), rtol=0, atol=2e-2)
        assert float(logits.abs().min()) > 0

    def test_bfloat16_weights_with_float32_features_keep_their_digits(self, backend):
        generator = torch.Generator().manual_seed(0)
        x, w = torch.randn(6, 64, generator=generator), torch.randn(5, 64, generator=generator).bfloat16()
        y = torch.tensor([0, 1, 2, 3, 4, 0])
        terms = [fusedloss.Scale(16.0)]
        found = fusedloss.linear_cross_entropy(x, w, y, normalize=True, terms=terms)
        expected = fusedloss.linear_cross_entropy(x.double(), w.double(), y, normalize=True, terms=terms)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
