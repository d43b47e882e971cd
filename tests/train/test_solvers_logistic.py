"""Logistic regression against scikit-learn, and against plain float64 PyTorch where scikit-learn has no such option."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch.autograd import grad

from fusedloss.train.solvers import ArrayRows, LogisticFit, LogisticSettings, TensorRows, fit_logistic_path

CLASSES, WIDTH, PATH = 7, 12, [1e-3, 0.1, 10.0]


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(CLASSES, WIDTH, generator=generator)
    labels = torch.randint(0, CLASSES, (400,), generator=generator)
    labels[:CLASSES] = torch.arange(CLASSES)
    noise = torch.randn(400, WIDTH, generator=generator) * torch.linspace(2, 0.1, WIDTH)
    return means[labels] * 0.7 + noise + 3, labels


def objective(fit, features, labels, row_weight=None):
    """scikit-learn's, of the returned float32 weights, in float64."""
    loss = F.cross_entropy(features.double() @ fit.weight.double().T + fit.bias.double(), labels, reduction="none")
    loss = loss if row_weight is None else loss * row_weight
    return fit.c * float(loss.sum()) + 0.5 * float(fit.weight.double().square().sum())


def of_sklearn(c, features, labels, row_weight=None):
    model = LogisticRegression(C=c, tol=1e-8, max_iter=10000)
    model.fit(features.double().numpy(), labels.numpy(), row_weight)
    weight, bias = torch.tensor(model.coef_), torch.tensor(model.intercept_)
    return model, LogisticFit(c, weight, bias, 0.0, 0.0, 0, 0, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_minimum_is_that_of_scikit_learn(data, dtype):
    features, labels = data
    for fit in fit_logistic_path(TensorRows(features, labels), CLASSES, PATH, LogisticSettings(dtype=dtype)):
        model, expected = of_sklearn(fit.c, features, labels)
        least = objective(expected, features, labels)
        assert fit.converged
        assert fit.objective == pytest.approx(least, rel=1e-6)
        assert objective(fit, features, labels) == pytest.approx(least, rel=1e-6)
        predicted = (features @ fit.weight.float().T + fit.bias.float()).argmax(1)
        assert (predicted.numpy() != model.predict(features.double().numpy())).sum() <= 1


def test_sample_and_class_weights_are_those_of_scikit_learn(data):
    features, labels = data
    sample_weight = torch.rand(len(labels), generator=torch.Generator().manual_seed(1))
    sample_weight[::5] = 0
    class_weight = torch.linspace(0.2, 3, CLASSES)
    settings = LogisticSettings(class_weight=class_weight, sample_weight=sample_weight)
    weight = (sample_weight * class_weight[labels]).double()
    (fit,) = fit_logistic_path(TensorRows(features, labels), CLASSES, [0.5], settings)
    _, expected = of_sklearn(0.5, features, labels, weight.numpy())
    assert objective(fit, features, labels, weight) == pytest.approx(
        objective(expected, features, labels, weight), rel=1e-6
    )


def test_frozen_terms_and_smoothing_leave_no_gradient(data):
    features, labels = data
    log_prior = torch.linspace(-3, 0, CLASSES)
    tau = torch.linspace(0.5, 2, CLASSES)
    settings = LogisticSettings(
        log_prior=log_prior, class_temperature=tau, label_smoothing=0.1, dtype=torch.float64, tolerance=1e-11
    )
    c = 0.3
    (fit,) = fit_logistic_path(TensorRows(features, labels), CLASSES, [c], settings)
    weight, bias = fit.weight.requires_grad_(), fit.bias.requires_grad_()
    z = (features.double() @ weight.T + bias) / tau.double() + log_prior.double()
    total = c * F.cross_entropy(z, labels, reduction="sum", label_smoothing=0.1) + 0.5 * weight.square().sum()
    assert fit.objective == pytest.approx(total.item(), rel=1e-10)
    scale = c * len(labels)
    gradients = [float(each.abs().max()) / scale for each in grad(total, (weight, bias))]
    assert max(gradients) < 1e-4
    assert max(gradients) == pytest.approx(fit.gradient_norm, rel=1e-3)


def test_streamed_rows_give_what_rows_in_memory_give(data):
    features, labels = data
    half, keys = features.half().numpy(), np.arange(20, 380)
    mean = torch.full((WIDTH,), 3.0)
    streamed = ArrayRows(half, labels.numpy(), keys, transform=lambda chunk: chunk - mean, chunk_rows=64)
    kept = TensorRows(features.half().float()[20:380] - mean, labels[20:380])
    settings = {"sample_weight": torch.linspace(0.5, 2, 360), "dtype": torch.float64, "tolerance": 1e-9}
    one = fit_logistic_path(streamed, CLASSES, PATH, LogisticSettings(keep_bytes=0, **settings))
    other = fit_logistic_path(kept, CLASSES, PATH, LogisticSettings(**settings))
    for left, right in zip(one, other, strict=True):
        assert left.objective == pytest.approx(right.objective, rel=1e-9)
        torch.testing.assert_close(left.weight, right.weight, rtol=1e-3, atol=1e-4)


def test_a_path_resumes_to_the_same_bits(data):
    rows, saved = TensorRows(*data), []
    whole = fit_logistic_path(rows, CLASSES, PATH, on_fit=saved.append)
    assert [fit.c for fit in saved] == PATH
    for done in (1, 2, 3):
        again = fit_logistic_path(rows, CLASSES, PATH, finished=whole[:done])
        for left, right in zip(whole, again, strict=True):
            assert torch.equal(left.weight, right.weight) and torch.equal(left.bias, right.bias)
            assert left.objective == right.objective and left.iterations == right.iterations


def test_classes_without_rows_are_never_predicted_and_change_nothing(data):
    features, labels = data
    plain = fit_logistic_path(TensorRows(features, labels), CLASSES, [1.0])[0]
    prior = torch.zeros(CLASSES + 2)
    prior[[2, 5]] = -torch.inf
    moved = torch.tensor([0, 1, 3, 4, 6, 7, 8])[labels]
    for settings in (LogisticSettings(), LogisticSettings(log_prior=prior)):
        fit = fit_logistic_path(TensorRows(features, moved), CLASSES + 2, [1.0], settings)[0]
        assert fit.objective == pytest.approx(plain.objective, rel=1e-6)
        assert not fit.weight[[2, 5]].any()
        logits = features @ fit.weight.T + fit.bias
        assert torch.isfinite(logits).all() and not np.isin(logits.argmax(1), [2, 5]).any()


def test_a_single_class_and_constant_features():
    rows = TensorRows(torch.ones(4, 3), torch.tensor([0, 0, 0, 0]))
    fit = fit_logistic_path(rows, 1, [1.0])[0]
    assert fit.converged and fit.objective == 0
    fit = fit_logistic_path(TensorRows(torch.ones(4, 3), torch.tensor([0, 1, 1, 1])), 2, [1.0])[0]
    torch.testing.assert_close((fit.bias + fit.weight.sum(1)).softmax(0), torch.tensor([0.25, 0.75]))


def test_too_few_iterations_are_reported(data):
    fit = fit_logistic_path(TensorRows(*data), CLASSES, [10.0], LogisticSettings(max_iterations=3))[0]
    assert not fit.converged and fit.iterations == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"c": [1.0, 0.5]}, "c must be increasing"),
        ({"c": []}, "c must be increasing"),
        ({"c": [0.0]}, "c must be"),
        ({"num_classes": 3}, r"labels must be in \[0, 3\)"),
        ({"class_weight": torch.ones(3)}, "class_weight must be a tensor"),
        ({"class_weight": -torch.ones(CLASSES)}, "class_weight must be finite and not negative"),
        ({"sample_weight": torch.zeros(400)}, "leave a row with a positive weight"),
        ({"sample_weight": torch.full((400,), torch.nan)}, "sample_weight must be finite"),
        ({"class_temperature": 0.0}, "class_temperature must be"),
        ({"log_prior": torch.full((CLASSES,), -torch.inf)}, "log_prior must be finite for classes"),
        ({"log_prior": torch.full((CLASSES,), torch.nan)}, "log_prior must be"),
        ({"label_smoothing": 1.0}, "label_smoothing must be"),
        ({"tolerance": 0.0}, "tolerance must be"),
    ],
)
def test_what_does_not_fit_is_refused(data, change, words):
    arguments = {"num_classes": CLASSES, "c": [1.0], **change}
    classes, c = arguments.pop("num_classes"), arguments.pop("c")
    with pytest.raises(ValueError, match=words):
        fit_logistic_path(TensorRows(*data), classes, c, LogisticSettings(**arguments))


def test_features_that_are_not_finite_and_foreign_fits_are_refused(data):
    features, labels = data
    broken = features.clone()
    broken[5, 3] = torch.nan
    with pytest.raises(ValueError, match="features must be finite"):
        fit_logistic_path(TensorRows(broken, labels), CLASSES, [1.0])
    fit = fit_logistic_path(TensorRows(features, labels), CLASSES, [1.0])
    with pytest.raises(ValueError, match="finished must be fits of the first"):
        fit_logistic_path(TensorRows(features, labels), CLASSES, [2.0], finished=fit)
    with pytest.raises(ValueError, match="finished must have weights"):
        fit_logistic_path(TensorRows(features[:, :5].clone(), labels), CLASSES, [1.0, 2.0], finished=fit)
