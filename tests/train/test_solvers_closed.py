"""Closed-form classifiers against scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from fusedloss.train.solvers import NearestNeighbours, TensorRows, fit_class_means, fit_gda
from fusedloss.train.solvers import nearest as nearest_module

CLASSES, WIDTH = 6, 10


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(3)
    labels = np.repeat(np.arange(CLASSES), [5, 10, 20, 40, 80, 145])
    features = random.normal(size=(CLASSES, WIDTH))[labels] + random.normal(size=(300, WIDTH)) * np.linspace(2, 0.2, 10)
    return (features + 5).astype(np.float32), labels


@pytest.fixture(scope="module")
def rows(data):
    return TensorRows(torch.from_numpy(data[0]), torch.from_numpy(data[1]), chunk_rows=64)


def test_class_means_are_the_nearest_centroid(data, rows):
    features, labels = data
    expected = NearestCentroid().fit(features, labels).predict(features)
    logits = fit_class_means(rows, CLASSES, scale=2.0).logits(rows.features)
    assert (logits.argmax(1).numpy() == expected).all()
    means = np.stack([features[labels == k].astype(float).mean(0) for k in range(CLASSES)])
    distance = -((features[:, None] - means) ** 2).sum(2)
    found = logits.softmax(1).numpy()
    np.testing.assert_allclose(found, torch.from_numpy(distance).softmax(1).numpy(), atol=1e-4)


def test_cosine_means_are_cosines_of_means_of_unit_rows(data, rows):
    features, labels = data
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    means = np.stack([unit[labels == k].mean(0) for k in range(CLASSES)])
    expected = 5 * unit @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    fit = fit_class_means(rows, CLASSES, "cosine", scale=5.0)
    assert fit.unit_rows
    np.testing.assert_allclose(fit.logits(rows.features).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("balanced", [False, True])
def test_gda_is_that_of_scikit_learn(data, rows, shrinkage, balanced):
    features, labels = data
    prior = np.full(CLASSES, 1 / CLASSES) if balanced else None
    # With the classes' shares as weights of their covariances, whatever the prior of the prediction
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(features.astype(float), labels)
    intercept = model.intercept_ - (0 if prior is None else np.log(model.priors_ * CLASSES))
    fit = fit_gda(rows, CLASSES, shrinkage, None if prior is None else torch.from_numpy(prior))
    np.testing.assert_allclose(fit.weight, model.coef_, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(fit.bias, intercept, rtol=1e-4, atol=1e-3)


def test_shrinkage_is_ledoit_and_wolf_s_of_the_residuals(data, rows):
    features, labels = data
    means = np.stack([features[labels == k].astype(float).mean(0) for k in range(CLASSES)])
    _, shrinkage = ledoit_wolf(features.astype(float) - means[labels], assume_centered=True)
    assert 0 < shrinkage < 1
    torch.testing.assert_close(fit_gda(rows, CLASSES), fit_gda(rows, CLASSES, shrinkage), rtol=1e-5, atol=1e-5)


def test_gda_of_a_singular_covariance_takes_the_pseudo_inverse():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(8, 20, generator=generator), torch.arange(8) % 2
    fit = fit_gda(TensorRows(features, labels), 2, shrinkage=0.0)
    means = torch.stack([features[labels == k].double().mean(0) for k in range(2)])
    apart = features.double() - means[labels]
    expected = means @ torch.linalg.pinv(apart.T @ apart / 8, rtol=1e-9)
    torch.testing.assert_close(fit.weight, expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("k", [1, 5, 400])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_neighbours_are_those_of_scikit_learn(data, rows, k, metric, monkeypatch):
    features, labels = data
    monkeypatch.setattr(nearest_module, "_QUERIES", 70)
    monkeypatch.setattr(nearest_module, "_BLOCK_BYTES", 70 * 4 * 40)
    queries = features + np.float32(0.05)
    model = KNeighborsClassifier(min(k, 300), metric=metric).fit(features, labels)
    votes = model.predict_proba(queries)
    found = NearestNeighbours(rows, CLASSES, k, math.inf, metric, smoothing=0.1)(torch.from_numpy(queries))
    expected = 0.9 * votes + 0.1 / CLASSES
    np.testing.assert_allclose(found.exp().numpy(), expected, atol=1e-5)


def test_votes_are_weighted_by_similarity(data, rows):
    features, labels = data
    unit = features.astype(float) / np.linalg.norm(features, axis=1, keepdims=True)
    similarity = unit[:20] @ unit.T
    nearest = np.argsort(-similarity, axis=1)[:, :7]
    weight = np.exp(np.take_along_axis(similarity, nearest, 1) / 0.1)
    votes = np.stack([(weight * (labels[nearest] == k)).sum(1) for k in range(CLASSES)], axis=1)
    expected = 0.99 * votes / votes.sum(1, keepdims=True) + 0.01 / CLASSES
    found = NearestNeighbours(rows, CLASSES, 7, 0.1)(rows.features[:20])
    np.testing.assert_allclose(found.exp().numpy(), expected, atol=1e-4)
    cold = NearestNeighbours(rows, CLASSES, 7, 1e-6)(rows.features[:20])
    assert torch.isfinite(cold).all()


def test_stored_rows_travel_in_the_state(rows):
    model = NearestNeighbours(rows, CLASSES, 3)
    other = NearestNeighbours(TensorRows(torch.zeros_like(rows.features), torch.zeros_like(rows.labels)), CLASSES, 3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(rows.features), other(rows.features))


def test_a_class_without_rows_is_never_predicted(rows):
    for fit in (fit_class_means(rows, 8), fit_class_means(rows, 8, "cosine"), fit_gda(rows, 8)):
        logits = fit.logits(rows.features)
        assert torch.isfinite(logits).all() and int(logits.argmax(1).max()) < CLASSES


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda rows: fit_class_means(rows, CLASSES, "manhattan"), "metric must be"),
        (lambda rows: fit_class_means(rows, 2), r"labels must be in \[0, 2\)"),
        (lambda rows: fit_gda(rows, CLASSES, 1.5), "shrinkage must be"),
        (lambda rows: fit_gda(rows, CLASSES, 0.5, torch.zeros(CLASSES)), "prior must be positive"),
        (lambda rows: fit_gda(rows, CLASSES, 0.5, torch.ones(2)), "prior must be a tensor"),
        (lambda rows: NearestNeighbours(rows, CLASSES, 0), "k must be"),
        (lambda rows: NearestNeighbours(rows, CLASSES, 3, 0.0), "temperature must be"),
        (lambda rows: NearestNeighbours(rows, CLASSES, 3)(torch.zeros(2, 3)), "features must be"),
        (lambda rows: TensorRows(rows.features, rows.labels[:-1]), "labels must be int64"),
        (lambda rows: fit_gda(TensorRows(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)), 2), "at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(rows, call, words):
    with pytest.raises(ValueError, match=words):
        call(rows)
