"""What crosses into the C++ kernels: tensors of any strides, labels that are no class."""

import pytest
import torch

import fusedloss
from fusedloss.backends.cpp import extension, linear_ce, softmax_ce, unavailable_reason
from fusedloss.core.operands import (
    LinearInputs,
    LinearMask,
    LogitInputs,
    RowInputs,
    SavedStatistics,
    SoftmaxMask,
    StatisticsGrads,
    StatisticsOptions,
)
from fusedloss.core.row_loss import RowOptions

pytestmark = pytest.mark.skipif(unavailable_reason("cpu") is not None, reason="no compiled module")

ROWS, CLASSES, WIDTH = 6, 9, 5
OPTIONS = RowOptions(penalty_margin=0.5, penalty_scale=0.1, poly_epsilon=0.3, z_loss=0.01)
ALL = SoftmaxMask(*[True] * 5)


def strided(tensor):
    """The same numbers in every second place."""
    return torch.stack([tensor, torch.full_like(tensor, 7)], -1)[..., 0]


def expanded(tensor):
    """The first number, or row, for all."""
    return tensor[:1].expand(tensor.shape)


LAYOUTS = pytest.mark.parametrize("layout", [strided, expanded])


def softmax_operands(*inner, double=False):
    dtype = torch.float64 if double else torch.float32
    rows = (ROWS, *inner)
    inputs = LogitInputs(
        torch.randn(ROWS, CLASSES, *inner, dtype=dtype),
        torch.randint(CLASSES, rows),
        *(torch.rand(CLASSES, dtype=dtype) + 0.5 for _ in range(3)),
        *(torch.randn(rows, dtype=dtype) for _ in range(2)),
    )
    return inputs, RowInputs(*(torch.rand(rows, dtype=dtype) for _ in range(3)))


def linear_operands():
    double = torch.float64
    inputs = LinearInputs(
        torch.randn(ROWS, WIDTH),
        torch.randn(CLASSES, WIDTH),
        torch.randint(CLASSES, (ROWS,)),
        *(torch.rand(size, dtype=double) + 1 for size in (ROWS, CLASSES)),
        *(torch.rand(CLASSES) + 0.5 for _ in range(3)),
        torch.randn(ROWS),
        *(torch.randn(ROWS, dtype=double) for _ in range(2)),
    )
    return inputs, RowInputs(*(torch.rand(ROWS) for _ in range(3)))


def flat(result):
    """The tensors of a result, in order."""
    return [result] if isinstance(result, torch.Tensor) else [tensor for part in result for tensor in flat(part)]


def same(run, operands, layout):
    """Asserts that `run` makes nothing else of each tensor in another layout than of its contiguous copy."""
    for index, group in enumerate(operands):
        for name, tensor in group._asdict().items():
            if not isinstance(tensor, torch.Tensor):
                continue
            other = layout(tensor)
            assert not other.is_contiguous()
            groups = [list(operands), list(operands)]
            for made, value in zip(groups, (other, other.clone(memory_format=torch.contiguous_format)), strict=True):
                made[index] = group._replace(**{name: value})
            for found, expected in zip(*(flat(run(*made)) for made in groups), strict=True):
                torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")


@LAYOUTS
@pytest.mark.parametrize("inner", [(), (2,)])
def test_softmax_ce_of_any_strides(layout, inner):
    def run(inputs, rows):
        return torch.ops.fusedloss.softmax_ce(*inputs, *rows, list(OPTIONS), True, list(ALL), 1.0)

    same(run, softmax_operands(*inner), layout)


@LAYOUTS
def test_statistics_of_any_strides(layout):
    def run(inputs):
        return torch.ops.fusedloss.softmax_stats(*inputs, 0.5, True, True, True)

    same(run, softmax_operands()[:1], layout)


@LAYOUTS
@pytest.mark.parametrize("double", [False, True])
def test_the_backward_of_statistics_of_any_strides(layout, double):
    def run(inputs, saved, grads):
        mask = [True, True, True, False, False]
        return torch.ops.fusedloss.softmax_stats_backward(*inputs, *saved, 0.5, *grads, mask)

    inputs, _ = softmax_operands(double=double)
    found = softmax_ce.softmax_stats(inputs, StatisticsOptions(0.5, True, True))
    saved = SavedStatistics(found.row_max, found.row_sum, found.one_minus_pt)
    grads = StatisticsGrads(*(torch.randn(ROWS, dtype=inputs.logits.dtype) for _ in range(6)))
    same(run, (inputs, saved, grads), layout)


@LAYOUTS
def test_linear_ce_of_any_strides(layout):
    def run(inputs, rows):
        return torch.ops.fusedloss.linear_ce(*inputs, *rows, list(OPTIONS), True, [True] * 7)

    same(run, linear_operands(), layout)


@LAYOUTS
def test_target_products_of_any_strides(layout):
    def run(inputs):
        return torch.ops.fusedloss.target_products(*inputs[:5], -100)

    same(run, linear_operands()[:1], layout)


@LAYOUTS
def test_arguments_of_any_strides(layout):
    x, y = torch.randn(ROWS, CLASSES), torch.randint(CLASSES, (ROWS,))
    features, classes = torch.randn(ROWS, WIDTH), torch.randn(CLASSES, WIDTH)
    tensors = {
        "weight": torch.rand(CLASSES) + 0.5,
        "label_smoothing": 0.5 * torch.rand(ROWS),
        "sample_weight": torch.rand(ROWS),
    }

    def both(**options):
        bias = options.pop("linear_bias", None)
        yield fusedloss.cross_entropy(x, y, **options)
        yield fusedloss.linear_cross_entropy(features, classes, y, linear_bias=bias, **options)

    for name, tensor in {**tensors, "linear_bias": torch.randn(CLASSES)}.items():
        other = layout(tensor)
        dense = other.clone(memory_format=torch.contiguous_format)
        for found, expected in zip(both(**{name: other}), both(**{name: dense}), strict=True):
            torch.testing.assert_close(found, expected)


class TestLabels:
    NO_CLASS = pytest.mark.parametrize("label", [-1, CLASSES, 2**40, -(2**40)])
    MESSAGE = r"target must lie in \[0, 9\) or be ignore_index=-100; got label -?\d+ at row 3"

    @NO_CLASS
    def test_an_operation_refuses_one_that_is_no_class(self, label):
        inputs, rows = softmax_operands()
        inputs.target[3] = label
        with pytest.raises(IndexError, match=self.MESSAGE):
            softmax_ce.softmax_ce(inputs, rows, OPTIONS, True, ALL)
        with pytest.raises(IndexError, match=self.MESSAGE):
            softmax_ce.softmax_stats(inputs, StatisticsOptions())
        inputs, rows = linear_operands()
        inputs = inputs._replace(target_product=None, target_override=None, target_override_grad=None)
        inputs.target[3] = label
        for run in (
            lambda: linear_ce.linear_ce(inputs, rows, OPTIONS, True, LinearMask()),
            lambda: linear_ce.linear_stats(inputs, StatisticsOptions()),
            lambda: linear_ce.target_products(inputs),
        ):
            with pytest.raises(IndexError, match=self.MESSAGE):
                run()

    @NO_CLASS
    @pytest.mark.parametrize("num_classes", [CLASSES, 300])
    def test_a_kernel_takes_it_for_an_ignored_row(self, label, num_classes):
        x, y = torch.randn(ROWS, num_classes), torch.randint(CLASSES, (ROWS,))
        label = num_classes if label == CLASSES else label
        extra = (None, None, torch.rand(num_classes), torch.randn(ROWS), torch.randn(ROWS))
        for options in (RowOptions(), RowOptions(label_smoothing=0.1, penalty_strength=0.5)):
            found = []
            for value in (label, -100):
                y[3] = value
                inputs = LogitInputs(x, y, *extra)
                found += [softmax_ce.softmax_ce(inputs, RowInputs(), options, True, ALL, labels_checked=True)]
                statistics = softmax_ce.softmax_stats(inputs, StatisticsOptions(0.5, True, True, True), True)
                saved = SavedStatistics(statistics.row_max, statistics.row_sum, statistics.one_minus_pt)
                grads = StatisticsGrads(*(torch.ones(ROWS) for _ in range(6)))
                mask = SoftmaxMask(True, True, True)
                back = softmax_ce.softmax_stats_backward(inputs, saved, 0.5, grads, mask)
                found[-1] = (found[-1], statistics, back)
            for one, other in zip(*map(flat, found), strict=True):
                assert one.equal(other)

    @NO_CLASS
    def test_nor_do_products_of_targets_read_it(self, label):
        inputs, rows = linear_operands()
        found = []
        for value in (label, -100):
            inputs.target[3] = value
            found.append(linear_ce.linear_ce(inputs, rows, OPTIONS, False, LinearMask(*[True] * 7)))
        for one, other in zip(*map(flat, found), strict=True):
            assert one.equal(other)

    @pytest.mark.parametrize(
        "loss",
        [
            lambda x, w, y: fusedloss.cross_entropy(x @ w.t(), y),
            lambda x, w, y: fusedloss.linear_cross_entropy(x, w, y),
            lambda x, w, y: fusedloss.linear_cross_entropy(x, w, y, reduction="none").sum(),
            lambda x, w, y: fusedloss.linear_cross_entropy(
                x, w, y, normalize=True, terms=[fusedloss.AngularMargin(0.3), fusedloss.Scale(8.0)]
            ),
        ],
        ids=["softmax_ce", "linear_ce", "linear_stats", "angular margin"],
    )
    def test_they_are_checked_once_a_call(self, loss, monkeypatch):
        calls = []
        check = extension.check_labels
        monkeypatch.setattr(extension, "check_labels", lambda *arguments: (calls.append(arguments), check(*arguments)))
        x, w = (torch.randn(size, WIDTH, requires_grad=True) for size in (ROWS, CLASSES))
        loss(x, w, torch.randint(CLASSES, (ROWS,))).backward()
        assert len(calls) == 1
