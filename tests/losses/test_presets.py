"""The named losses and the rows over statistics, against their formulas written out in float64 and each other."""

import copy
import inspect
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import fusedloss
from fusedloss import Prior, Scale, backends
from fusedloss.longtail import ldam_margins, log_prior
from fusedloss.losses.cross_entropy import CrossEntropyKeywords

COUNTS = torch.tensor([400, 100, 40, 10, 1])


def batch(rows=12, classes=5, *inner, dtype=torch.float64, spread=2.0, ignored=True):
    logits = (spread * torch.randn(rows, classes, *inner, dtype=torch.float64)).to(dtype).requires_grad_()
    labels = torch.randint(classes, (rows, *inner))
    if ignored:
        labels[0] = -100
    return logits, labels


def agrees(loss, logits, labels, formula, weight=None, rtol=1e-6):
    """Value and gradient of a module against per-row values `formula(z, y)` of the kept rows, all reductions."""
    for reduction in ("mean", "sum", "none"):
        loss.reduction = reduction
        z = logits.detach().double().requires_grad_()
        rows = z.movedim(1, -1).reshape(-1, z.shape[1])
        flat = labels.reshape(-1)
        kept = flat != loss.ignore_index
        share = torch.ones(len(flat), dtype=torch.float64) if weight is None else weight.double()[flat.clamp(min=0)]
        values = torch.zeros(len(flat), dtype=torch.float64)
        values[kept] = formula(rows[kept], flat[kept])
        values = values * share * kept
        expected = values.reshape(labels.shape)
        if reduction != "none":
            expected = expected.sum() / (1 if reduction == "sum" else (share * kept).sum())
        upstream = torch.randn(expected.shape, dtype=torch.float64)
        found = loss(logits, labels)
        (gradient,) = torch.autograd.grad(found, logits, upstream.to(found.dtype))
        (truth,) = torch.autograd.grad(expected, z, upstream)
        atol = rtol * float(truth.abs().max())
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol)
        torch.testing.assert_close(gradient.double(), truth, rtol=rtol, atol=atol)


def log_p_of(z, y):
    return z.log_softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)


class TestPresets:
    """Each preset is a few words over CrossEntropyLoss: the formula, the state, and the options that it passes on."""

    def test_focal(self):
        def formula(z, y):
            log_p = log_p_of(z, y)
            return -((1 - log_p.exp()) ** 3.0) * log_p

        agrees(fusedloss.FocalLoss(3.0), *batch(), formula)
        weight = torch.rand(5, dtype=torch.float64)
        agrees(fusedloss.FocalLoss(3.0, weight=weight), *batch(4, 5, 3), formula, weight)
        assert fusedloss.FocalLoss().focal_gamma == 2.0
        logits, labels = batch()
        torch.testing.assert_close(fusedloss.FocalLoss(0.0)(logits, labels), F.cross_entropy(logits, labels))

    @pytest.mark.parametrize("strength", [1.0, 0.5])
    def test_balanced_softmax(self, strength):
        prior = (COUNTS.double() / COUNTS.sum()).log()
        loss = fusedloss.BalancedSoftmaxLoss(COUNTS, strength)
        agrees(loss, *batch(), lambda z, y: -log_p_of(z + strength * prior, y))
        assert list(loss.state_dict()) == ["terms.0.log_prior"]

    def test_balanced_softmax_of_counts_is_that_of_frequencies(self):
        logits, labels = batch()
        counts_added = F.cross_entropy(logits + COUNTS.double().log(), labels)
        torch.testing.assert_close(fusedloss.BalancedSoftmaxLoss(COUNTS)(logits, labels), counts_added)

    def test_balanced_softmax_and_classes_without_samples(self):
        counts = torch.tensor([10, 0, 5, 0, 1])
        logits, labels = batch()
        labels = torch.tensor([0, 2, 4]).repeat(4)
        smooth = fusedloss.BalancedSoftmaxLoss(counts, label_smoothing=0.1)(logits, labels)
        assert torch.isfinite(smooth)
        published = fusedloss.BalancedSoftmaxLoss(counts, floor=0.0)(logits, labels)
        (gradient,) = torch.autograd.grad(published, logits)
        assert torch.isfinite(published) and (gradient[:, [1, 3]] == 0).all() and torch.isfinite(gradient).all()
        expected = F.cross_entropy(logits[:, [0, 2, 4]] + counts[[0, 2, 4]].double().log(), labels // 2)
        torch.testing.assert_close(published, expected)

    def test_further_terms_come_before_the_prior(self):
        logits, labels = batch()
        loss = fusedloss.BalancedSoftmaxLoss(COUNTS, terms=[Scale(2.0)])
        torch.testing.assert_close(
            loss(logits, labels), F.cross_entropy(2 * logits + log_prior(COUNTS), labels), check_dtype=False
        )

    def test_ldam(self):
        margins = ldam_margins(COUNTS, 0.4)

        def formula(x, y):
            return -log_p_of(20 * (x - margins.double()[y].unsqueeze(1) * F.one_hot(y, 5)), y)

        cosines = torch.rand(12, 5, dtype=torch.float64).mul(2).sub(1).requires_grad_()
        labels = torch.randint(5, (12,))
        agrees(fusedloss.LDAMLoss(COUNTS, 0.4, 20.0), cosines, labels, formula)
        weight = torch.rand(5, dtype=torch.float64)
        agrees(fusedloss.LDAMLoss(COUNTS, 0.4, 20.0, weight=weight), cosines, labels, formula, weight)
        assert list(fusedloss.LDAMLoss(COUNTS).state_dict()) == ["terms.0.margin"]

    @pytest.mark.parametrize("over", ["mean", "sum"])
    def test_mbls(self, over):
        def formula(z, y):
            gaps = (z.max(1, keepdim=True).values - z - 1.0).relu()
            return -log_p_of(z, y) + 0.3 * (gaps.mean(1) if over == "mean" else gaps.sum(1))

        agrees(fusedloss.MbLSLoss(1.0, 0.3, over=over), *batch(), formula)
        agrees(fusedloss.MbLSLoss(1.0, 0.3, over=over), *batch(3, 5, 2, 2), formula)
        agrees(fusedloss.MbLSLoss(1.0, 0.3, over=over), *batch(dtype=torch.float32), formula, rtol=1e-5)

    @pytest.mark.parametrize("epsilon", [1.0, -0.5])
    def test_poly(self, epsilon):
        def formula(z, y):
            log_p = log_p_of(z, y)
            return -log_p + epsilon * (1 - log_p.exp())

        agrees(fusedloss.PolyLoss(epsilon), *batch(), formula)
        agrees(fusedloss.PolyLoss(epsilon), *batch(4, 5, 3), formula)
        agrees(fusedloss.PolyLoss(epsilon), *batch(dtype=torch.float32), formula, rtol=1e-5)
        logits, labels = batch()
        torch.testing.assert_close(fusedloss.PolyLoss(0.0)(logits, labels), F.cross_entropy(logits, labels))

    def test_poly_focal(self):
        def formula(z, y):
            log_p = log_p_of(z, y)
            return -((1 - log_p.exp()) ** 2) * log_p + 0.5 * (1 - log_p.exp())

        agrees(fusedloss.PolyLoss(0.5, focal_gamma=2.0), *batch(), formula)

    def test_mbls_ties_go_to_the_first_largest_as_in_torch(self):
        logits = torch.tensor([[3.0, 3.0, 0.0]], requires_grad=True)
        fusedloss.MbLSLoss(1.0, 1.0, over="sum")(logits, torch.tensor([0])).backward()
        eager = logits.detach().requires_grad_()
        penalty = (eager.max(1, keepdim=True).values - eager - 1.0).relu().sum()
        (F.cross_entropy(eager, torch.tensor([0])) + penalty).backward()
        torch.testing.assert_close(logits.grad, eager.grad)

    @pytest.mark.parametrize(
        "make",
        [
            fusedloss.FocalLoss,
            lambda: fusedloss.BalancedSoftmaxLoss(COUNTS),
            lambda: fusedloss.LDAMLoss(COUNTS),
            lambda: fusedloss.MbLSLoss(1.0),
            fusedloss.PolyLoss,
            fusedloss.FLSD53Loss,
            lambda: fusedloss.DualFocalLoss(weight=torch.rand(5)),
            fusedloss.ECPLoss,
            lambda: fusedloss.ACLSLoss(margin=1.0),
        ],
    )
    def test_copies_and_pickles(self, make):
        loss = make()
        logits, labels = batch(dtype=torch.float32)
        for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            torch.testing.assert_close(twin(logits / 10, labels), loss(logits / 10, labels))
        assert repr(loss).startswith(type(loss).__name__)

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: fusedloss.FocalLoss(0.2), ValueError, "^gamma must be 0, or finite and at least 0"),
            (lambda: fusedloss.FocalLoss(math.nan), ValueError, "^gamma must be finite"),
            (lambda: fusedloss.PolyLoss(math.nan), ValueError, "^epsilon must be finite; got nan"),
            (lambda: fusedloss.PolyLoss("1"), TypeError, "^epsilon must be a number; got str"),
            (lambda: fusedloss.MbLSLoss(-1.0), ValueError, "margin must be finite and at least 0"),
            (lambda: fusedloss.MbLSLoss(1.0, math.nan), ValueError, "strength must be finite"),
            (lambda: fusedloss.MbLSLoss(1.0, over="max"), ValueError, "over must be 'mean' or 'sum'; got 'max'"),
            (lambda: fusedloss.LDAMLoss(COUNTS, -0.5), ValueError, "max_margin must be finite and above 0"),
            (lambda: fusedloss.LDAMLoss(torch.zeros(3)), ValueError, "at least one sample"),
            (lambda: fusedloss.LDAMLoss(COUNTS, scale=math.inf), ValueError, "scale must be finite"),
            (lambda: fusedloss.BalancedSoftmaxLoss(COUNTS, floor=-1.0), ValueError, "floor must be finite"),
            (lambda: fusedloss.BalancedSoftmaxLoss(COUNTS[:3])(*batch()), ValueError, r"log_prior must have shape"),
            (
                lambda: fusedloss.LDAMLoss(COUNTS)(torch.zeros(2, 5), torch.rand(2, 5)),
                ValueError,
                "target must hold labels",
            ),
            (lambda: fusedloss.FLSD53Loss(0.5), ValueError, "gamma must be finite and at least 1"),
            (lambda: fusedloss.DualFocalLoss(math.nan), ValueError, "gamma must be finite"),
            (lambda: fusedloss.ECPLoss(-0.1), ValueError, "strength must be finite and at least 0"),
            (lambda: fusedloss.ACLSLoss(margin="6"), TypeError, "margin must be a number"),
            (lambda: fusedloss.ECPLoss()(torch.zeros(2, 3), torch.rand(2, 3)), TypeError, "must hold labels"),
            (lambda: fusedloss.RowLoss()(*batch()), NotImplementedError, "RowLoss must define row"),
            (
                lambda: fusedloss.RowLoss(reduction="max"),
                ValueError,
                "reduction must be 'mean', 'sum' or 'none'; got 'max'",
            ),
        ],
    )
    def test_bad_arguments_are_named(self, make, error, message):
        with pytest.raises(error, match=message):
            make()


FORWARDING = {
    fusedloss.FocalLoss: ((), {"focal_gamma"}),
    fusedloss.BalancedSoftmaxLoss: ((COUNTS,), set()),
    fusedloss.LDAMLoss: ((COUNTS,), set()),
    fusedloss.MbLSLoss: ((), {"margin_penalty"}),
    fusedloss.PolyLoss: ((), {"poly_epsilon"}),
    fusedloss.LinearCrossEntropyLoss: ((4, 5), set()),
}


@pytest.mark.parametrize("kind", FORWARDING)
class TestForwardedKeywords:
    """What CrossEntropyLoss takes, presets and heads take too, and they name themselves where they do not."""

    def test_every_option_reaches_the_loss(self, kind):
        arguments, own = FORWARDING[kind]
        options = {
            "weight": torch.rand(5),
            "ignore_index": 3,
            "reduction": "none",
            "label_smoothing": 0.125,
            "terms": Scale(2.0),
            "focal_gamma": 3.0,
            "poly_epsilon": 0.75,
            "z_loss": 0.25,
            "margin_penalty": fusedloss.MarginPenalty(2.0, 0.5),
            "return_stats": True,
        }
        assert set(CrossEntropyKeywords.__annotations__) == set(options)
        given = {name: value for name, value in options.items() if name not in own}
        loss = kind(*arguments, **given)
        for name, value in given.items():
            if name != "terms":
                assert getattr(loss, name) is value, name
        assert any(isinstance(term, Scale) and term.scale == 2.0 for term in loss._terms())
        assert set(given) <= set(inspect.signature(kind).parameters)

    @pytest.mark.parametrize("name", ["s", "size_average"])
    def test_an_unknown_one_names_the_class_that_was_called(self, kind, name):
        arguments, own = FORWARDING[kind]
        for wrong in (name, *own):
            with pytest.raises(TypeError, match=rf"^{kind.__name__}.* unexpected keyword argument '{wrong}'.*weight"):
                kind(*arguments, **{wrong: 1.0})


def flsd53(z, y):
    log_p = log_p_of(z, y)
    p = log_p.exp()
    gamma = torch.where(p.detach() < 0.2, 5.0, 3.0).double()
    return -((1 - p) ** gamma) * log_p


def dual_focal(z, y, gamma=3.0):
    p = z.softmax(1)
    p_y = p.gather(1, y.unsqueeze(1))
    p_j = torch.where(p < p_y, p, 0.0).max(1).values
    return -((1 - p_y.squeeze(1) + p_j) ** gamma) * log_p_of(z, y)


def entropy_penalty(z, y):
    log_p = z.log_softmax(1)
    return -log_p_of(z, y) + 0.2 * (log_p.exp() * log_p).sum(1)


def acls(z, y):
    largest = z.max(1).values
    inside = z == largest.unsqueeze(1)
    positive = (inside * (z - 1.0).relu() ** 2).sum(1)
    negative = (~inside * (largest.detach().unsqueeze(1) - z - 1.0).relu() ** 2).sum(1) / (z.shape[1] - 1)
    return -log_p_of(z, y) + 0.3 * (positive + 0.1 * negative)


ROWS = {
    "FLSD-53": (fusedloss.FLSD53Loss, flsd53),
    "dual focal": (lambda **options: fusedloss.DualFocalLoss(3.0, **options), dual_focal),
    "entropy penalty": (lambda **options: fusedloss.ECPLoss(0.2, **options), entropy_penalty),
    "ACLS": (lambda **options: fusedloss.ACLSLoss(0.3, 1.0, **options), acls),
}


@pytest.mark.parametrize("name", ROWS)
class TestRowsOverStatistics:
    def test_value_and_gradient(self, name):
        make, formula = ROWS[name]
        agrees(make(), *batch(), formula)
        agrees(make(), *batch(40, 17, spread=0.3), formula)
        agrees(make(), *batch(3, 4, 2, 3), formula)
        agrees(make(), *batch(dtype=torch.float32), formula, rtol=2e-5)
        weight = torch.rand(5, dtype=torch.float64)
        agrees(make(weight=weight), *batch(), formula, weight)

    def test_under_a_prior(self, name):
        make, formula = ROWS[name]
        prior = log_prior(COUNTS).double()
        agrees(make(terms=[Scale(0.5), Prior(prior)]), *batch(), lambda z, y: formula(0.5 * z + prior, y))

    def test_sample_weights(self, name):
        loss, (logits, labels) = ROWS[name][0](reduction="none"), batch(ignored=False)
        rows, share = loss(logits, labels), torch.rand(12, dtype=torch.float64)
        torch.testing.assert_close(loss(logits, labels, share), share * rows)
        mean = ROWS[name][0]()(logits, labels, share)
        torch.testing.assert_close(mean, (share * rows).sum() / share.sum())
        logits, labels = batch(3, 4, 5, ignored=False)
        rows = loss(logits, labels)
        for share in (torch.rand(3, dtype=torch.float64), torch.rand(3, 5, dtype=torch.float64)):
            spread = share if share.dim() == 2 else share.unsqueeze(1)
            torch.testing.assert_close(loss(logits, labels, share), spread * rows)

    @pytest.mark.skipif(backends.resolve_backend("cpu") == "reference", reason="eager PyTorch multiplies NaN by zero")
    def test_what_an_ignored_row_holds_is_never_seen(self, name):
        loss = ROWS[name][0]()
        logits, labels = batch()
        value = loss(logits, labels)
        (expected,) = torch.autograd.grad(value, logits)
        spoilt = logits.detach().clone()
        spoilt[0] = math.nan
        spoilt.requires_grad_()
        found = loss(spoilt, labels)
        (gradient,) = torch.autograd.grad(found, spoilt)
        assert found == value and (gradient[0] == 0).all()
        torch.testing.assert_close(gradient[1:], expected[1:])

    def test_edge_cases(self, name):
        loss = ROWS[name][0]()
        alone = torch.zeros(3, 1, requires_grad=True)
        found = loss(alone, torch.zeros(3, dtype=torch.int64))
        found.backward()
        assert torch.isfinite(found) and torch.isfinite(alone.grad).all()
        certain = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
        loss(certain, torch.tensor([0])).backward()
        assert torch.isfinite(certain.grad).all()
        equal = torch.zeros(2, 4, requires_grad=True)
        loss(equal, torch.tensor([0, 3])).backward()
        assert torch.isfinite(equal.grad).all()
        assert loss(torch.randn(4, 3), torch.full((4,), -100)).isnan()
        assert loss(torch.randn(0, 3), torch.zeros(0, dtype=torch.int64)).isnan()
        with pytest.raises(IndexError):
            loss(torch.randn(2, 3), torch.tensor([0, 3]))

    def test_a_masked_class_takes_no_part(self, name):
        if name == "ACLS":
            return  # its gap to a masked class is infinite, and so is the reference code's loss
        loss = ROWS[name][0]()
        logits, labels = batch(ignored=False)
        labels = labels.clamp(max=3)
        masked = logits.detach().clone()
        masked[:, 4] = -math.inf
        masked.requires_grad_()
        found = loss(masked, labels)
        found.backward()
        torch.testing.assert_close(found, loss(logits[:, :4], labels))
        assert (masked.grad[:, 4] == 0).all() and torch.isfinite(masked.grad).all()


def test_acls_ties_multiply_the_gradient_of_one_logit():
    logits = torch.tensor([[12.0, 12.0, 0.0]], requires_grad=True)
    fusedloss.ACLSLoss(strength=1.0, margin=10.0)(logits, torch.tensor([2])).backward()
    p = torch.tensor([12.0, 12.0, 0.0]).softmax(0)
    below = -2 * 0.1 * 2.0 / 2
    torch.testing.assert_close(logits.grad[0], p + torch.tensor([2 * 2.0 * 2, 0.0, below - 1]))


def test_a_row_over_statistics_refuses_margins_where_it_reads_all_logits():
    with pytest.raises(TypeError, match="terms must hold no margins for ECPLoss; got AdditiveMargin"):
        fusedloss.ECPLoss(terms=[fusedloss.AdditiveMargin(0.1)])(*batch())
    logits, labels = batch(ignored=False)
    shifted = logits - 0.1 * F.one_hot(labels, 5)
    found = fusedloss.FLSD53Loss(terms=[fusedloss.AdditiveMargin(0.1)])(logits, labels)
    torch.testing.assert_close(found, flsd53(shifted, labels).mean())


@pytest.mark.parametrize("name", ROWS)
class TestWrongArgumentsOfARow:
    @pytest.mark.parametrize("count", [1, 4, 6])
    def test_class_weights_of_the_wrong_length(self, name, count):
        loss = ROWS[name][0](weight=torch.ones(count))
        with pytest.raises(ValueError, match=rf"weight must have shape \(5,\), one value per class; got \({count},\)"):
            loss(*batch())

    @pytest.mark.parametrize(
        ("error", "message", "options", "arguments"),
        [
            (TypeError, "weight must be a floating-point tensor; got list", {"weight": [1.0]}, ()),
            (ValueError, r"weight must have shape \(K,\); got \(5, 1\)", {"weight": torch.ones(5, 1)}, ()),
            (TypeError, "ignore_index must be an integer; got NoneType", {"ignore_index": None}, ()),
            (TypeError, "terms must be a sequence of fusedloss.terms objects; got float", {"terms": 2.0}, ()),
            (ValueError, r"input must have shape \(B, K\).*; got \(5,\)", {}, (torch.ones(5), torch.tensor(0))),
            (TypeError, "input must be a tensor of logits; got list", {}, ([[1.0, 2.0]], torch.tensor([0]))),
            (TypeError, "target must be a tensor", {}, (torch.ones(1, 5), [0])),
            (
                ValueError,
                r"sample_weight must have shape \(2,\); got \(3,\)",
                {},
                (torch.ones(2, 5), torch.tensor([0, 1]), torch.ones(3)),
            ),
            (
                TypeError,
                "sample_weight must be a floating-point tensor with one value per row; got list",
                {},
                (torch.ones(2, 5), torch.tensor([0, 1]), [1.0, 1.0]),
            ),
        ],
    )
    def test_are_named(self, name, error, message, options, arguments):
        with pytest.raises(error, match="^" + message):
            ROWS[name][0](**options)(*arguments)


@pytest.mark.parametrize("returned", [None, torch.zeros(2), torch.zeros(())])
def test_a_row_of_ones_own_that_returns_something_else(returned):
    class Wrong(fusedloss.RowLoss):
        def row(self, cross_entropy, statistics, logits, target):
            return returned

    with pytest.raises(ValueError, match=r"Wrong.row must return a tensor of shape \(12,\); got"):
        Wrong()(*batch())
