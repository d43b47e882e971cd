"""ClassStatistics and NormStatistics against written-out recurrences and the two-pass formula in float64."""

import copy
import math
import os
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedloss.losses.class_statistics import ClassStatistics
from fusedloss.losses.norm_statistics import NormStatistics


def random_batches(batches, rows, width, num_classes, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(num_classes, width, generator=generator) + offset
    for _ in range(batches):
        labels = torch.randint(num_classes, (rows,), generator=generator)
        yield centers[labels] + torch.randn(rows, width, generator=generator), labels


def two_pass(features, labels, label):
    rows = features[labels == label].double()
    variance = (rows - rows.mean(0)).square().mean(0)
    return len(rows), rows.mean(0), variance


def check_exact(statistics, features, labels, rtol=1e-6):
    for label in range(statistics.num_classes):
        if not (labels == label).any():
            assert statistics.count[label] == 0 and not statistics.mean[label].any()
            continue
        rows, mean, variance = two_pass(features, labels, label)
        assert statistics.count[label] == rows
        torch.testing.assert_close(statistics.mean[label].double(), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(statistics.scatter[label], variance.sum(), rtol=rtol, atol=1e-12)
        if statistics.per_feature:
            torch.testing.assert_close(statistics.variance[label].double(), variance, rtol=10 * rtol, atol=1e-12)


def state(statistics):
    return {name: buffer.clone() for name, buffer in statistics.state_dict().items()}


def same_state(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)


@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_many_batches_equal_one_pass(rows, offset, per_feature):
    batches = list(random_batches(400 // rows + 2, rows, 64, 7, offset))
    statistics = ClassStatistics(64, 7, per_feature=per_feature)
    for features, labels in batches:
        statistics.update(features, labels)
    features, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    # Means a thousand spreads from zero round to 6e-5 spreads in float32, and each step carries that on.
    check_exact(statistics, features, labels, rtol=1e-5 if offset else 1e-6)
    whole = ClassStatistics(64, 7, per_feature=per_feature)
    whole.update(features, labels)
    check_exact(whole, features, labels)


def test_double_features_and_double_state_are_exact():
    batches = [(f.double() + 1e6, y) for f, y in random_batches(30, 5, 8, 3)]
    statistics = ClassStatistics(8, 3).double()
    for features, labels in batches:
        statistics.update(features, labels)
    check_exact(statistics, *(torch.cat(parts) for parts in zip(*batches, strict=True)), rtol=1e-8)
    assert statistics.mean.dtype == torch.float64


def test_float_features_keep_a_double_state_precise():
    batches = list(random_batches(60, 2, 4, 2, offset=1000.0))
    statistics = ClassStatistics(4, 2).double()
    for features, labels in batches:
        statistics.update(features, labels)
    check_exact(statistics, *(torch.cat(parts) for parts in zip(*batches, strict=True)), rtol=1e-10)


def test_double_features_with_a_float_state():
    batches = [(f.double(), y) for f, y in random_batches(10, 9, 8, 3)]
    statistics = ClassStatistics(8, 3, per_feature=True)
    for features, labels in batches:
        statistics.update(features, labels)
    check_exact(statistics, *(torch.cat(parts) for parts in zip(*batches, strict=True)))
    assert statistics.mean.dtype == torch.float32


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("rows", [1, 6, 50])
@pytest.mark.parametrize("per_feature", [False, True])
def test_moving_average_follows_its_recurrence(momentum, rows, per_feature):
    statistics = ClassStatistics(10, 6, momentum, per_feature)
    expected = {}
    for features, labels in random_batches(25, rows, 10, 6, offset=3.0):
        statistics.update(features, labels)
        for label in labels.unique().tolist():
            _, mean, variance = two_pass(features, labels, label)
            if label in expected:
                old_mean, old_variance = expected[label]
                d = mean - old_mean
                mean = old_mean + momentum * d
                variance = (1 - momentum) * old_variance + momentum * variance + momentum * (1 - momentum) * d**2
            expected[label] = mean, variance
    for label, (mean, variance) in expected.items():
        torch.testing.assert_close(statistics.mean[label].double(), mean, rtol=3e-6, atol=1e-6)
        torch.testing.assert_close(statistics.scatter[label], variance.sum(), rtol=1e-5, atol=1e-5)
        if per_feature:
            torch.testing.assert_close(statistics.variance[label].double(), variance, rtol=1e-4, atol=1e-5)


def test_singletons_keep_their_scatter():
    """One row per class and batch: a moving average of within-batch variances would be 0."""
    statistics = ClassStatistics(200, 4, momentum=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        statistics.update(torch.randn(4, 200, generator=generator), torch.arange(4))
    torch.testing.assert_close(statistics.scatter / 200, torch.full((4,), 0.947).double(), rtol=0.1, atol=0)


def test_moving_average_of_one_class_far_from_zero():
    statistics = ClassStatistics(300, 1, momentum=0.2)
    for features, labels in random_batches(40, 30, 300, 1, offset=1000.0):
        statistics.update(features, labels)
    torch.testing.assert_close(statistics.scatter / 300, torch.ones(1).double(), rtol=0.03, atol=0)


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_an_absent_class_keeps_its_bits(momentum):
    statistics = ClassStatistics(5, 4, momentum, per_feature=True)
    features, labels = next(random_batches(1, 60, 5, 4))
    statistics.update(features, labels)
    before = state(statistics)
    for _ in range(3):
        statistics.update(features + 9, torch.where(labels == 1, 2, labels))
    after = state(statistics)
    assert all(torch.equal(before[name][1], after[name][1]) for name in before)
    assert not torch.equal(before["mean"][2], after["mean"][2])


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_an_empty_or_ignored_batch_changes_nothing(momentum):
    statistics = ClassStatistics(5, 4, momentum, ignore_index=3)
    features, labels = next(random_batches(1, 60, 5, 4))
    statistics.update(features, labels)
    assert statistics.count[3] == 0
    before = state(statistics)
    statistics.update(features[:0], labels[:0])
    statistics.update(features * math.nan, torch.full_like(labels, 3))
    assert same_state(before, state(statistics))


@pytest.mark.parametrize("num_classes", [4, 200])
@pytest.mark.parametrize("momentum", [None, 0.3])
@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_rows_that_are_not_finite_are_left_out(value, per_feature, momentum, num_classes):
    features, labels = next(random_batches(1, 60, 5, 4))
    bad = torch.zeros(60, dtype=torch.bool)
    bad[[0, 7, 33]] = True
    clean, other = (ClassStatistics(5, num_classes, momentum, per_feature) for _ in range(2))
    with pytest.warns(
        RuntimeWarning, match=r"ClassStatistics: 3 of the rows have features that are not finite"
    ) as said:
        for _ in range(2):
            clean.update(features[~bad], labels[~bad])
            dirty = features.clone()
            dirty[bad, 2] = value
            other.update(dirty, labels)
    assert len(said) == 1 and said[0].filename == __file__
    assert other.skipped == 6 and clean.skipped == 0
    assert torch.equal(other.count, clean.count)
    for name, buffer in other.state_dict().items():
        torch.testing.assert_close(buffer, clean.state_dict()[name], rtol=1e-5, atol=1e-6)
    assert "skipped" not in other.state_dict()
    other.reset()
    assert other.skipped == 0


def test_norm_statistics_leave_out_what_is_not_finite():
    features, clean, other = torch.randn(6, 3), NormStatistics(), NormStatistics()
    clean.update(features[2:])
    features[0], features[1, 2] = math.nan, -math.inf
    with pytest.warns(RuntimeWarning, match=r"2 of the rows have norms that are not finite"):
        other.update(features)
    assert other.skipped == 2 and same_state(state(clean), state(other))


@pytest.mark.parametrize("num_classes", [3, 200])
@pytest.mark.parametrize("per_feature", [False, True])
def test_buffers_loaded_by_assignment_keep_their_layout(per_feature, num_classes):
    batches = list(random_batches(3, 20, 6, 3))
    plain, other = (ClassStatistics(6, num_classes, 0.3, per_feature) for _ in range(2))
    plain.update(*batches[0])
    loaded = {name: torch.stack([b, b + 1], -1)[..., 0] for name, b in plain.state_dict().items()}
    other.load_state_dict(loaded, assign=True)
    assert not other.mean.is_contiguous()
    for batch in batches[1:]:
        plain.update(*batch)
        other.update(*batch)
    for name, buffer in other.state_dict().items():
        torch.testing.assert_close(buffer, plain.state_dict()[name], rtol=1e-6, atol=1e-6)


def test_another_default_device_changes_nothing():
    features, labels = next(random_batches(1, 20, 6, 4))
    plain, other = ClassStatistics(6, 4), ClassStatistics(6, 4)
    norms, other_norms = NormStatistics(), NormStatistics()
    plain.update(features, labels)
    norms.update(features, labels)
    with torch.device("meta"):
        other.update(features, labels)
        other_norms.update(features, labels)
    assert same_state(state(plain), state(other)) and same_state(state(norms), state(other_norms))


@pytest.mark.parametrize("num_classes", [4, 400])
def test_fake_tensors_pass_through(num_classes):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        statistics, norms = ClassStatistics(6, num_classes, 0.3), NormStatistics()
        features, labels = torch.randn(20, 6), torch.zeros(20, dtype=torch.int64)
        statistics.update(features, labels)
        norms.update(features, labels)
        assert statistics.mean.shape == (num_classes, 6) and norms.mean.shape == ()
    statistics, norms = ClassStatistics(6, num_classes, 0.3), NormStatistics()
    with FakeTensorMode(allow_non_fake_inputs=True):
        statistics.update(features, labels)


def test_repr_shows_what_differs_from_the_defaults():
    assert repr(ClassStatistics(2, 3)) == "ClassStatistics(in_features=2, num_classes=3)"
    shown = repr(ClassStatistics(2, 3, 0.5, True, ignore_index=-1))
    assert shown == "ClassStatistics(in_features=2, num_classes=3, momentum=0.5, per_feature=True, ignore_index=-1)"
    assert "momentum" not in repr(NormStatistics()).split("\n")[0]


@pytest.mark.parametrize("per_feature", [False, True])
def test_merge_equals_one_pass(per_feature):
    batches = list(random_batches(6, 50, 12, 5, offset=2.0))
    batches[0][1].fill_(1)
    parts = [ClassStatistics(12, 5, per_feature=per_feature) for _ in range(2)]
    for index, (features, labels) in enumerate(batches):
        parts[index > 0].update(features, labels)
    before = state(parts[1])
    parts[0].merge(parts[1])
    assert same_state(before, state(parts[1]))
    check_exact(parts[0], *(torch.cat(part) for part in zip(*batches, strict=True)), rtol=2e-6)
    parts[0].merge(ClassStatistics(12, 5, per_feature=per_feature))
    empty = ClassStatistics(12, 5, per_feature=per_feature)
    empty.merge(parts[0])
    assert torch.equal(empty.count, parts[0].count) and torch.equal(empty.mean, parts[0].mean)
    torch.testing.assert_close(empty.scatter, parts[0].scatter, rtol=1e-7, atol=0)


def test_merge_refuses_what_it_cannot_add():
    statistics = ClassStatistics(3, 2)
    with pytest.raises(TypeError, match="other must be a ClassStatistics; got int"):
        statistics.merge(3)
    with pytest.raises(ValueError, match=r"other must have .* = \(2, 3, False\), as here; got \(2, 4, False\)"):
        statistics.merge(ClassStatistics(4, 2))
    with pytest.raises(ValueError, match=r"momentum must be None for merge\(\), .*; got 0.5"):
        statistics.merge(ClassStatistics(3, 2, momentum=0.5))
    with pytest.raises(ValueError, match=r"momentum must be None for all_reduce\(\)"):
        ClassStatistics(3, 2, momentum=0.5).all_reduce()


@pytest.mark.parametrize("copied", ["state_dict", "deepcopy", "pickle"])
def test_resume_is_bit_exact(copied, tmp_path):
    batches = list(random_batches(8, 20, 6, 4))
    whole = ClassStatistics(6, 4, momentum=0.1, per_feature=True)
    half = ClassStatistics(6, 4, momentum=0.1, per_feature=True)
    for batch in batches[:4]:
        whole.update(*batch)
        half.update(*batch)
    if copied == "state_dict":
        torch.save(half.state_dict(), tmp_path / "state.pt")
        half = ClassStatistics(6, 4, momentum=0.1, per_feature=True)
        half.load_state_dict(torch.load(tmp_path / "state.pt"))
    else:
        half = copy.deepcopy(half) if copied == "deepcopy" else pickle.loads(pickle.dumps(half))
    for batch in batches[4:]:
        whole.update(*batch)
        half.update(*batch)
    assert same_state(state(whole), state(half))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_buffers_are_moved_in_place_and_never_get_gradients(mode):
    statistics = ClassStatistics(6, 4, per_feature=True)
    before = {name: (id(buffer), buffer.data_ptr()) for name, buffer in statistics.named_buffers()}
    features, labels = next(random_batches(1, 20, 6, 4))
    features.requires_grad_()
    with mode():
        statistics.update(features * 2, labels)
        statistics.reset()
        statistics.update(features * 2, labels)
    assert before == {name: (id(buffer), buffer.data_ptr()) for name, buffer in statistics.named_buffers()}
    assert statistics.count.sum() == 20
    assert not any(buffer.requires_grad for buffer in statistics.buffers())
    assert features.grad is None


def test_half_precision_never_reaches_the_state():
    statistics = ClassStatistics(6, 4, per_feature=True)
    features, labels = next(random_batches(1, 20, 6, 4, offset=100.0))
    statistics.update(features, labels)
    before = state(statistics)
    for change in (
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.type(torch.float16),
        lambda m: torch.nn.Sequential(m).half()[0],
        lambda m: m.double().float(),
    ):
        assert same_state(before, state(change(statistics)))
    statistics.half().update(features.half(), labels)
    assert statistics.count.sum() == 40
    assert ClassStatistics(6, 4).half().to("meta").mean.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_features_are_widened(dtype):
    features, labels = next(random_batches(1, 300, 6, 4, offset=5.0))
    features = features.to(dtype)
    statistics = ClassStatistics(6, 4)
    statistics.update(features, labels.to(torch.uint8))
    check_exact(statistics, features, labels)


def test_reset_forgets_everything():
    statistics = ClassStatistics(6, 4, momentum=0.5, per_feature=True)
    fresh = state(statistics)
    for batch in random_batches(3, 20, 6, 4):
        statistics.update(*batch)
    statistics.reset()
    assert same_state(fresh, state(statistics))


def test_update_compiles_to_one_graph():
    batches = list(random_batches(3, 20, 6, 4))
    plain, compiled = ClassStatistics(6, 4, 0.3), ClassStatistics(6, 4, 0.3)
    step = torch.compile(compiled.update, fullgraph=True, backend="aot_eager")
    for batch in batches:
        plain.update(*batch)
        step(*batch)
    assert torch.equal(plain.count, compiled.count)
    # The kernel adds in another order than what is traced.
    torch.testing.assert_close(plain.mean, compiled.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(plain.scatter, compiled.scatter, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.zeros(3, 5), torch.zeros(3).long()),
            ValueError,
            r"features must have shape \(B, 4\); got \(3, 5\)",
        ),
        ((torch.zeros(4), torch.zeros(4).long()), ValueError, r"features must have shape \(B, 4\); got \(4,\)"),
        (
            (torch.zeros(3, 4).long(), torch.zeros(3).long()),
            TypeError,
            "features must be a floating-point tensor; got torch.int64",
        ),
        (([1.0], torch.zeros(3).long()), TypeError, "features must be a floating-point tensor; got list"),
        ((torch.zeros(3, 4), torch.zeros(3)), TypeError, "labels must be a tensor of integers; got torch.float32"),
        ((torch.zeros(3, 4), [0, 1, 2]), TypeError, "labels must be a tensor of integers; got list"),
        ((torch.zeros(3, 4), torch.zeros(2).long()), ValueError, r"labels must have shape \(3,\); got \(2,\)"),
        ((torch.zeros(3, 4), torch.zeros(3, 1).long()), ValueError, r"labels must have shape \(3,\); got \(3, 1\)"),
        (
            (torch.zeros(3, 4), torch.zeros(3).long().to("meta")),
            ValueError,
            "labels must be on the device of features, cpu; got meta",
        ),
        (
            (torch.zeros(3, 4, device="meta"), torch.zeros(3).long().to("meta")),
            ValueError,
            "features must be on the device of the statistics, cpu; got meta",
        ),
        ((torch.zeros(3, 4), torch.tensor([0, -1, 2])), IndexError, "labels must lie in .*; got label -1 at row 1"),
        ((torch.zeros(3, 4), torch.tensor([0, 1, 3])), IndexError, "labels must lie in .*; got label 3 at row 2"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(arguments, error, message):
    statistics = ClassStatistics(4, 3)
    before = state(statistics)
    with pytest.raises(error, match=message):
        statistics.update(*arguments)
    assert same_state(before, state(statistics))


@pytest.mark.parametrize("momentum", [-0.1, 1.1, math.nan, math.inf])
def test_momentum_outside_its_range(momentum):
    for make in (lambda: ClassStatistics(4, 3, momentum), lambda: NormStatistics(momentum)):
        with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\]; got "):
            make()


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (-1, 3)])
def test_sizes_below_one(sizes):
    with pytest.raises(ValueError, match=r"(in_features|num_classes) must be at least 1; got"):
        ClassStatistics(*sizes)


def test_arguments_of_the_wrong_kind():
    with pytest.raises(TypeError, match=r"in_features must be an integer; got float"):
        ClassStatistics(2.0, 3)
    with pytest.raises(TypeError, match=r"momentum must be a number; got str"):
        ClassStatistics(2, 3, "0.1")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6),
    st.integers(1, 20),
    st.integers(1, 8),
    st.sampled_from([None, 0.0, 0.25, 1.0]),
    st.booleans(),
)
def test_any_sequence_of_batches(sizes, width, num_classes, momentum, per_feature):
    statistics = ClassStatistics(width, num_classes, momentum, per_feature)
    batches = [next(random_batches(1, rows, width, num_classes, seed=i)) for i, rows in enumerate(sizes)]
    for features, labels in batches:
        statistics.update(features, labels)
        assert (statistics.scatter >= 0).all() and statistics.scatter.isfinite().all()
    if momentum is None:
        features, labels = (torch.cat(part) for part in zip(*batches, strict=True))
        check_exact(statistics, features, labels, rtol=3e-6)
    if per_feature:
        torch.testing.assert_close(statistics.variance.double().sum(1), statistics.scatter, rtol=1e-5, atol=1e-5)


def _rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    batches = list(random_batches(6, 30, 12, 5, offset=50.0))
    # Class 4 is seen by one rank only, and class 3 first by one and then by the other.
    for index, (_, labels) in enumerate(batches):
        labels[:15][labels[:15] == 4] = 0
        labels[(labels == 3)] = 3 if index else 2
    found = {}
    for momentum in (None, 0.3):
        for per_feature in (False, True):
            statistics = ClassStatistics(12, 5, momentum, per_feature)
            for features, labels in batches:
                half = slice(0, 15) if rank == 0 else slice(15, 30)
                statistics.update(features[half], labels[half], group=dist.group.WORLD)
            found[momentum, per_feature] = statistics
    apart = ClassStatistics(12, 5)
    for features, labels in batches[rank::2]:
        apart.update(features, labels)
    apart.all_reduce()
    found["apart"] = apart
    norms = NormStatistics(0.3)
    for features, _ in batches:
        norms.update(features[rank::2], group=dist.group.WORLD)
    found["norms"] = norms
    torch.save((batches, found), os.path.join(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    (batches, first), (_, second) = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    assert all(same_state(state(first[key]), state(second[key])) for key in first)
    for (momentum, per_feature), distributed in list(first.items())[:4]:
        single = ClassStatistics(12, 5, momentum, per_feature)
        for batch in batches:
            single.update(*batch)
        for name, buffer in single.named_buffers():
            torch.testing.assert_close(getattr(distributed, name), buffer, rtol=1e-5, atol=1e-6)
    check_exact(first["apart"], *(torch.cat(part) for part in zip(*batches, strict=True)), rtol=2e-6)
    norms = NormStatistics(0.3)
    for features, _ in batches:
        norms.update(features)
    torch.testing.assert_close(first["norms"].mean, norms.mean)
    torch.testing.assert_close(first["norms"].deviation, norms.deviation, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("norm", "momentum"), [(1.0, 0.5), (2.0, 0.1), (math.inf, None), (1.0, 0.0), (1.0, 1.0)])
def test_norm_statistics_follow_their_recurrence(norm, momentum):
    statistics = NormStatistics(momentum, norm=norm)
    mean = variance = None
    seen = 0
    for rows in (1, 1, 7, 20, 1):
        features = torch.randn(rows, 30, generator=torch.Generator().manual_seed(rows + seen))
        statistics.update(features)
        norms = torch.linalg.vector_norm(features.double(), norm, dim=1)
        new_mean, new_variance = norms.mean(), norms.var(unbiased=False)
        if mean is None:
            mean, variance = new_mean, new_variance
        else:
            w = rows / (seen + rows) if momentum is None else momentum
            d = new_mean - mean
            mean, variance = mean + w * d, (1 - w) * variance + w * new_variance + w * (1 - w) * d**2
        seen += rows
        torch.testing.assert_close(statistics.mean.double(), mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(statistics.deviation, variance.sqrt(), rtol=1e-4, atol=1e-3)
    assert statistics.count == seen


@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_norm_statistics_leave_ignored_rows_out(ignore_index):
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(9) % 3
    labels[::2] = ignore_index
    features[labels == ignore_index] = math.nan
    statistics = NormStatistics(ignore_index=ignore_index)
    statistics.update(features.half(), labels)
    norms = features[labels != ignore_index].half().double().abs().sum(1)
    torch.testing.assert_close(statistics.mean.double(), norms.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.deviation, norms.std(unbiased=False), rtol=1e-5, atol=0)
    before = state(statistics)
    statistics.update(features, torch.full_like(labels, ignore_index))
    statistics.update(features[:0])
    assert same_state(before, state(statistics))
    restored = NormStatistics(ignore_index=ignore_index)
    restored.load_state_dict(before)
    assert same_state(before, state(restored.half()))
    statistics.reset()
    assert statistics.count == 0


def test_norm_statistics_refuse_bad_arguments():
    with pytest.raises(ValueError, match=r"norm must be at least 1, or math.inf; got 0\.5"):
        NormStatistics(norm=0.5)
    with pytest.raises(ValueError, match=r"norm must be .*; got nan"):
        NormStatistics(norm=math.nan)
    with pytest.raises(ValueError, match=r"features must have shape \(B, D\); got \(3,\)"):
        NormStatistics().update(torch.zeros(3))
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\); got \(2,\)"):
        NormStatistics().update(torch.zeros(3, 2), torch.zeros(2).long())


class TestFewRowsOfManyClasses:
    """Where a batch can hold few of the classes, only these are read and written."""

    @pytest.fixture
    def dense(self, monkeypatch):
        def run(statistics, batches):
            with monkeypatch.context() as patch:
                patch.setattr("fusedloss.losses.class_statistics._SPARSE_CLASSES", math.inf)
                for features, labels in batches:
                    statistics.update(features, labels)
            return statistics

        return run

    @pytest.mark.parametrize("per_feature", [False, True])
    @pytest.mark.parametrize("momentum", [None, 0.3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_the_same_as_going_through_every_class(self, dense, dtype, momentum, per_feature):
        batches = [(x.to(dtype), y) for x, y in random_batches(6, 9, 20, 100, offset=3.0)]
        batches[2][1][[0, 4]] = -100
        sparse, full = (ClassStatistics(20, 100, momentum, per_feature) for _ in range(2))
        if dtype == torch.float64:
            sparse, full = sparse.double(), full.double()
        for features, labels in batches:
            before, absent = state(sparse), torch.ones(100, dtype=torch.bool)
            absent[labels[labels >= 0]] = False
            sparse.update(features, labels)
            assert all(torch.equal(buffer[absent], before[name][absent]) for name, buffer in state(sparse).items())
        dense(full, batches)
        assert torch.equal(sparse.count, full.count)
        for name, buffer in state(sparse).items():
            torch.testing.assert_close(buffer, state(full)[name], rtol=1e-6, atol=1e-6)
            assert buffer.dtype == state(full)[name].dtype

    def test_rows_that_are_all_left_out_change_nothing(self):
        statistics = ClassStatistics(4, 50)
        statistics.update(torch.randn(3, 4), torch.full((3,), -100))
        statistics.update(torch.randn(0, 4), torch.zeros(0, dtype=torch.int64))
        assert not statistics.count.any() and not statistics.mean.any()

    @pytest.mark.parametrize("label", [-1, 50])
    def test_a_label_outside_the_classes_is_named_and_nothing_changes(self, label):
        statistics = ClassStatistics(4, 50)
        with pytest.raises(IndexError, match=rf"labels must lie in \[0, 50\) .*; got label {label} at row 1"):
            statistics.update(torch.randn(3, 4), torch.tensor([0, label, 2]))
        assert not statistics.count.any()
