"""Recall@1, MAP@R and TAR@FAR against their definitions, written out."""

import math

import pytest
import torch

from fusedloss.retrieval import retrieval_report


def written_out(features, labels, rate):
    unit = torch.nn.functional.normalize(features)
    similarity = unit @ unit.t()
    recalls, precisions = [], []
    for row in range(len(labels)):
        others = [j for j in similarity[row].argsort(descending=True).tolist() if j != row]
        relevant = [bool(labels[j] == labels[row]) for j in others]
        count = sum(relevant)
        if count == 0:
            continue
        recalls.append(relevant[0])
        hits = [sum(relevant[: i + 1]) / (i + 1) for i in range(count) if relevant[i]]
        precisions.append(sum(hits) / count)
    i, j = torch.triu_indices(len(labels), len(labels), 1)
    score, same = similarity[i, j], labels[i] == labels[j]
    accepted = [float((score[same] >= t).float().mean()) for t in score
                if float((score[~same] >= t).float().mean()) <= rate]  # fmt: skip
    return sum(recalls) / len(recalls), sum(precisions) / len(precisions), max(accepted, default=0.0)


@pytest.mark.parametrize("seed", range(3))
def test_definitions(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (40,), generator=generator)
    features = torch.randn(5, 6, generator=generator)[labels] + torch.randn(40, 6, generator=generator)
    labels[-1], labels[-2] = 9, -100
    found = retrieval_report(features, labels, false_accept_rates=[0.1])
    kept = labels != -100
    expected = written_out(features[kept], labels[kept], 0.1)
    assert found["recall_at_1"] == pytest.approx(expected[0])
    assert found["map_at_r"] == pytest.approx(expected[1])
    assert found["tar_at_far_1e-01"] == pytest.approx(expected[2])


def test_lengths_do_not_count():
    features, labels = torch.randn(20, 4), torch.arange(20) % 3
    found = retrieval_report(features * torch.logspace(-15, 15, 20).unsqueeze(1), labels)
    assert found == pytest.approx(retrieval_report(features, labels), abs=1e-6)


@pytest.mark.parametrize(
    ("features", "labels", "keywords", "match"),
    [
        (torch.ones(3), torch.zeros(3).long(), {}, r"features must have shape \(N, D\); got \(3,\)"),
        (torch.ones(3, 2), torch.arange(2), {}, r"labels must have shape \(3,\); got \(2,\)"),
        (torch.full((4, 2), math.nan), torch.arange(4) % 2, {}, "features must be finite"),
        (torch.ones(3, 2), torch.zeros(3).long(), {}, "two classes"),
        (torch.ones(3, 2), torch.arange(3), {}, "two rows"),
        (
            torch.ones(4, 2),
            torch.arange(4) % 2,
            {"false_accept_rates": [0.0]},
            r"false_accept_rates must be in \(0, 1\); got 0.0",
        ),
    ],
)
def test_refusals(features, labels, keywords, match):
    with pytest.raises(ValueError, match=match):
        retrieval_report(features, labels, **keywords)
