import math

import pytest
import torch
from torch import nn

import fusedloss
from fusedloss import Prior
from fusedloss.longtail import (
    DeferredReweighting,
    adjust_logits,
    class_counts,
    effective_number_weights,
    inverse_frequency_weights,
    ldam_margins,
    log_prior,
    trained_prior,
)


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
        (lambda: effective_number_weights(torch.tensor([1]), 1.0), r"beta must be in \[0, 1\)"),
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


COUNTS = torch.tensor([1000, 500, 100, 20, 5])


class TestAdjustLogits:
    def test_takes_the_training_prior_out_and_puts_the_deployments_in(self):
        logits, prior = torch.randn(6, 5), log_prior(COUNTS)
        torch.testing.assert_close(adjust_logits(logits, prior), logits - prior)
        torch.testing.assert_close(adjust_logits(logits, prior, 0.5), logits - 0.5 * prior)
        deployed = torch.rand(5).log_softmax(0)
        torch.testing.assert_close(adjust_logits(logits, prior, 1.0, deployed), logits - prior + deployed)
        everywhere = torch.randn(6, 5, 2, 3, dtype=torch.bfloat16)
        found = adjust_logits(everywhere, prior)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, (everywhere.float() - prior.reshape(5, 1, 1)).bfloat16())

    def test_undoes_what_a_prior_in_training_does(self):
        """A model of the joint frequencies, adjusted, is the model that training with the prior would have left raw."""
        raw, labels = torch.randn(8, 5), torch.arange(8) % 5
        joint = raw + log_prior(COUNTS)
        torch.testing.assert_close(
            fusedloss.cross_entropy(adjust_logits(joint, log_prior(COUNTS)), labels, terms=[Prior(log_prior(COUNTS))]),
            fusedloss.cross_entropy(joint, labels),
        )

    def test_a_class_without_samples_is_never_chosen(self):
        prior = log_prior(torch.tensor([9, 0, 1]))
        found = adjust_logits(torch.tensor([[0.0, 50.0, 0.0]]), prior, 1.0, torch.full((3,), 1 / 3).log())
        assert found[0, 1] == -math.inf and torch.isfinite(found[0, [0, 2]]).all()
        with_floor = adjust_logits(torch.tensor([[0.0, 50.0, 0.0]]), log_prior(torch.tensor([9, 0, 1]), floor=1))
        assert with_floor.argmax() == 1

    @pytest.mark.parametrize("strength", [1.0, 0.3])
    def test_refuses_to_apply_a_prior_twice(self, strength):
        logits, prior = torch.randn(4, 5), log_prior(COUNTS)
        balanced = fusedloss.BalancedSoftmaxLoss(COUNTS, strength)
        trained = [balanced, [Prior(prior, strength)], {"applied": "training", "strength": strength}]
        for with_prior in trained:
            assert trained_prior(with_prior) == strength
            with pytest.raises(
                ValueError, match=r"strength must be 0 .*applied twice: its raw logits are adjusted already; got"
            ):
                adjust_logits(logits, prior, trained_with=with_prior)
            torch.testing.assert_close(
                adjust_logits(logits, prior, 0.0, prior, trained_with=with_prior), logits + prior
            )
        for without in (None, (), fusedloss.CrossEntropyLoss(), {"applied": "none", "strength": 0.0}):
            torch.testing.assert_close(adjust_logits(logits, prior, trained_with=without), logits - prior)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"strength": -1.0}, ValueError, r"strength must be at least 0; got -1.0.*plus sign.*training"),
            ({"strength": math.nan}, ValueError, "strength must be finite"),
            ({"log_prior": torch.zeros(4)}, ValueError, r"log_prior must have shape \(5,\).*got \(4,\)"),
            ({"log_prior": torch.full((5,), math.nan)}, ValueError, r"log_prior must be below \+inf"),
            ({"target_log_prior": torch.zeros(3)}, ValueError, r"target_log_prior must have shape \(5,\)"),
            ({"log_prior": COUNTS}, TypeError, "log_prior must be a floating-point tensor"),
            ({"logits": torch.zeros(5)}, ValueError, "logits must have shape"),
            ({"logits": torch.zeros(2, 5).long()}, TypeError, "logits must be"),
            ({"trained_with": "balanced"}, TypeError, "trained_with must be"),
            ({"trained_with": nn.CrossEntropyLoss()}, TypeError, "trained_with must be"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, arguments, error, message):
        with pytest.raises(error, match=message):
            adjust_logits(**({"logits": torch.zeros(2, 5), "log_prior": torch.zeros(5)} | arguments))


def test_ldam_margins():
    assert ldam_margins(COUNTS).tolist() == pytest.approx([0.133, 0.158, 0.236, 0.354, 0.5], abs=5e-4)
    written = 0.3 * COUNTS.double() ** -0.25 / 5**-0.25
    torch.testing.assert_close(ldam_margins(COUNTS, 0.3), written.float())
    assert ldam_margins(torch.tensor([16, 0, 1])).tolist() == pytest.approx([0.25, 0.5, 0.5])
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="max_margin must be finite and above 0"):
            ldam_margins(COUNTS, bad)


class TestDeferredReweighting:
    def test_ones_then_the_weights_at_once(self):
        schedule = DeferredReweighting(COUNTS, start_epoch=3, beta=0.999)
        for epoch in range(3):
            assert schedule(epoch).tolist() == [1.0] * 5
        for epoch in (3, 4, 400):
            assert torch.equal(schedule(epoch), effective_number_weights(COUNTS, 0.999))
        at_once = DeferredReweighting(COUNTS, start_epoch=0, power=0.5)
        assert torch.equal(at_once(0), inverse_frequency_weights(COUNTS, 0.5))

    def test_grows_over_the_ramp(self):
        schedule = DeferredReweighting(COUNTS, start_epoch=2, ramp_epochs=4, power=1.0)
        final = inverse_frequency_weights(COUNTS)
        for epoch, share in ((1, 0.0), (2, 0.25), (3, 0.5), (4, 0.75), (5, 1.0), (6, 1.0)):
            torch.testing.assert_close(schedule(epoch), (1 - share) + share * final)
            assert math.isclose(float(schedule(epoch).mean()), 1.0, rel_tol=1e-6)

    def test_a_class_without_samples_ends_at_zero(self):
        schedule = DeferredReweighting(torch.tensor([100, 0, 10]), start_epoch=1, ramp_epochs=2)
        assert [schedule(epoch)[1].item() for epoch in range(4)] == [1.0, 0.5, 0.0, 0.0]
        assert torch.isfinite(torch.stack([schedule(epoch) for epoch in range(4)])).all()

    def test_moves_the_weights_of_a_loss_in_place(self):
        schedule = DeferredReweighting(COUNTS, start_epoch=1)
        logits, labels = torch.randn(10, 5), torch.arange(10) % 5
        loss, torchs = fusedloss.CrossEntropyLoss(), nn.CrossEntropyLoss()
        assert schedule.apply_to(loss, 0) is loss
        buffer = loss.weight
        for epoch in (0, 1):
            schedule.apply_to(loss, epoch)
            schedule.apply_to(torchs, epoch)
            assert loss.weight is buffer and torch.equal(loss.state_dict()["weight"], schedule(epoch))
            torch.testing.assert_close(loss(logits, labels), torchs(logits, labels))

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="start_epoch must be at least 0; got -1"):
            DeferredReweighting(COUNTS, -1)
        with pytest.raises(TypeError, match="ramp_epochs must be an integer"):
            DeferredReweighting(COUNTS, 1, ramp_epochs=1.5)
        schedule = DeferredReweighting(COUNTS, 1)
        with pytest.raises(ValueError, match="epoch must be at least 0"):
            schedule(-1)
        with pytest.raises(TypeError, match="loss must have a buffer 'weight'"):
            schedule.apply_to(nn.Linear(2, 2), 0)
        with pytest.raises(ValueError, match=r"loss must have weights of the counts' shape \(\d,\); got \(3,\)"):
            schedule.apply_to(fusedloss.CrossEntropyLoss(torch.ones(3)), 1)


class Test95To5:
    """Two classes on a line, 95 to 5: who finds the rare one."""

    @staticmethod
    def tail_recall(loss, adjust=None):
        generator = torch.Generator().manual_seed(0)
        labels = (torch.arange(4000) % 20 == 0).long()
        x = torch.randn(4000, 1, generator=generator) + 2.0 * labels.unsqueeze(1)
        head = nn.Linear(1, 2)
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=60, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            value = loss(head(x), labels)
            value.backward()
            return value

        optimizer.step(closure)
        logits = head(x).detach()
        logits = logits if adjust is None else adjust(logits)
        return float((logits.argmax(1) == 1)[labels == 1].double().mean())

    def test_balanced_softmax_lifts_tail_recall(self):
        counts = torch.tensor([95, 5])
        prior = log_prior(counts)
        plain = self.tail_recall(fusedloss.CrossEntropyLoss())
        balanced = self.tail_recall(fusedloss.BalancedSoftmaxLoss(counts))
        wrong = self.tail_recall(fusedloss.CrossEntropyLoss(terms=[Prior(prior, -1.0)]))
        afterwards = self.tail_recall(fusedloss.CrossEntropyLoss(), lambda z: adjust_logits(z, prior))
        assert wrong < 0.1 < plain < 0.5 < 0.8 < balanced
        assert abs(afterwards - balanced) < 0.05

    def test_the_wrong_sign_must_be_said(self):
        counts = torch.tensor([95, 5])
        with pytest.raises(ValueError, match=r"strength must be at least 0; got -1.*training adds the log prior"):
            fusedloss.BalancedSoftmaxLoss(counts, strength=-1.0)
        with pytest.raises(ValueError, match=r"minus sign of a post-hoc adjustment is built in"):
            adjust_logits(torch.zeros(1, 2), log_prior(counts), -1.0)
        with pytest.raises(ValueError, match="apply it twice"):
            fusedloss.BalancedSoftmaxLoss(counts, terms=[Prior(log_prior(counts))])
