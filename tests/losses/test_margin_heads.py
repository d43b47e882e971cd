"""Margin losses and heads: published formulas, extreme rows, tools around the weight, learning on glyphs."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedloss
from bench import extreme_cosines

B, D, K = 12, 8, 7


@pytest.fixture
def rows():
    return torch.randn(B, D), torch.randint(K, (B,))


def cosines(x, w):
    return F.linear(F.normalize(x), F.normalize(w))


def with_label(cosine, y, value):
    return cosine.scatter(1, y.unsqueeze(1), value.unsqueeze(1))


def pml_arcface(x, w, y, margin_degrees, scale):
    """pytorch-metric-learning's ArcFaceLoss: margin in degrees, and its fallback beyond pi."""
    cosine = cosines(x, w)
    label = cosine.gather(1, y.unsqueeze(1)).squeeze(1)
    margin = math.radians(margin_degrees)
    angle = torch.acos(label)
    value = torch.where(angle <= math.pi - margin, torch.cos(angle + margin), label - margin * math.sin(margin))
    return F.cross_entropy(with_label(cosine, y, value) * scale, y)


def insightface_arcface(x, w, y, margin, scale):
    """insightface's torch code: angles without gradient, no fallback."""
    cosine = cosines(x, w)
    label = cosine.gather(1, y.unsqueeze(1)).squeeze(1)
    with torch.no_grad():
        change = torch.cos(torch.acos(label) + margin) - label
    return F.cross_entropy(with_label(cosine, y, label + change) * scale, y)


def adaface(x, w, y, quality, margin, scale):
    cosine = cosines(x, w)
    angle = cosine.gather(1, y.unsqueeze(1)).squeeze(1).acos()
    return F.cross_entropy(
        with_label(cosine, y, torch.cos(angle - margin * quality) - margin * (1 + quality)) * scale, y
    )


def assert_same(loss, expected, tensors, **tolerance):
    torch.testing.assert_close(loss, expected, **tolerance)
    found = torch.autograd.grad(loss, tensors)
    for ours, theirs in zip(found, torch.autograd.grad(expected, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, **{"rtol": 1e-4, "atol": 1e-6, **tolerance})


class TestPublishedFormulas:
    @pytest.mark.parametrize("degrees", [10.0, 28.6, 90.0, 170.0])
    def test_pytorch_metric_learning(self, rows, degrees):
        x, y = rows
        x.requires_grad_()
        loss = fusedloss.ArcFaceLoss(D, K, margin=math.radians(degrees), scale=64.0)
        expected = pml_arcface(x, loss.weight, y, degrees, 64.0)
        assert_same(loss(x, y), expected, (x, loss.weight))
        cosface = fusedloss.CosFaceLoss(D, K, margin=0.35, scale=64.0)
        cosine = cosines(x, cosface.weight)
        expected = F.cross_entropy(64.0 * (cosine - 0.35 * F.one_hot(y, K)), y)
        assert_same(cosface(x, y), expected, (x, cosface.weight))

    def test_insightface(self, rows):
        x, y = rows
        x.requires_grad_()
        loss = fusedloss.ArcFaceLoss(D, K, margin=2.0, scale=16.0, fallback="none", gradient="straight_through")
        assert_same(loss(x, y), insightface_arcface(x, loss.weight, y, 2.0, 16.0), (x, loss.weight))

    def test_adaface(self, rows):
        x, y = rows
        x.requires_grad_()
        loss = fusedloss.AdaFaceLoss(D, K, scale=16.0, momentum=0.5)
        length = torch.linalg.vector_norm(x.detach(), dim=1)
        found = loss(x, y)
        mean, deviation = 10 + 0.5 * length.mean(), 50 + 0.5 * length.std()
        torch.testing.assert_close(loss.norm_mean, mean)
        torch.testing.assert_close(loss.norm_deviation, deviation)
        quality = ((length - mean) / (deviation + 1e-3) * 0.333).clamp(-1, 1)
        assert_same(found, adaface(x, loss.weight, y, quality, 0.4, 16.0), (x, loss.weight))
        loss.eval()
        loss(x, y)
        torch.testing.assert_close(loss.norm_mean, mean)

    @pytest.mark.parametrize("direction", [1.0, -1.0])
    def test_adaface_clips_the_turned_angle(self, direction):
        """Rows along (or against) the row of their class, so that theta - m k leaves [0, pi]."""
        torch.manual_seed(0)
        loss = fusedloss.AdaFaceLoss(D, K, scale=16.0, h=5.0).eval()
        y = torch.arange(K)
        with torch.no_grad():
            unit = F.normalize(loss.weight)
        noise = 0.02 * torch.randn(K, D)
        x = F.normalize(direction * unit[y] + noise) * torch.tensor([90.0, 1.0, 40.0, 5.0, 99.0, 2.0, 60.0])[:, None]
        x.requires_grad_()
        length = torch.linalg.vector_norm(x.detach().double(), dim=1)
        quality = ((length - 20) / (100 + 1e-3) * 5.0).clamp(-1, 1)
        cosine = F.linear(F.normalize(x.double()), F.normalize(loss.weight.double()))
        angle = cosine.gather(1, y.unsqueeze(1)).squeeze(1).acos()
        turned = angle - 0.4 * quality
        assert (turned < 1e-3).any() or (turned > math.pi - 1e-3).any()
        value = turned.clip(1e-3, math.pi - 1e-3).cos() - 0.4 * (1 + quality)
        expected = F.cross_entropy(with_label(cosine, y, value) * 16.0, y)
        found = loss(x, y)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(
            torch.autograd.grad(found, (x, loss.weight)), torch.autograd.grad(expected, (x, loss.weight)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
        logits = fusedloss.AdaFaceLoss(D, K, scale=16.0, h=5.0, sub_centers=2).eval()
        with torch.no_grad():
            logits.weight.copy_(loss.weight.repeat_interleave(2, 0))
        torch.testing.assert_close(logits(x, y), found, rtol=1e-5, atol=1e-6)

    def test_curricularface(self, rows):
        x, y = rows
        x.requires_grad_()
        loss = fusedloss.CurricularFaceLoss(D, K, scale=16.0, momentum=0.5)
        cosine = cosines(x, loss.weight)
        label = cosine.gather(1, y.unsqueeze(1)).squeeze(1)
        t = 0.5 * label.detach().mean()
        turned = torch.where(label > -math.cos(0.5), torch.cos(label.acos() + 0.5), label - 0.5 * math.sin(0.5))
        limit = torch.cos(label.detach().acos() + 0.5).unsqueeze(1)
        hard = torch.where(cosine > limit, cosine * (t + cosine), cosine)
        expected = F.cross_entropy(with_label(hard, y, turned) * 16.0, y)
        assert_same(loss(x, y), expected, (x, loss.weight))
        torch.testing.assert_close(loss.t, t)

    def test_combined(self, rows):
        x, y = rows
        combined = fusedloss.CombinedMarginLoss(D, K, margin=(1.0, 0.5, 0.0))
        arcface = fusedloss.ArcFaceLoss(D, K, margin=0.5)
        arcface.weight.data.copy_(combined.weight.data)
        torch.testing.assert_close(combined(x, y), arcface(x, y))

    def test_sub_centers_use_the_nearest(self, rows):
        x, y = rows
        x.requires_grad_()
        loss = fusedloss.ArcFaceLoss(D, K, scale=16.0, sub_centers=3)
        cosine = cosines(x, loss.weight).unflatten(1, (K, 3)).amax(2)
        label = cosine.gather(1, y.unsqueeze(1)).squeeze(1)
        value = torch.where(label > -math.cos(0.5), torch.cos(label.acos() + 0.5), label - 0.5 * math.sin(0.5))
        assert_same(loss(x, y), F.cross_entropy(with_label(cosine, y, value) * 16.0, y), (x, loss.weight))
        torch.testing.assert_close(loss.logits(x), 16.0 * cosine)


class TestRunningStatistics:
    """AdaFace's and CurricularFace's."""

    KINDS = ("AdaFaceLoss", "CurricularFaceLoss")

    @pytest.mark.parametrize("name", KINDS)
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("ignored", [False, True])
    def test_rows_that_are_not_finite_do_not_enter(self, rows, name, value, ignored):
        x, y = rows
        loss = getattr(fusedloss, name)(D, K, momentum=0.5)
        clean = copy.deepcopy(loss)
        dirty, kept = x.clone(), torch.ones(B, dtype=torch.bool)
        dirty[2, 3], kept[2] = value, False
        if ignored:
            y = torch.where(kept, y, -100)
            assert torch.isfinite(loss(dirty, y)) or name == "CurricularFaceLoss"
        else:
            with pytest.warns(RuntimeWarning, match=f"{name}: 1 of the rows"):
                loss(dirty, y)
        clean(x[kept], y[kept])
        torch.testing.assert_close(dict(loss.named_buffers()), {**dict(clean.named_buffers()), "skipped": loss.skipped})
        assert loss.skipped == (not ignored) and "skipped" not in loss.state_dict()

    @pytest.mark.parametrize("name", KINDS)
    def test_ignored_rows_do_not_count(self, rows, name):
        x, y = rows
        loss = getattr(fusedloss, name)(D, K, momentum=0.5)
        clean = copy.deepcopy(loss)
        y[::3] = -100
        x[::3] *= 50
        loss(x, y)
        clean(x[y >= 0], y[y >= 0])
        torch.testing.assert_close(loss.state_dict(), clean.state_dict())
        before = copy.deepcopy(loss.state_dict())
        loss(x, torch.full_like(y, -100))
        torch.testing.assert_close(loss.state_dict(), before, rtol=0, atol=0)
        assert torch.isfinite(loss(x, y))

    @pytest.mark.parametrize("name", KINDS)
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"input": torch.zeros(B, D + 1)}, ValueError, r"(input|linear_weight) must"),
            ({"input": [1.0]}, TypeError, "input must be a floating-point tensor; got list"),
            ({"input": None}, TypeError, "input must be a floating-point tensor; got NoneType"),
            ({"input": torch.zeros(B, D).long()}, TypeError, "input must be a floating-point tensor"),
            ({"target": torch.zeros(B - 1).long()}, ValueError, r"(target|labels) must have shape"),
            ({"target": torch.full((B,), K)}, IndexError, r"(target|labels) must lie in .*; got label 7 at row 0"),
            ({"target": "labels"}, TypeError, "target must be a tensor of integers; got str"),
            ({"target": torch.zeros(B, K)}, TypeError, "target must be a tensor of integers"),
            ({"sample_weight": torch.zeros(3)}, ValueError, "sample_weight must have shape"),
        ],
    )
    def test_a_wrong_call_leaves_them_as_they_were(self, rows, name, change, error, message):
        x, y = rows
        loss = getattr(fusedloss, name)(D, K, momentum=0.5)
        before = copy.deepcopy(loss.state_dict())
        with pytest.raises(error, match=message):
            loss(**({"input": x, "target": y} | change))
        torch.testing.assert_close(loss.state_dict(), before, rtol=0, atol=0)

    @pytest.mark.parametrize("name", KINDS)
    def test_move_once_with_gradients_and_in_training(self, rows, name):
        from torch.utils.checkpoint import checkpoint

        x, y = rows
        loss = getattr(fusedloss, name)(D, K, momentum=0.5)
        plain, before = copy.deepcopy(loss), copy.deepcopy(loss.state_dict())
        with torch.no_grad():
            loss(x, y)
        loss.eval()(x, y)
        torch.testing.assert_close(loss.state_dict(), before, rtol=0, atol=0)
        x.requires_grad_()
        loss.train()
        ours = checkpoint(lambda x: loss(x, y).exp(), x, use_reentrant=False)
        theirs = plain(x, y).exp()
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x))
        torch.testing.assert_close(loss.state_dict(), plain.state_dict())
        with pytest.raises(RuntimeError, match=f"{name}: running statistics can't move"):
            torch.func.grad(lambda x: loss(x, y))(x.detach())

    @pytest.mark.parametrize("name", KINDS)
    def test_one_row_without_a_batch(self, rows, name):
        x, y = rows
        loss = getattr(fusedloss, name)(D, K, reduction="none").eval()
        torch.testing.assert_close(loss(x[0], y[0]), loss(x[:1], y[:1])[0])
        assert loss(x[:0], y[:0]).shape == (0,)

    @pytest.mark.parametrize("name", KINDS)
    def test_another_default_device(self, rows, name):
        x, y = rows
        loss = getattr(fusedloss, name)(D, K)
        plain = copy.deepcopy(loss)
        with torch.device("meta"):
            found = loss(x, y)
        assert torch.equal(found, plain(x, y))
        torch.testing.assert_close(loss.state_dict(), plain.state_dict(), rtol=0, atol=0)


class TestSettings:
    @pytest.mark.parametrize("name", ["ArcFaceLoss", "CosFaceLoss", "CombinedMarginLoss", "AdaFaceLoss",
                                      "CurricularFaceLoss"])  # fmt: skip
    def test_other_libraries_names_are_hinted_at(self, name):
        kind = getattr(fusedloss, name)
        match = (
            rf"{name}.__init__\(\) got an unexpected keyword argument 's' \(scale is meant\?\); it takes in_features"
        )
        with pytest.raises(TypeError, match=match):
            kind(s=64)
        with pytest.raises(TypeError, match=rf"{name}.*'embedding_size' \(in_features is meant\?\)"):
            kind(embedding_size=8, num_classes=3)
        with pytest.raises(TypeError, match=rf"{name}.*'weight' \(class_weight is meant\?\)"):
            kind(D, K, weight=torch.ones(K))

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"scale": 0.0}, ValueError, "scale must be finite and above 0; got 0.0"),
            ({"scale": -3.0}, ValueError, "scale must be finite and above 0; got -3.0"),
            ({"scale": "30"}, TypeError, "scale must be a number; got str"),
            ({"scale": nn.Parameter(torch.tensor(-1.0))}, ValueError, "scale must be above 0"),
            ({"in_features": 0}, ValueError, "in_features must be at least 1; got 0"),
            ({"num_classes": 3.0}, TypeError, "num_classes must be an integer; got float"),
            ({"sub_centers": True}, TypeError, "sub_centers must be an integer; got bool"),
            ({"margin": None}, (TypeError, ValueError), "margin must be"),
            ({"margin": "0.5"}, (TypeError, ValueError), "margin must be"),
        ],
    )
    @pytest.mark.parametrize("name", ["ArcFaceLoss", "CosFaceLoss", "CombinedMarginLoss", "ArcFaceHead"])
    def test_bad_settings_are_named(self, name, arguments, error, message):
        with pytest.raises(error, match=message):
            getattr(fusedloss, name)(**({"in_features": D, "num_classes": K} | arguments))

    @pytest.mark.parametrize("name", ["AdaFaceLoss", "CurricularFaceLoss"])
    def test_bad_momentum(self, name):
        for momentum, error in ((1.5, ValueError), (None, TypeError), (math.nan, ValueError)):
            with pytest.raises(error, match="momentum must be"):
                getattr(fusedloss, name)(D, K, momentum=momentum)

    def test_sampling_excludes_several_centers(self):
        for rate, error in ((0.0, ValueError), (2.0, ValueError), ("half", TypeError)):
            with pytest.raises(error, match="sample_rate must be"):
                fusedloss.ArcFaceLoss(D, K, sample_rate=rate)
        with pytest.raises(ValueError, match=r"sample_rate must be None with sub_centers=2; got 0\.5"):
            fusedloss.ArcFaceLoss(D, K, sample_rate=0.5, sub_centers=2)

    def test_repr(self):
        assert repr(fusedloss.ArcFaceLoss(D, K)) == "ArcFaceLoss(in_features=8, num_classes=7)"
        loss = fusedloss.ArcFaceLoss(
            D, K, margin=0.3, fallback="easy", label_smoothing=0.1, class_weight=torch.ones(K), sub_centers=2
        )
        assert repr(loss) == (
            "ArcFaceLoss(in_features=8, num_classes=7, margin=0.3, fallback='easy', class_weight=tensor(7,), "
            "sub_centers=2, label_smoothing=0.1)"
        )
        assert repr(fusedloss.CosFaceLoss(D, K, 0.5, 8.0)) == (
            "CosFaceLoss(in_features=8, num_classes=7, margin=0.5, scale=8.0)"
        )
        assert repr(fusedloss.CombinedMarginLoss(D, K)) == "CombinedMarginLoss(in_features=8, num_classes=7)"
        assert repr(fusedloss.AdaFaceLoss(D, K, h=0.5)) == "AdaFaceLoss(in_features=8, num_classes=7, h=0.5)"
        assert repr(fusedloss.CurricularFaceLoss(D, K)) == "CurricularFaceLoss(in_features=8, num_classes=7)"
        assert repr(fusedloss.ArcFaceHead(D, K, scale=8.0)) == "ArcFaceHead(in_features=8, num_classes=7, scale=8.0)"


class TestExtremes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", list(extreme_cosines.cases()))
    def test_gradients_are_those_of_float64(self, name, dtype):
        found = extreme_cosines.error(extreme_cosines.ours, extreme_cosines.cases()[name], dtype)
        limit = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        assert found == "-" or float(found) <= limit

    def test_the_usual_snippet_fails_there(self):
        found = {name: extreme_cosines.error(extreme_cosines.usual, case, torch.float32)
                 for name, case in extreme_cosines.cases().items()}  # fmt: skip
        assert float(found["random rows"]) < 1e-5
        assert all(not float(error) < 1e-4 for name, error in found.items() if "zero" in name or "1e" in name)

    @pytest.mark.parametrize("sample", ["equal", "opposite", "zero"])
    def test_margin_logits(self, rows, sample):
        x, y = rows
        w = torch.randn(K, D)
        w[y] = {"equal": x, "opposite": -x, "zero": torch.zeros_like(x)}[sample]
        x.requires_grad_(), w.requires_grad_()
        logits = fusedloss.margin_logits(x, w, y)
        fused = fusedloss.linear_cross_entropy(
            x, w, y, normalize=True, terms=[fusedloss.AngularMargin(0.5), fusedloss.Scale(30.0)]
        )
        assert_same(fused, F.cross_entropy(logits, y), (x, w), rtol=1e-3, atol=1e-5)


class TestMarginLogits:
    def test_without_labels_there_is_no_margin(self, rows):
        x, y = rows
        head = fusedloss.ArcFaceHead(D, K, scale=8.0)
        torch.testing.assert_close(head(x), 8.0 * cosines(x, head.weight))
        y[0] = -100
        torch.testing.assert_close(fusedloss.margin_logits(x, head.weight, y, scale=8.0)[0], head(x)[0])
        assert head(x.bfloat16()).dtype == torch.float32

    def test_a_learned_scale(self, rows):
        x, y = rows
        head = fusedloss.ArcFaceHead(D, K, scale=nn.Parameter(torch.tensor(8.0)))
        F.cross_entropy(head(x, y), y).backward()
        assert {name for name, p in head.named_parameters() if p.grad is not None} == {"weight", "_scale.scale"}

    def test_refusals(self, rows):
        x, y = rows
        w = torch.randn(K, D)
        for error, match, arguments, keywords in (
            (ValueError, "labels must have shape", (x, w, y[1:]), {}),
            (TypeError, "labels must be a tensor of integers", (x, w, y.float()), {}),
            (IndexError, "labels must lie in .*; got label 7", (x, w, torch.full((B,), 7)), {}),
            (TypeError, "margin must be a margin of fusedloss.terms", (x, w, y), {"margin": 0.5}),
            (ValueError, "multiple of sub_centers=2", (x, w, y), {"sub_centers": 2}),
        ):
            with pytest.raises(error, match=match):
                fusedloss.margin_logits(*arguments, **keywords)
        with pytest.raises(ValueError, match="radians"):
            fusedloss.ArcFaceHead(D, K, margin=28.6)


class TestModules:
    @pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch without it, before 2.13")
    def test_linear_cross_entropy_is_torchs(self, rows):
        x, y = rows
        for keywords in ({}, {"bias": True}, {"label_smoothing": 0.1}, {"reduction": "sum", "ignore_index": 2}):
            ours = fusedloss.LinearCrossEntropyLoss(D, K, **keywords)
            theirs = nn.LinearCrossEntropyLoss(D, K, **keywords)
            theirs.load_state_dict(ours.state_dict())
            torch.testing.assert_close(ours(x, y), theirs(x, y))
            ours.load_state_dict(theirs.state_dict())
            torch.testing.assert_close(ours.logits(x), ours.linear(x))
        ours = fusedloss.LinearCrossEntropyLoss(D, K, out_features=(2, 3), bias=True)
        theirs = nn.LinearCrossEntropyLoss(D, K, out_features=(2, 3), bias=True)
        theirs.load_state_dict(ours.state_dict())
        y = torch.randint(K, (B, 2, 3))
        torch.testing.assert_close(ours(x, y), theirs(x, y))

    @pytest.mark.parametrize("name", ["ArcFaceLoss", "CosFaceLoss", "CombinedMarginLoss", "AdaFaceLoss"])
    def test_every_keyword(self, rows, name):
        x, y = rows
        keywords = {
            "class_weight": torch.rand(K),
            "terms": [fusedloss.Prior(torch.rand(K).log())],
            "label_smoothing": 0.1,
            "focal_gamma": 1.0,
            "z_loss": 1e-3,
            "reduction": "none",
            "sample_rate": 0.9,
        }
        loss = getattr(fusedloss, name)(D, K, **keywords)
        assert loss(x, y, torch.rand(B)).shape == (B,)
        clone = pickle.loads(pickle.dumps(copy.deepcopy(loss)))
        assert {"weight", "loss.weight", "loss.terms.1.log_prior"} <= set(clone.state_dict())
        value, statistics = getattr(fusedloss, name)(D, K, return_stats=True)(x, y)
        assert statistics.prediction.shape == (B,)
        value.backward()

    def test_per_class_margins_learn(self, rows):
        x, y = rows
        loss = fusedloss.ArcFaceLoss(D, K, margin=nn.Parameter(torch.full((K,), 0.3)))
        loss(x, y).backward()
        assert (loss.margin.margin.grad != 0).sum() == len(y.unique())

    def test_a_weight_that_nobody_steps_is_said(self, rows):
        x, y = rows
        loss, layer = fusedloss.CosFaceLoss(D, K), nn.Linear(D, D)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        with pytest.warns(UserWarning, match="CosFaceLoss has parameters of its own"):
            for _ in range(4):
                loss(layer(x), y).backward()
                optimizer.step()


class TestTools:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_rows_of_16_bits_are_divided_by_their_length_before_they_are_rounded(self, dtype):
        torch.manual_seed(0)
        loss, layer = fusedloss.ArcFaceLoss(D, K).to(dtype), nn.Linear(D, K)
        with torch.no_grad():
            loss.weight.mul_(60000.0 if dtype == torch.float16 else 1e30)  # rows longer than float16 can say
        loss.export_into(layer)
        expected = 30.0 * F.normalize(loss.weight.detach().double())
        torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-6, atol=1e-7)
        statistics = fusedloss.ClassStatistics(D, K)
        statistics.update(1e6 * torch.randn(B, D), torch.arange(B) % K)
        other = fusedloss.ArcFaceLoss(D, K).to(dtype)
        other.init_from(statistics)
        torch.testing.assert_close(F.normalize(other.weight.float()), F.normalize(statistics.mean), rtol=0, atol=1e-2)
        other.add_classes(1, means=torch.full((1, D), 1e6))
        assert torch.isfinite(other.weight).all() and other.weight[-1].any()

    def test_export(self, rows):
        x, _ = rows
        loss, layer = fusedloss.ArcFaceLoss(D, K), nn.Linear(D, K)
        loss.export_into(layer)
        torch.testing.assert_close(layer(F.normalize(x)), loss.logits(x))
        assert layer(x).argmax(1).equal(loss.logits(x).argmax(1))
        torch.testing.assert_close(loss.logits(x, temperature=2.0), loss.logits(x) / 2)
        with pytest.raises(ValueError, match="linear must have a weight of shape"):
            loss.export_into(nn.Linear(D, K + 1))

    def test_start_from_class_means(self, rows):
        x, y = rows
        y = y.clamp(max=K - 2)
        statistics = fusedloss.ClassStatistics(D, K)
        statistics.update(x, y)
        loss = fusedloss.CosFaceLoss(D, K)
        before = loss.weight[-1].clone()
        loss.init_from(statistics)
        seen = statistics.count > 0
        torch.testing.assert_close(F.normalize(loss.weight)[seen], F.normalize(statistics.mean)[seen])
        assert loss.weight[-1].equal(before)
        with pytest.raises(ValueError, match="statistics must be of 7 classes and 8 features"):
            loss.init_from(fusedloss.ClassStatistics(D, K + 1))

    def test_add_classes(self, rows):
        x, y = rows
        loss = fusedloss.ArcFaceLoss(D, K)
        before, old = loss.logits(x), loss.weight
        loss.add_classes(2, means=torch.randn(2, D))
        assert loss.weight is not old
        torch.testing.assert_close(loss.logits(x)[:, :K], before)
        loss(x, torch.full_like(y, K + 1)).backward()


@pytest.mark.parametrize("name", ["ArcFaceLoss", "CosFaceLoss"])
def test_learning_follows_eager_and_separates(name):
    """A layer and a head on four noisy directions per class: the fused curve is eager's, and neighbours agree."""
    generator = torch.Generator().manual_seed(1)
    centers = torch.randn(10, 16, generator=generator)
    y = torch.arange(200) % 10
    x = centers[y] + 0.7 * torch.randn(200, 16, generator=generator)
    curves = []
    for eager in (False, True):
        torch.manual_seed(0)
        layer, loss = nn.Linear(16, 8), getattr(fusedloss, name)(8, 10, scale=16.0)
        optimizer = torch.optim.SGD([*layer.parameters(), *loss.parameters()], lr=0.05, momentum=0.9)
        curve = []
        for step in range(60):
            batch = slice(40 * (step % 5), 40 * (step % 5 + 1))
            features = layer(x[batch])
            if eager:
                margin = loss.margin.current()
                cosine = cosines(features, loss.weight)
                value = F.cross_entropy(16.0 * margin.apply(cosine, y[batch]), y[batch])
            else:
                value = loss(features, y[batch])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            curve.append(value.detach())
        curves.append(torch.stack(curve))
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-3, atol=1e-4)
    assert curves[0][-5:].mean() < 0.5 * curves[0][:5].mean()
    unit = F.normalize(layer(x).detach())
    nearest = (unit @ unit.t()).fill_diagonal_(-2).argmax(1)
    assert (y[nearest] == y).float().mean() > 0.8
