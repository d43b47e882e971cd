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
