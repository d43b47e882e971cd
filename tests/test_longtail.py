import math

import pytest
import torch

from fusedloss.longtail import class_counts, effective_number_weights, inverse_frequency_weights, log_prior


def test_counts_of_labels():
    assert class_counts(torch.tensor([[0, 2], [2, 1]]), 4).tolist() == [1, 1, 2, 0]
    assert class_counts(torch.empty(0, dtype=torch.int64), 2).tolist() == [0, 0]


@pytest.mark.parametrize("labels", [[-1, 0], [0, 3]])
def test_a_label_outside_the_range_is_an_index_error(labels):
    with pytest.raises(IndexError, match=r"labels must lie in \[0, 3\)"):
        class_counts(torch.tensor(labels), 3)


def test_float_labels_are_refused():
    with pytest.raises(TypeError, match="labels must be integers"):
        class_counts(torch.tensor([0.0]), 3)


def test_effective_numbers_keep_their_digits_for_beta_near_one():
    counts = torch.tensor([100_000, 10])
    beta = 1 - 1e-7
    exact = [(1 - beta) / (1 - beta**n) for n in (100_000, 10)]
    scale = 2 / sum(exact)
    weights = effective_number_weights(counts, beta)
    assert weights.dtype == torch.float32
    assert torch.allclose(weights, torch.tensor([w * scale for w in exact]), rtol=2e-6)


def test_effective_numbers_leave_out_absent_classes():
    weights = effective_number_weights(torch.tensor([1000, 0, 10]), 0.999)
    assert weights[1] == 0 and math.isclose(float(weights.sum()), 2, rel_tol=1e-6)
    assert weights[2] > weights[0]
    assert effective_number_weights(torch.tensor([5, 0, 7]), 0.0).tolist() == [1, 0, 1]


def test_inverse_frequency_has_mean_one_over_present_classes():
    weights = inverse_frequency_weights(torch.tensor([100, 0, 25]), 0.5)
    assert weights[1] == 0
    assert math.isclose(float(weights[2] / weights[0]), 2, rel_tol=1e-6)
    assert math.isclose(float(weights.sum()), 2, rel_tol=1e-6)
    assert inverse_frequency_weights(torch.tensor([9, 0]), 0.0).tolist() == [1, 0]


def test_log_prior_with_and_without_a_floor():
    assert log_prior(torch.tensor([3, 0, 1])).tolist() == pytest.approx([math.log(0.75), -math.inf, math.log(0.25)])
    assert log_prior(torch.tensor([3, 0, 1]), floor=1)[1].item() == pytest.approx(math.log(0.25))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: effective_number_weights(torch.tensor([1]), 1.0), "beta must lie in"),
        (lambda: effective_number_weights(torch.tensor([0, 0])), "at least one sample"),
        (lambda: inverse_frequency_weights(torch.tensor([-1, 2])), "counts must be finite and at least 0"),
        (lambda: inverse_frequency_weights(torch.tensor([1]), math.nan), "power must be finite"),
        (lambda: log_prior(torch.tensor([[1]])), "shape"),
        (lambda: log_prior(torch.tensor([1]), floor=-1), "floor must be finite"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
