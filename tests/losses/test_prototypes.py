"""PrototypeLoss against its formula over a masked (B, K) matrix."""

import pytest
import torch
import torch.nn.functional as F

import fusedloss


def masked_matrix(x, weight, labels, distance):
    """What the usual code computes: all distances, and the label's kept."""
    if distance == "cosine":
        distances = 1 - F.normalize(x, dim=1) @ F.normalize(weight, dim=1).t()
    else:
        distances = torch.cdist(x, weight).square()
    return (distances * F.one_hot(labels, len(weight))).sum(1)


def made(distance="l2", **options):
    loss = fusedloss.PrototypeLoss(5, 4, distance, **options).double()
    x = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    return loss, x, torch.arange(12) % 3


@pytest.mark.parametrize("distance", ["l2", "cosine"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_values_and_gradients(distance, reduction):
    loss, x, y = made(distance, reduction=reduction)
    expected = masked_matrix(x, loss.weight, y, distance)
    expected = {"mean": expected.mean(), "sum": expected.sum(), "none": expected}[reduction]
    found = loss(x, y)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(*(torch.autograd.grad(v.sum(), (x, loss.weight)) for v in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.autograd.grad(loss(x, y).sum(), loss.weight)[0][3].any()


def test_ignored_rows_count_nothing():
    loss, x, y = made()
    expected = loss(x[:8], y[:8])
    y[8:] = -100
    torch.testing.assert_close(loss(x, y), expected)
    assert not torch.autograd.grad(loss(x, y), x)[0][8:].any()
    none = loss(x, torch.full((12,), -100))
    assert none == 0 and not torch.autograd.grad(none, x)[0].any()
    assert loss(x[:0], y[:0]) == 0


def test_separation_is_the_mean_over_pairs():
    loss, x, y = made(separation=2.0, separation_margin=0.1)
    plain = masked_matrix(x, loss.weight, y, "l2").mean()
    unit = F.normalize(loss.weight, dim=1)
    pairs = [(unit[a] @ unit[b] - 0.1).relu() for a in range(4) for b in range(4) if a != b]
    torch.testing.assert_close(loss(x, y), plain + 2 * torch.stack(pairs).mean())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_papers_update_of_the_centres(reduction):
    loss, x, y = made(center_update="delta", reduction=reduction)
    usual, _, _ = made(reduction=reduction)
    usual.load_state_dict(loss.state_dict())
    value = loss(x, y)
    torch.testing.assert_close(value, usual(x, y))
    by_x, by_centre = torch.autograd.grad(value, (x, loss.weight))
    torch.testing.assert_close(by_x, torch.autograd.grad(usual(x, y), x)[0])
    for c in range(4):
        mine = x[y == c]
        torch.testing.assert_close(by_centre[c], (loss.weight[c] - mine).sum(0) / (1 + len(mine)))


def test_half_precision_and_zero_rows():
    loss = fusedloss.PrototypeLoss(5, 4, "cosine")
    x = torch.zeros(3, 5, dtype=torch.bfloat16, requires_grad=True)
    value = loss(x, torch.tensor([0, 1, 2]))
    value.backward()
    assert value.dtype == torch.float32 and value == 1 and not x.grad.any() and x.grad.dtype == torch.bfloat16


def test_a_non_finite_ignored_row_leaves_every_gradient_finite():
    loss, x, y = made()
    with torch.no_grad():
        x[3], x[4, 0] = torch.nan, torch.inf
    y[3:5] = -100
    grads = torch.autograd.grad(loss(x, y), (x, loss.weight))
    assert all(torch.isfinite(grad).all() for grad in grads) and not grads[0][3:5].any()


ONES, ZEROS = torch.ones(2, 5), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("error, words, x, y", [
    (ValueError, r"^features must have shape \(B, 5\); got \(2, 4\)", torch.ones(2, 4), ZEROS),
    (ValueError, r"^features must have shape \(B, 5\); got \(2, 3, 5\)", torch.ones(2, 3, 5), ZEROS),
    (ValueError, r"^features must have shape .*; got \(5,\)", ONES[0], ZEROS),
    (TypeError, "^features must be float32, .*; got torch.int64", ONES.long(), ZEROS),
    (TypeError, "^features must be a floating-point tensor; got list", ONES.tolist(), ZEROS),
    (TypeError, "^features must be a floating-point tensor; got NoneType", None, ZEROS),
    (ValueError, "^features must be on the device of weight, cpu; got meta", ONES.to("meta"), ZEROS.to("meta")),
    (TypeError, "^target must be a tensor of integers; got list", ONES, [0, 1]),
    (TypeError, "^target must be integers .*; got torch.float32", ONES, ZEROS.float()),
    (ValueError, r"^target must have shape \(2,\).*; got \(3,\)", ONES, torch.zeros(3, dtype=torch.int64)),
    (ValueError, r"^target must have shape \(2,\).*; got \(2, 4\) \(target.argmax", ONES, torch.eye(4).long()[:2]),
    (IndexError, "target must lie in .*; got label 4 at row 1", ONES, torch.tensor([0, 4])),
    (IndexError, "target must lie in .*; got label -1 at row 0", ONES, torch.tensor([-1, 0])),
])  # fmt: skip
def test_bad_input(error, words, x, y):
    with pytest.raises(error, match=words):
        fusedloss.PrototypeLoss(5, 4)(x, y)


def test_bad_options():
    for error, options, words in (
        (ValueError, {"distance": "l1"}, "^distance must be 'l2' or 'cosine'; got 'l1'"),
        (ValueError, {"center_update": "sgd"}, "^center_update must be 'gradient' or 'delta'; got 'sgd'"),
        (ValueError, {"reduction": None}, "^reduction must be 'mean', 'sum' or 'none'; got None"),
        (ValueError, {"separation": -1.0}, "^separation must be finite and at least 0; got -1.0"),
        (TypeError, {"separation": "1"}, "^separation must be a number; got str"),
        (ValueError, {"separation_margin": float("nan")}, "^separation_margin must be finite; got nan"),
        (
            ValueError,
            {"distance": "cosine", "center_update": "delta"},
            "^center_update must be 'gradient' with distance",
        ),
        (ValueError, {"num_classes": 0}, "^num_classes must be at least 1; got 0"),
        (TypeError, {"in_features": 5.0}, "^in_features must be an integer; got float"),
        (TypeError, {"ignore_index": "none"}, "^ignore_index must be an integer; got str"),
    ):
        with pytest.raises(error, match=words):
            fusedloss.PrototypeLoss(**{"in_features": 5, "num_classes": 4, **options})


def test_repr_shows_what_differs_from_the_defaults():
    assert repr(fusedloss.PrototypeLoss(5, 4)) == "PrototypeLoss(in_features=5, num_classes=4)"
    loss = fusedloss.PrototypeLoss(5, 4, "cosine", separation=0.5)
    assert repr(loss) == "PrototypeLoss(in_features=5, num_classes=4, distance='cosine', separation=0.5)"
