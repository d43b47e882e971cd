"""class_stats, every CPU backend and SIMD level, against the two-pass formula in float64."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedloss import backends, ops
from fusedloss.backends.cpp import extension, unavailable_reason

CPP = pytest.param("cpp", marks=pytest.mark.skipif(unavailable_reason("cpu") is not None, reason="no compiled module"))
BACKENDS = ["reference", CPP]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with backends.backend(request.param):
        yield request.param


def compute_dtype(features):
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def random_batch(rows, width, num_classes, dtype=torch.float32, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(num_classes, width, generator=generator) + offset
    labels = torch.randint(num_classes, (rows,), generator=generator)
    features = centers[labels] + torch.randn(rows, width, generator=generator)
    return features.to(dtype), labels


def start(features, num_classes, seen=False):
    """(shift, seen) of classes without a mean, or with one that is a little off."""
    shift = torch.zeros(num_classes, features.shape[1], dtype=compute_dtype(features))
    if seen:
        shift += torch.randn(shift.shape, generator=torch.Generator().manual_seed(7), dtype=shift.dtype)
    return shift, torch.full((num_classes,), int(seen))


def two_pass(features, labels, num_classes):
    """{class: (count, mean, scatter, variance)} in float64."""
    found = {}
    for label in labels.unique().tolist():
        if 0 <= label < num_classes:
            rows = features[labels == label].double()
            variance = (rows - rows.mean(0)).square().mean(0)
            found[label] = len(rows), rows.mean(0), variance.sum(), variance
    return found


def check_against_two_pass(features, labels, num_classes, shift, seen, ignore_index=-100, rtol=None):
    """Mean and scatter that follow from the sums, for both kinds of squares; absent classes have zeros."""
    kept = labels != ignore_index
    expected = two_pass(features[kept], labels[kept], num_classes)
    rtol = rtol or (1e-12 if features.dtype == torch.float64 else 1e-6)
    for per_feature in (False, True):
        used = shift.clone()
        count, total, square, _ = ops.class_stats(features, labels, used, seen, ignore_index, per_feature)
        assert count.dtype == torch.int64 and total.dtype == square.dtype == shift.dtype
        assert square.shape == (total.shape if per_feature else total.shape[:1])
        present = torch.zeros(num_classes, dtype=torch.bool)
        present[list(expected)] = True
        assert not total[~present].any() and not square[~present].any() and not count[~present].any()
        assert torch.equal(used[~present], shift[~present])
        for label, (rows, mean, scatter, variance) in expected.items():
            first = features[(labels == label).nonzero()[0, 0]].to(shift.dtype)
            assert torch.equal(used[label], shift[label] if seen[label] else first)
            deviation = total[label].double() / rows
            found = square[label].double() / rows - (deviation.square() if per_feature else deviation.square().sum())
            scale = (square[label].double() / rows).clamp(min=1e-300)
            torch.testing.assert_close(used[label] + deviation, mean, rtol=1e-6, atol=1e-9 + rtol * 10)
            assert ((found - (variance if per_feature else scatter)).abs() <= rtol * scale).all()
            assert count[label] == rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "num_classes"),
    [(0, 3, 2), (1, 1, 1), (1, 40, 3), (7, 5, 7), (50, 67, 5), (900, 130, 1), (3000, 9, 4), (300, 64, 290)],
)
def test_sums_give_mean_and_scatter(backend, dtype, seen, rows, width, num_classes):
    features, labels = random_batch(rows, width, num_classes, dtype)
    check_against_two_pass(features, labels, num_classes, *start(features, num_classes, seen))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 63, 64, 65, 129, 700])
def test_every_length_of_a_class(backend, rows):
    features, labels = random_batch(rows + 3, 33, 1)
    labels[rows:] = 1
    check_against_two_pass(features, labels, 2, *start(features, 2))


def test_all_labels_distinct(backend):
    features, _ = random_batch(60, 17, 3)
    labels = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shift, seen = start(features, 60)
    count, total, square, _ = ops.class_stats(features, labels, shift, seen, -100, False)
    assert (count == 1).all() and not total.any() and not square.any()
    assert torch.equal(shift[labels], features)


@pytest.mark.parametrize("seen", [False, True])
def test_a_thousand_spreads_from_zero(backend, seen):
    features, labels = random_batch(6000, 48, 10, offset=1000.0)
    shift, count = start(features, 10, seen)
    shift += 1000.0
    check_against_two_pass(features, labels, 10, shift, count)


@pytest.mark.parametrize("arrangement", ["sorted", "skewed", "reversed"])
def test_order_of_the_rows_does_not_matter(backend, arrangement):
    features, labels = random_batch(5000, 24, 20, offset=30.0)
    if arrangement == "skewed":
        labels[torch.rand(5000, generator=torch.Generator().manual_seed(3)) < 0.9] = 4
    else:
        order = labels.sort(descending=arrangement == "reversed").indices
        features, labels = features[order], labels[order]
    check_against_two_pass(features, labels, 20, *start(features, 20))


def test_a_long_class_is_summed_to_half_a_unit_in_the_last_place(backend):
    features = torch.rand(150_000, 40, generator=torch.Generator().manual_seed(0)) + 3.0
    labels = torch.zeros(150_000, dtype=torch.int64)
    shift, seen = torch.zeros(1, 40), torch.ones(1, dtype=torch.int64)
    _, total, square, _ = ops.class_stats(features, labels, shift, seen, -100, True)
    torch.testing.assert_close(total[0].double(), features.double().sum(0), rtol=6.5e-8, atol=0)
    torch.testing.assert_close(square[0].double(), features.double().square().sum(0), rtol=6.5e-8, atol=0)


def test_a_wide_row_is_summed_without_drift(backend):
    features = torch.rand(3, 70_001, generator=torch.Generator().manual_seed(0)) + 3.0
    shift, seen = torch.zeros(1, 70_001), torch.ones(1, dtype=torch.int64)
    _, _, square, _ = ops.class_stats(features, torch.zeros(3, dtype=torch.int64), shift, seen, -100, False)
    torch.testing.assert_close(square[0].double(), features.double().square().sum(), rtol=8e-8, atol=0)


@pytest.mark.parametrize("ignore_index", [-100, 2, 77])
def test_ignored_rows_are_left_out(backend, ignore_index):
    features, labels = random_batch(80, 6, 5)
    labels[::3] = ignore_index
    features[::3] = float("nan")
    check_against_two_pass(features, labels, 5, *start(features, 5), ignore_index=ignore_index)


def test_all_rows_ignored(backend):
    features, labels = random_batch(9, 6, 5)
    shift, seen = start(features, 5)
    found = ops.class_stats(features, torch.full_like(labels, -100), shift, seen, -100, False)
    assert not any(part.any() for part in (*found, shift))


@pytest.mark.parametrize("label", [-1, 5, -101, 2**40])
def test_a_bad_label_names_its_row_and_changes_nothing(backend, label):
    features, labels = random_batch(20, 6, 5)
    labels[2], labels[11] = -100, label
    shift, seen = start(features, 5)
    with pytest.raises(IndexError, match=rf"labels must lie in \[0, 5\) .*-100; got label {label} at row 11"):
        ops.class_stats(features, labels, shift, seen, -100, False)
    assert not shift.any()


NOT_USABLE = [float("nan"), float("inf"), -float("inf"), 2.0**52]


@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("value", NOT_USABLE)
def test_skipped_are_rows_that_are_not_finite(backend, value, seen, per_feature):
    features, labels = random_batch(400, 19, 5)
    first = int((labels == labels[50]).nonzero()[0, 0])
    bad = torch.zeros(400, dtype=torch.bool)
    bad[[first, 50, 301]] = True
    clean = features.clone()
    features[first, 18], features[50, 7], features[301] = value, -value, value
    labels[300], features[300] = -100, value
    shift, expected_shift = start(features, 5, seen)[0], start(features, 5, seen)[0]
    count = torch.full((5,), int(seen))
    found = ops.class_stats(features, labels, shift, count, -100, per_feature)
    expected = ops.class_stats(clean[~bad], labels[~bad], expected_shift, count, -100, per_feature)
    assert found.skipped == 3 and expected.skipped == 0
    assert found.skipped.dtype == torch.int64 and found.skipped.shape == ()
    assert torch.equal(found.count, expected.count) and torch.equal(shift, expected_shift)
    torch.testing.assert_close(found.sum, expected.sum, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.square, expected.square, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_skipped_in_every_dtype_and_length_of_a_class(backend, dtype):
    for rows in (1, 2, 5, 64, 200):
        features, labels = random_batch(rows + 9, 35, 1, dtype)
        labels[rows:] = 1
        features[rows // 2, 34] = float("nan")
        features[-9:] = float("inf")
        shift, seen = start(features, 2)
        count, total, square, skipped = ops.class_stats(features, labels, shift, seen, -100, False)
        assert skipped == 10 and count.tolist() == [rows - 1, 0]
        kept = torch.cat([features[: rows // 2], features[rows // 2 + 1 : rows]]).double()
        torch.testing.assert_close(
            total[0].double(), (kept - shift[0].double()).sum(0), rtol=1e-5, atol=1e-4, check_dtype=False
        )
        assert not total[1].any() and not square[1].any() and not shift[1].any()


def test_skipped_rows_leave_the_same_bits_on_reruns_and_threads(backend):
    features, labels = random_batch(6000, 50, 9)
    labels[:4000] = 3
    features[::17, 3] = float("nan")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (threads, 1, 3):
            torch.set_num_threads(count)
            shift, seen = start(features, 9)
            results.append((shift, *ops.class_stats(features, labels, shift, seen, -100, False)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_large_values_that_are_usable_count(backend):
    features = torch.tensor([[2.0**50], [-(2.0**50)]])
    shift, seen = torch.zeros(1, 1), torch.ones(1, dtype=torch.int64)
    count, total, square, skipped = ops.class_stats(features, torch.zeros(2).long(), shift, seen, -100, False)
    assert count == 2 and skipped == 0 and total == 0 and square == 2.0**101


def strided(features, layout):
    rows, width = features.shape
    if layout == "transposed":
        return features.t().contiguous().t()
    if layout == "every other row":
        return torch.stack([features, torch.full_like(features, float("nan"))], 1).flatten(0, 1)[::2]
    if layout == "columns of a wider tensor":
        return torch.nn.functional.pad(features, (3, 5), value=float("nan"))[:, 3 : 3 + width]
    if layout == "every other column":
        return torch.stack([features, torch.full_like(features, float("nan"))], 2).flatten(1)[:, ::2]
    return features[:1].expand(rows, width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "layout", ["transposed", "every other row", "columns of a wider tensor", "every other column", "expanded"]
)
def test_strides(backend, dtype, layout):
    features, labels = random_batch(70, 37, 6, dtype)
    features = strided(features, layout)
    labels = torch.stack([labels, torch.full_like(labels, 99)], 1)[:, 0]
    expected = ops.class_stats(features.clone(memory_format=torch.contiguous_format), labels.contiguous(),
                               *start(features, 6, True), -100, True)  # fmt: skip
    found = ops.class_stats(features, labels, *start(features, 6, True), -100, True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_one_column_of_any_stride(backend):
    features, labels = random_batch(40, 5, 3)
    check_against_two_pass(features[:, 2:3], labels, 3, *start(features[:, :1], 3))


def test_reruns_and_thread_counts_give_the_same_bits(backend):
    features, labels = random_batch(6000, 50, 9)
    labels[:4000] = 3
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (threads, threads, 1, 3, 7):
            torch.set_num_threads(count)
            shift, seen = start(features, 9)
            results.append((shift, *ops.class_stats(features, labels, shift, seen, -100, False)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", BACKENDS)
def test_any_shape(name, data):
    rows, width, num_classes = (data.draw(st.integers(low, high)) for low, high in ((0, 300), (1, 90), (1, 30)))
    dtype = data.draw(st.sampled_from(DTYPES))
    features, labels = random_batch(rows, width, num_classes, dtype, seed=data.draw(st.integers(0, 9)))
    ignored = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    labels[torch.rand(rows, generator=torch.Generator().manual_seed(rows)) < ignored] = -100
    shift, seen = start(features, num_classes, data.draw(st.booleans()))
    seen[data.draw(st.integers(0, num_classes - 1))] = data.draw(st.integers(0, 1))
    with backends.backend(name):
        check_against_two_pass(features, labels, num_classes, shift, seen)


def advanced_in_double(before, batch, momentum):
    """Count, mean, scatter and variance of each class after a batch, from the rows' own moments."""
    (features, labels), (count, mean, scatter, variance) = batch, (part.clone() for part in before)
    mean, variance = mean.double(), variance.double()
    for label in labels.unique():
        rows = features[labels == label].double()
        new = int(count[label]) == 0
        weight = len(rows) / (int(count[label]) + len(rows)) if momentum is None else 1.0 if new else momentum
        center = rows.mean(0)
        distance = torch.zeros_like(center) if new else (center - mean[label]).square()
        spread = (rows - center).square().mean(0)
        variance[label] += weight * (spread + (1 - weight) * distance - variance[label])
        scatter[label] += weight * (spread.sum() + (1 - weight) * distance.sum() - scatter[label])
        mean[label] = center if new else mean[label] + weight * (center - mean[label])
        count[label] += len(rows)
    return count, mean, scatter, variance


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [None, 0.3, 0.0, 1.0])
@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("width", [1, 17, 300])
def test_update_is_the_moments_of_all_rows(name, dtype, momentum, per_feature, width):
    num_classes = 7
    count = torch.tensor([0, 4, 0, 9, 1, 0, 3])
    mean = 1000 + torch.randn(num_classes, width, dtype=dtype)
    variance = torch.rand(num_classes, width, dtype=dtype)
    scatter = variance.double().sum(1)
    batch = 1000 + torch.randn(60, width).to(dtype), torch.randint(num_classes - 2, (60,))
    expected = advanced_in_double((count, mean, scatter, variance), batch, momentum)
    state = ops.ClassState(count.clone(), mean.clone(), scatter.clone(), variance.clone() if per_feature else None)
    with backends.backend(name):
        shift = state.mean if per_feature else state.mean.clone()
        found = ops.class_stats(*batch, shift, state.count, -100, per_feature)
        ops.update_class_stats(state, found, None if shift is state.mean else shift, momentum)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    for got, wanted in zip(state, expected, strict=True):
        if got is not None:
            torch.testing.assert_close(got.double(), wanted.double(), **tolerance)
    absent = torch.bincount(batch[1], minlength=num_classes) == 0
    assert torch.equal(state.mean[absent], mean[absent])
    assert torch.equal(state.scatter[absent], scatter[absent])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [None, 0.3])
@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("mean_dtype", [torch.float32, torch.float64])
def test_update_from_rows_is_the_two_steps(backend, dtype, momentum, per_feature, mean_dtype):
    features, labels = random_batch(90, 19, 6, dtype)
    features[3, 2], labels[5] = float("nan"), -100
    if mean_dtype == torch.float64:
        features = features.double()

    def fresh():
        mean = torch.randn(7, 19, dtype=mean_dtype, generator=torch.Generator().manual_seed(0))
        count = torch.tensor([0, 3, 0, 5, 1, 0, 2])
        return ops.ClassState(count, mean, torch.ones(7).double(), mean.square() if per_feature else None)

    one, two = fresh(), fresh()
    skipped = ops.update_from_rows(one, features, labels, -100, momentum)
    shift = two.mean.to(ops.compute_dtype(features.dtype))
    batch = ops.class_stats(features, labels, shift, two.count, -100, per_feature)
    ops.update_class_stats(two, batch, None if shift is two.mean else shift, momentum)
    assert skipped == batch.skipped == 1 and skipped.dtype == torch.int64 and skipped.shape == ()
    assert one.count.sum() == 88 + 11
    for got, expected in zip(one, two, strict=True):
        assert (got is None and expected is None) or torch.equal(got, expected)


def test_update_from_rows_changes_nothing_at_a_bad_label(backend):
    features, labels = random_batch(20, 6, 5)
    labels[11] = 5
    state = ops.ClassState(torch.zeros(5).long(), torch.zeros(5, 6), torch.zeros(5).double(), None)
    with pytest.raises(IndexError, match="got label 5 at row 11"):
        ops.update_from_rows(state, features, labels, -100, None)
    assert not any(part.any() for part in state[:3])


@pytest.mark.parametrize("momentum", [None, 0.3])
@pytest.mark.parametrize("per_feature", [False, True])
def test_buffers_of_any_layout(backend, momentum, per_feature):
    def spread_out(tensor):
        return torch.stack([tensor, torch.full_like(tensor, 77)], -1)[..., 0]

    features, labels = random_batch(60, 8, 5)
    states = []
    for layout in (torch.clone, spread_out, lambda t: t.t().contiguous().t() if t.dim() == 2 else spread_out(t)):
        mean, scatter, count = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), torch.ones(5).double(), [
            0, 3, 0, 5, 1]  # fmt: skip
        variance = torch.ones(5, 8) if per_feature else None
        parts = (torch.tensor(count), mean, scatter, variance)
        state = ops.ClassState(*(None if part is None else layout(part) for part in parts))
        for _ in range(2):
            batch = ops.class_stats(features, labels, state.mean, state.count, -100, per_feature)
            ops.update_class_stats(state, batch, None, momentum)
        states.append(state)
    for state in states[1:]:
        for part, expected in zip(state, states[0], strict=True):
            if part is not None:
                torch.testing.assert_close(part, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_negative_views_are_read_as_they_are(backend, dtype):
    z = torch.randn(40, 6, dtype=torch.complex64 if dtype == torch.float32 else torch.complex128)
    features, labels = z.conj().imag, torch.arange(40) % 4
    assert features.is_neg()
    for got, expected in zip(
        ops.class_stats(features, labels, *start(features.clone(), 4), -100, False),
        ops.class_stats(-z.imag, labels, *start(features.clone(), 4), -100, False),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)
    values = z[:, 0].conj().imag
    torch.testing.assert_close(ops.moments(values, None, -100), ops.moments(-z[:, 0].imag, None, -100))
    torch.testing.assert_close(ops.row_magnitudes(features), z.imag.abs().sum(1))


@pytest.mark.parametrize("name", BACKENDS)
def test_update_of_a_float32_state_by_float64_features(name):
    state = ops.ClassState(torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3), torch.zeros(2).double(), None)
    features = torch.randn(10, 3, dtype=torch.float64)
    with backends.backend(name):
        shift = state.mean.double()
        found = ops.class_stats(features, torch.zeros(10, dtype=torch.int64), shift, state.count, -100, False)
        ops.update_class_stats(state, found, shift, None)
    torch.testing.assert_close(state.mean[0], features.mean(0).float())
    torch.testing.assert_close(state.scatter[0], features.var(0, correction=0).sum())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 300, 5000])
def test_row_magnitudes_are_sums_of_magnitudes(name, dtype, width):
    torch.manual_seed(width)
    wide = (3 * torch.randn(7, 2 * width)).to(dtype)
    for rows in (wide[:, :width], wide[:, ::2], wide[:0, :width], wide[:, :width].t().contiguous().t()):
        with backends.backend(name):
            found = ops.row_magnitudes(rows)
        expected = rows.double().abs().sum(1)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found.double(), expected, rtol=1e-12 if dtype == torch.float64 else 3e-7, atol=0)


@pytest.mark.parametrize("name", BACKENDS)
def test_row_magnitudes_of_nan_and_infinity_stay_in_their_rows(name):
    rows = torch.ones(4, 33)
    rows[1, 32], rows[2, 5] = float("nan"), -float("inf")
    with backends.backend(name):
        found = ops.row_magnitudes(rows)
    torch.testing.assert_close(found, torch.tensor([33.0, float("nan"), float("inf"), 33.0]), equal_nan=True)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label_dtype", [None, torch.int64, torch.uint8])
def test_moments_of_the_values_kept(name, dtype, label_dtype):
    values = (1000 + torch.randn(500)).to(dtype)[::2]
    labels = None if label_dtype is None else (torch.arange(250) % 3).to(label_dtype)
    kept = values if labels is None else values[labels != 2]
    if labels is not None:
        values[2] = float("nan")
    with backends.backend(name):
        count, mean, variance, _ = ops.moments(values, labels, 2).tolist()
        nothing = ops.moments(values[:0], None, 2).tolist()
        assert ops.moments(values, torch.full((250,), 2), 2).tolist() == nothing == [0, 0, 0, 0]
    assert count == len(kept)
    torch.testing.assert_close(mean, float(kept.double().mean()), rtol=1e-14, atol=0)
    torch.testing.assert_close(variance, float(kept.double().var(correction=0)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_leave_out_what_is_not_finite(name, dtype):
    values = torch.arange(8.0).to(dtype)
    labels = torch.tensor([0, 0, 0, -100, 0, 0, 0, 0])
    values[[1, 3, 5]] = torch.tensor([float("nan"), float("inf"), -float("inf")]).to(dtype)
    with backends.backend(name):
        found = ops.moments(values, labels, -100).tolist()
        assert ops.moments(values[1:2], None, -100).tolist() == [0, 0, 0, 1]
    kept = torch.tensor([0.0, 2, 4, 6, 7])
    torch.testing.assert_close(found, [5.0, float(kept.mean()), float(kept.var(correction=0)), 2.0])


HELD_TO_A_LEVEL = """
import sys, torch
from fusedloss import _C
print(_C.level(), flush=True)
import pytest
selection = "cpp and (sums_give or length or spreads or long or wide or magnitudes or update or skipped)"
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k", selection, sys.argv[1]]))
"""


@pytest.mark.skipif(unavailable_reason("cpu") is not None, reason="no compiled module")
@pytest.mark.parametrize("level", ["baseline", pytest.param("avx2", marks=pytest.mark.slow), "avx512"])
def test_every_simd_level(level):
    """Runs this file's checks of the arithmetic in a process that is held to the level."""
    if level == extension.level():
        pytest.skip(f"this process runs {level}")
    run = subprocess.run(
        [sys.executable, "-c", HELD_TO_A_LEVEL, __file__],
        env={**os.environ, "FUSEDLOSS_SIMD": level},
        capture_output=True,
        text=True,
    )
    if "FUSEDLOSS_SIMD" in run.stderr:
        pytest.skip(f"this processor or build has no {level}")
    assert run.returncode == 0, run.stdout[-3000:]
    assert run.stdout.startswith(level)


def test_the_op_is_well_formed():
    features, labels = random_batch(20, 3, 4)
    for per_feature in (False, True):
        shift, seen = start(features, 4)
        torch.library.opcheck(
            torch.ops.fusedloss.class_stats.default, (features, labels, shift, seen, -100, per_feature)
        )
    torch.library.opcheck(torch.ops.fusedloss.row_magnitudes.default, (features,))
    torch.library.opcheck(torch.ops.fusedloss.moments.default, (features[:, 0], labels, -100))


def test_the_update_is_well_formed():
    features, labels = random_batch(20, 3, 4)
    for per_feature in (False, True):
        state = torch.zeros(4, dtype=torch.int64), torch.zeros(4, 3), torch.zeros(4).double()
        variance = torch.zeros(4, 3) if per_feature else None
        shift = state[1].clone()
        batch = ops.class_stats(features, labels, shift, state[0], -100, per_feature)
        for about in (shift, None):
            torch.library.opcheck(
                torch.ops.fusedloss.update_class_stats.default,
                (*state, variance, batch.count, about, batch.sum, batch.square, 0.3),
            )
        torch.library.opcheck(
            torch.ops.fusedloss.update_from_rows.default, (features, labels, *state, variance, -100, 0.3)
        )


BAD = {
    "labels must have shape": {"labels": torch.zeros(2).long()},
    "labels must be torch.int64": {"labels": torch.zeros(64)},
    "shift must have shape": {"shift": torch.zeros(3, 5)},
    "shift must be torch.float32": {"shift": torch.zeros(4, 5).double()},
    "seen must be torch.int64": {"seen": torch.zeros(4)},
    "seen must have shape": {"seen": torch.zeros(4, 1).long()},
    "features must have shape": {"features": torch.zeros(64)},
    "features must be float32,": {"features": torch.zeros(64, 5).long()},
    "features must have at least one column": {"features": torch.zeros(64, 0), "shift": torch.zeros(4, 0)},
    "seen must be on cpu": {"seen": torch.zeros(4, dtype=torch.int64, device="meta")},
}


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("message", BAD)
def test_shapes_and_types_are_checked_at_the_entry(backend, message, direct):
    arguments = {
        "features": torch.zeros(64, 5), "labels": torch.zeros(64).long(), "shift": torch.zeros(4, 5),
        "seen": torch.zeros(4).long(),
    }  # fmt: skip
    given = [*(arguments | BAD[message]).values(), -100, False]
    operation = ops.class_stats if direct else torch.ops.fusedloss.class_stats.default
    with pytest.raises((ValueError, TypeError), match=message):
        operation(*given)


def test_the_other_operations_check_their_arguments(backend):
    count, mean, scatter = torch.zeros(4).long(), torch.zeros(4, 5), torch.zeros(4).double()
    with pytest.raises(ValueError, match=r"sums must have shape \(4, 5\); got \(4, 6\)"):
        torch.ops.fusedloss.update_class_stats(
            count, mean, scatter, None, count.clone(), None, torch.zeros(4, 6), torch.zeros(4), 0.5
        )
    with pytest.raises(ValueError, match=r"momentum must be None or in \[0, 1\]; got 2"):
        torch.ops.fusedloss.update_class_stats(
            count, mean, scatter, None, count.clone(), None, torch.zeros(4, 5), torch.zeros(4), 2.0
        )
    state, features, labels = (count, mean, scatter, None), torch.zeros(9, 5), torch.zeros(9).long()
    wider, wide_state = torch.zeros(9, 6), (count, mean.double(), scatter, None)
    for wrong, message in (
        ((features, labels[:8], *state, -100, None), r"labels must have shape \(9,\); got \(8,\)"),
        ((wider, labels, *state, -100, None), r"mean must have shape \(4, 6\); got \(4, 5\)"),
        ((features, labels, *state[:2], count, None, -100, None), "scatter must be torch.float64"),
        ((features, labels, *state, -100, -1.0), r"momentum must be None or in \[0, 1\]; got -1"),
        ((features, labels, *wide_state, -100, None), "features must be torch.float64"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            torch.ops.fusedloss.update_from_rows(*wrong)
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\); got \(2,\)"):
        torch.ops.fusedloss.moments(torch.zeros(3), torch.zeros(2).long(), -100)
    with pytest.raises(ValueError, match=r"rows must have shape \(B, D\); got \(3,\)"):
        torch.ops.fusedloss.row_magnitudes(torch.zeros(3))


def test_results_lie_where_their_arguments_do_whatever_the_default_device(backend):
    features, labels = random_batch(20, 3, 4)
    with torch.device("meta"):
        shift, seen = torch.zeros(4, 3, device="cpu"), torch.zeros(4, dtype=torch.int64, device="cpu")
        batch = ops.class_stats(features, labels, shift, seen, -100, False)
        state = ops.ClassState(seen, shift, torch.zeros(4, dtype=torch.float64, device="cpu"), None)
        ops.update_class_stats(state, batch, None, None)
        others = ops.row_magnitudes(features), ops.moments(features[:, 0], labels, -100)
    assert all(tensor.device.type == "cpu" for tensor in (*batch, *others))
    check_against_two_pass(features, labels, 4, *start(features, 4))
    torch.testing.assert_close(state.mean[0], features[labels == 0].mean(0))
