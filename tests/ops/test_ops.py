"""Losses on logits under torch: torch.compile, export, autograd, modes and autocast."""

import itertools

import pytest
import torch

import fusedloss
from fusedloss.backends.cpp import unavailable_reason

needs_kernels = pytest.mark.skipif(unavailable_reason("cpu") is not None, reason="no compiled module")
CPP = pytest.param("cpp", marks=needs_kernels)

# torch's own compiler warns about its own plans, differently in each version.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
]


@pytest.fixture(params=["reference", CPP])
def backend(request):
    with fusedloss.backend(request.param):
        yield request.param


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield torch.compile
    torch._dynamo.reset()


def inputs(rows=6, num_classes=7, inner=(), dtype=torch.float32, learned=()):
    """logits, tau, smoothing, sample weight and labels; those at positions `learned` require gradients."""
    generator = torch.Generator().manual_seed(rows)
    computing = torch.float64 if dtype == torch.float64 else torch.float32
    row_shape = (rows, *inner)
    logits = torch.randn((rows, num_classes, *inner), generator=generator).to(dtype)
    tau = torch.rand(num_classes, generator=generator, dtype=computing) + 0.5
    smoothing = 0.3 * torch.rand(row_shape, generator=generator, dtype=computing)
    sample_weight = torch.rand(row_shape, generator=generator, dtype=computing) + 0.1
    target = torch.randint(num_classes, row_shape, generator=generator)
    tensors = [logits, tau, smoothing, sample_weight]
    for position in learned:
        tensors[position].requires_grad_()
    return (*tensors, target)


def step(logits, tau, smoothing, sample_weight, target):
    """A function of both ways through the operations."""
    terms = [fusedloss.ClassTemperature(tau), fusedloss.Scale(1.5)]
    options = {"label_smoothing": smoothing, "sample_weight": sample_weight, "terms": terms}
    mean = fusedloss.cross_entropy(logits, target, **options)
    rows = fusedloss.cross_entropy(logits, target, reduction="none", **options)
    return 0.5 * mean + rows.square().sum()


def check_compiled(compiled, function, learned, rows):
    arguments = inputs(rows, learned=learned)
    found, expected = compiled(*arguments), function(*arguments)
    torch.testing.assert_close(found, expected)
    assert found.requires_grad == bool(learned)
    if learned:
        leaves = [arguments[position] for position in learned]
        for ours, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(ours, theirs)


def subsets(positions):
    return [subset for size in range(len(positions) + 1) for subset in itertools.combinations(positions, size)]


def slow_but_the_largest(chosen):
    """The subset with everything in it; the others are for the slow tests."""
    return [pytest.param(one, marks=[] if one == chosen[-1] else pytest.mark.slow) for one in chosen]


@needs_kernels
class TestCompile:
    @pytest.mark.parametrize("learned", slow_but_the_largest(subsets((0, 1, 2))))
    def test_inductor_with_a_dynamic_batch(self, compiler, learned):
        compiled = compiler(step, fullgraph=True, dynamic=True)
        for rows in (5, 9):
            check_compiled(compiled, step, learned, rows)

    @pytest.mark.parametrize("learned", slow_but_the_largest([(*subset, 3) for subset in subsets((0, 1, 2))]))
    def test_traced_with_learned_sample_weights(self, compiler, learned):
        check_compiled(compiler(step, fullgraph=True, dynamic=True, backend="aot_eager"), step, learned, 6)

    @pytest.mark.parametrize(
        "name, call",
        [
            (
                "statistics",
                lambda x, y: fusedloss.cross_entropy(x, y, return_stats=True, z_loss=0.1, focal_gamma=2.0),
            ),
            (
                "probabilities",
                lambda x, y: fusedloss.cross_entropy(x, x.detach().softmax(1), weight=torch.ones(7)),
            ),
            ("half", lambda x, y: fusedloss.cross_entropy(x.half(), y)),
            ("int32 and ignored", lambda x, y: fusedloss.cross_entropy(x, y.int(), ignore_index=2)),
            (
                "a prior made inside",
                lambda x, y: fusedloss.cross_entropy(x, y, terms=[fusedloss.Prior(torch.zeros(7))]),
            ),
            (
                "image",
                lambda x, y: fusedloss.cross_entropy(
                    x[:, :, None, None].expand(-1, -1, 2, 2), y[:, None, None].expand(-1, 2, 2)
                ),
            ),
        ],
    )
    def test_traced_options(self, compiler, name, call):
        logits, *_, target = inputs(learned=(0,))
        found, expected = (
            compiler(call, fullgraph=True, backend="aot_eager")(logits, target),
            call(logits, target),
        )
        torch.testing.assert_close(found, expected)

    def test_a_module_under_no_grad_and_autocast(self, compiler):
        loss = fusedloss.CrossEntropyLoss(terms=[fusedloss.ClassTemperature(torch.nn.Parameter(torch.ones(7)))])
        layer = torch.nn.Linear(7, 7)
        logits, *_, target = inputs()

        def train(x, y):
            return loss(layer(x), y)

        compiled = compiler(train, fullgraph=torch.__version__ >= (2, 15), backend="aot_eager")
        torch.testing.assert_close(compiled(logits, target), train(logits, target))
        with torch.no_grad():
            assert not compiled(logits, target).requires_grad
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, expected = compiled(logits, target), train(logits, target)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)

    def test_export_with_a_dynamic_batch(self):
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(7, 5)
                self.loss = fusedloss.CrossEntropyLoss(label_smoothing=0.1)

            def forward(self, x, y):
                return self.loss(self.layer(x), y)

        model = Model()
        batch = torch.export.Dim("batch", min=2)
        with torch.no_grad():
            program = torch.export.export(
                model, (torch.randn(6, 7), torch.randint(5, (6,))), dynamic_shapes=({0: batch}, {0: batch})
            )
            x, y = torch.randn(9, 7), torch.randint(5, (9,))
            torch.testing.assert_close(program.module()(x, y), model(x, y))


REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


class TestAutograd:
    @REDUCTIONS
    def test_backward_twice(self, backend, reduction):
        arguments = inputs(learned=(0, 1, 2, 3))
        loss = _loss(*arguments, reduction=reduction).sum()
        first = torch.autograd.grad(loss * 3, arguments[:4], retain_graph=True)
        second = torch.autograd.grad(loss, arguments[:4], retain_graph=True)
        third = torch.autograd.grad(loss, arguments[:4])
        for a, b, c in zip(first, second, third, strict=True):
            torch.testing.assert_close(a, 3 * b)
            assert b.equal(c)

    @REDUCTIONS
    def test_accumulating_into_the_same_gradient(self, backend, reduction):
        logits, tau, smoothing, weight, target = inputs(learned=(0,))
        loss = _loss(logits, tau, smoothing, weight, target, reduction=reduction).sum()
        loss.backward(retain_graph=True)
        once = logits.grad.clone()
        loss.backward()
        torch.testing.assert_close(logits.grad, 2 * once)

    @REDUCTIONS
    @pytest.mark.parametrize("position", [0, 1, 2, 3, 4])
    def test_an_input_changed_in_place_is_an_error_or_was_copied(self, backend, reduction, position):
        logits, tau, smoothing, weight, target = inputs(learned=(0,))
        # A leaf that requires a gradient can't be changed in place: what the loss sees is computed from it.
        tensors = [logits * 1, tau, smoothing, weight, target]
        leaves = [logits]
        if 0 < position < 4:
            leaves.append(tensors[position].requires_grad_())
            tensors[position] = tensors[position] * 1
        expected = torch.autograd.grad(_loss(*tensors, reduction=reduction).sum(), leaves, retain_graph=True)
        loss = _loss(*tensors, reduction=reduction).sum()
        with torch.no_grad():
            tensors[position][0] += 1
        try:
            found = torch.autograd.grad(loss, leaves)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            read_again = backend == "cpp" and reduction == "none" and position in (0, 4)
            assert not read_again, "the kernels read these again"
            assert all(a.equal(b) for a, b in zip(found, expected, strict=True))

    @REDUCTIONS
    def test_two_live_losses_on_one_tensor(self, backend, reduction):
        arguments = inputs(learned=(0, 1))
        other = (*arguments[:4], (arguments[4] + 1) % 7)
        expected = [
            torch.autograd.grad(_loss(*each, reduction=reduction).sum(), each[:2]) for each in (arguments, other)
        ]
        one, two = (_loss(*each, reduction=reduction).sum() for each in (arguments, other))
        assert all(a.equal(b) for a, b in zip(torch.autograd.grad(two, other[:2]), expected[1], strict=True))
        assert all(a.equal(b) for a, b in zip(torch.autograd.grad(one, arguments[:2]), expected[0], strict=True))

    @needs_kernels
    @REDUCTIONS
    def test_double_backward_is_a_clear_error(self, reduction):
        arguments = inputs(learned=(0,))
        loss = _loss(*arguments, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(loss, arguments[0], create_graph=True)
        for penalised in (gradient.square().sum(), loss + gradient.square().sum()):
            with pytest.raises(RuntimeError, match=r"differentiable once; .*backend\('reference'\)"):
                torch.autograd.grad(penalised, arguments[0], retain_graph=True)
        # The first derivative is none the worse for being asked for with a graph.
        torch.testing.assert_close(gradient, torch.autograd.grad(loss, arguments[0])[0])

    def test_the_reference_is_differentiable_twice(self):
        logits, *_, target = inputs(dtype=torch.float64, learned=(0,))
        with fusedloss.backend("reference"):
            assert torch.autograd.gradgradcheck(lambda x: fusedloss.cross_entropy(x, target), (logits,))

    @REDUCTIONS
    @pytest.mark.parametrize("kind", ["scaled", "zero", "expanded", "negative", "strided"])
    def test_upstream_gradients(self, backend, reduction, kind):
        arguments = inputs(6, inner=(2,), dtype=torch.float64, learned=(0, 1, 2, 3))
        loss = _loss(*arguments, reduction=reduction)
        shape = loss.shape
        upstream = {
            "scaled": torch.full(shape, 0.25, dtype=loss.dtype),
            "zero": torch.zeros(shape, dtype=loss.dtype),
            "expanded": torch.tensor(0.7, dtype=loss.dtype).expand(shape),
            "negative": -torch.rand(shape, dtype=loss.dtype),
            "strided": torch.rand((*shape, 2), dtype=loss.dtype)[..., 0],
        }[kind]
        found = torch.autograd.grad(loss, arguments[:4], upstream)
        with fusedloss.backend("reference"):
            expected = torch.autograd.grad(_loss(*arguments, reduction=reduction), arguments[:4], upstream)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)

    @REDUCTIONS
    @pytest.mark.parametrize("learned", subsets((0, 1, 2, 3)))
    def test_only_what_requires_a_gradient_gets_one(self, backend, reduction, learned):
        arguments = inputs(learned=learned)
        loss = _loss(*arguments, reduction=reduction).sum()
        assert loss.requires_grad == bool(learned)
        if not learned:
            return
        loss.backward()
        for position in range(4):
            assert (arguments[position].grad is not None) == (position in learned)

    def test_a_gradient_asked_for_one_of_several(self, backend):
        arguments = inputs(learned=(0, 1, 2, 3))
        everything = torch.autograd.grad(_loss(*arguments), arguments[:4])
        for position in range(4):
            (alone,) = torch.autograd.grad(_loss(*arguments), arguments[position])
            assert alone.equal(everything[position])

    @needs_kernels
    def test_gradients_survive_the_loss_and_are_not_shared(self):
        logits, *_, target = inputs(learned=(0,))
        loss = fusedloss.cross_entropy(logits, target)
        (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
        kept = first.clone()
        first.zero_()
        (second,) = torch.autograd.grad(loss, logits)
        assert second.equal(kept)


def _loss(logits, tau, smoothing, sample_weight, target, reduction="mean"):
    terms = [fusedloss.ClassTemperature(tau)]
    return fusedloss.cross_entropy(
        logits,
        target,
        reduction=reduction,
        label_smoothing=smoothing,
        sample_weight=sample_weight,
        terms=terms,
    )


class TestModes:
    @needs_kernels
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    @REDUCTIONS
    def test_without_gradients_none_is_computed(self, monkeypatch, mode, reduction):
        from fusedloss.backends.cpp import softmax_ce

        masks, new_grads = [], softmax_ce._new_grads

        def recorded(logits, view, mask, *arguments):
            masks.append(mask)
            return new_grads(logits, view, mask, *arguments)

        monkeypatch.setattr(softmax_ce, "_new_grads", recorded)
        arguments = inputs(learned=(0, 1, 2, 3))
        with mode():
            loss = _loss(*arguments, reduction=reduction)
            statistics = fusedloss.cross_entropy(arguments[0], arguments[4], return_stats=True)[1]
        assert not loss.requires_grad
        assert not statistics.log_sum_exp.requires_grad
        assert len(masks) == (reduction != "none")
        assert not any(map(any, masks))

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_inputs_made_in_inference_mode(self, backend, reduction):
        with torch.inference_mode():
            arguments = inputs()
        assert torch.isfinite(_loss(*arguments, reduction=reduction)).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_autocast_changes_nothing(self, backend, dtype, reduction):
        for logits_dtype in (torch.float32, dtype):
            arguments = inputs(dtype=logits_dtype, learned=(0, 1))
            outside = _loss(*arguments, reduction=reduction)
            with torch.autocast("cpu", dtype=dtype):
                inside = _loss(*arguments, reduction=reduction)
                gradients = torch.autograd.grad(inside.sum(), arguments[:2])
            assert inside.dtype == torch.float32
            assert inside.equal(outside)
            for ours, theirs in zip(gradients, torch.autograd.grad(outside.sum(), arguments[:2]), strict=True):
                assert ours.dtype == theirs.dtype
                assert ours.equal(theirs)

    @needs_kernels
    def test_a_scaled_float16_gradient_does_not_underflow(self):
        logits = torch.zeros(4096, 8, dtype=torch.float16, requires_grad=True)
        target = torch.zeros(4096, dtype=torch.int64)
        (gradient,) = torch.autograd.grad(fusedloss.cross_entropy(logits, target) * 65536.0, logits)
        assert float(gradient[0, 0]) == pytest.approx(-65536 * 0.875 / 4096, rel=1e-3)
        # Without a scale the same gradient is 2.1e-4 and 3e-5: the second is a subnormal half.
        (gradient,) = torch.autograd.grad(fusedloss.cross_entropy(logits, target) * 2.0**-10, logits)
        assert float(gradient[0, 0]) == pytest.approx(-(2.0**-10) * 0.875 / 4096, abs=6e-8)

    def test_functional_transforms_are_answered_by_the_formulas(self):
        logits, *_, target = inputs(dtype=torch.float64)

        def loss(x):
            return fusedloss.cross_entropy(x, target)

        expected = torch.nn.functional.cross_entropy
        torch.testing.assert_close(
            torch.func.grad(loss)(logits), torch.func.grad(lambda x: expected(x, target))(logits)
        )
        each = torch.func.vmap(torch.func.grad(lambda x, y: fusedloss.cross_entropy(x, y)))(logits, target)
        torch.testing.assert_close(each, torch.func.vmap(torch.func.grad(lambda x, y: expected(x, y)))(logits, target))
