"""What is asked of the Triton backend's functions: each check runs one case and says what was wrong."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from triton_truth import (
    Penalty,
    difference,
    final_logits,
    guess,
    laid_out,
    leaves,
    make,
    on_device,
    plain_logits,
    repeated,
    row_loss,
    statistics,
    through_label,
)

from fusedloss.core.operands import (
    LinearInputs,
    LinearMask,
    LogitInputs,
    RowInputs,
    SavedStatistics,
    SoftmaxMask,
    SoftmaxStatistics,
    StatisticsGrads,
    StatisticsOptions,
)
from fusedloss.core.row_loss import RowOptions

Check = Callable[[str], list[str]]
# Rows read in several ragged steps; held in registers in several blocks, and in one; and the sizes that a GPU gets.
STEPS, CHUNKS, ONE_BLOCK, OWN = (4, 16, 4, 1, True), (4, 16, 4), (4, 64, 4), None
EVERY = "log_sum_exp target_logit cross_entropy smooth_loss one_minus_pt"
WITH_HINGE = f"{EVERY} hinge"


def call(device: str, tile: tuple[int, ...] | None, function: str, *arguments: Any) -> Any:
    """A function of the backend, in tiles of that size."""
    from fusedloss.backends.triton import launch, softmax_ce

    moved = [on_device(value, device) for value in arguments]
    with launch.forced(tile and launch.Tile(*tile), 3 if tile else None):
        return repeated(device, lambda: getattr(softmax_ce, function)(*moved))


def logit_inputs(made: dict[str, Any]) -> LogitInputs:
    names = ("logits", "target", "scale", "bias", "class_weight", "target_override", "target_override_grad")
    return LogitInputs(*(made[name] for name in names), soft_cap=made["cap"])


def mask_of(grads: str) -> SoftmaxMask:
    return SoftmaxMask(*(name in grads.split() for name in SoftmaxMask._fields))


def cross_entropy(
    tile: tuple[int, ...] | None = STEPS, *, label_smoothing: float = 0.0, per_row: bool = False,
    focal_gamma: float = 0.0, poly_epsilon: float = 0.0, z_loss: float = 0.0, penalty: Penalty | None = None,
    mean: bool = True, grads: str = "logits affine", torch_agrees: bool = False, **inputs: Any,
) -> Check:  # fmt: skip
    """softmax_ce: loss, row losses and every gradient that `grads` names of SoftmaxMask's fields."""

    def run(device: str) -> list[str]:
        made, mask = make(**inputs), mask_of(grads)
        rows = RowInputs(made["per_row"], made["per_row"] + 0.25) if per_row else RowInputs()
        margin, strength, scale, mix = penalty or Penalty(0.0, 0.0)
        if strength is None:
            rows = rows._replace(penalty_strength=1.0 - made["per_row"])
        options = RowOptions(
            label_smoothing, focal_gamma, poly_epsilon, z_loss, margin, strength or 0.0, scale, float(mix)
        )
        loss, row_losses, results = call(device, tile, "softmax_ce", logit_inputs(made), rows, options, mean, mask)
        leaf, weight = leaves(made)
        smoothing, strength = (
            number if value is None else value.double().clone().requires_grad_()
            for value, number in ((rows.label_smoothing, label_smoothing), (rows.penalty_strength, strength))
        )
        values = statistics(made, final_logits(made, leaf), weight, margin)
        true_rows = row_loss(made, values, options, smoothing, strength)
        total = _reduced(made, true_rows, values["kept"], weight, rows.sample_weight, mean)
        if torch_agrees:
            torch_loss = F.cross_entropy(
                plain_logits(made, leaf), made["target"].double() if inputs.get("soft") else made["target"], weight,
                label_smoothing=label_smoothing,
            )  # fmt: skip
            torch.testing.assert_close(torch_loss, total, equal_nan=True)
        wrong = difference("loss", loss, total)
        wrong += difference("row loss", row_losses, true_rows)
        truth = _gradients(made, total, leaf, values["kept"], smoothing, strength)
        names = _names(mask)
        if len(names) != len(results):
            return [f"{len(results)} gradients, not {len(names)}"]
        for name, got in zip(names, results, strict=True):
            wrong += difference(f"gradient of {name}", got, truth[name])
        if mask.logits and results[0].dtype != made["logits"].dtype:
            wrong.append(f"gradient in {results[0].dtype}")
        return wrong

    return run


def _names(mask: SoftmaxMask) -> list[str]:
    """The gradients that come back."""
    names = [name for name, needed in mask._asdict().items() if needed]
    return [each for name in names for each in (("scale", "bias") if name == "affine" else (name,))]


def flat_rows(device: str) -> list[str]:
    """Equal logits, smoothed to the uniform distribution: every gradient is p - 1 / K = 0, to the rounding of 1 / K."""
    made = make(terms="", classes=41)
    made["logits"].zero_()
    options = RowOptions(label_smoothing=1.0)
    arguments = (logit_inputs(made), RowInputs(), options, False, SoftmaxMask(logits=True))
    *_, (gradient,) = call(device, STEPS, "softmax_ce", *arguments)
    most = float(gradient.abs().max())
    return [] if most <= 2.0**-24 / 10 else [f"gradient of logits: {most}, not 0"]


def _reduced(
    made: dict[str, Any], rows: Tensor, kept: Tensor, weight: Tensor, sample_weight: Tensor | None, mean: bool
) -> Tensor:
    total = (rows * (1.0 if sample_weight is None else sample_weight.double())).sum()
    if not mean:
        return total
    soft = made["target"].is_floating_point()
    denominator = float(rows.numel()) if soft else float(weight[made["target"][kept]].sum())
    return total / denominator if denominator else total * math.nan


def _gradients(
    made: dict[str, Any], total: Tensor, leaf: Any, kept: Tensor, smoothing: Any, strength: Any
) -> dict[str, Tensor]:
    """By name, None where the total has none."""
    named = {"logits": leaf.x, "scale": leaf.scale, "bias": leaf.bias, "target_override": leaf.target_override}
    named |= {"label_smoothing": smoothing, "penalty_strength": strength}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    results = torch.autograd.grad(total, list(tensors.values()), allow_unused=True)
    truth = dict(zip(tensors, results, strict=True))
    truth["logits"] = torch.where(kept.unsqueeze(1), truth["logits"], 0.0)
    if made["target_override"] is not None:
        truth["logits"] = through_label(made, truth["logits"], truth["target_override"])
    return {name: truth.get(name) for name in named}


def stats_backward(
    tile: tuple[int, ...] | None = STEPS, *, upstream: str = EVERY, grads: str = "logits affine",
    penalty_margin: float = 1.5, **inputs: Any,
) -> Check:  # fmt: skip
    """softmax_stats, then softmax_stats_backward under upstream gradients of some of the statistics."""

    def run(device: str) -> list[str]:
        made = make(**inputs)
        given, mask = logit_inputs(made), mask_of(grads)
        names = WITH_HINGE.split()
        options = StatisticsOptions(penalty_margin, "smooth_loss" in upstream, "hinge" in upstream, True)
        got = SoftmaxStatistics(
            *call(device, tile, "softmax_stats", given._replace(target_override_grad=None), options)
        )
        leaf, weight = leaves(made)
        values = statistics(made, final_logits(made, leaf), weight, penalty_margin)
        wrong = []
        for name in names:
            value = getattr(got, name)
            if name not in ("smooth_loss", "hinge") or name in upstream:
                wrong += difference(name, value, values[name])
            elif value.shape != (0,):
                wrong.append(f"{name} was not asked for")
        best, sure = guess(made, leaf)
        wrong += difference("confidence", got.confidence, sure)
        if not torch.equal(got.prediction.cpu(), best):
            wrong.append(f"prediction: {got.prediction.tolist()}, not {best.tolist()}")
        sum_of_row = got.row_max + got.row_sum.log()
        wrong += difference("row maximum and sum", sum_of_row, values["log_sum_exp"])
        generator = torch.Generator().manual_seed(1)
        like = got.row_max
        of_statistics = {name: torch.randn(like.shape, generator=generator).to(like.dtype) for name in names}
        total = sum((of_statistics[name].double() * values[name]).sum() for name in names if name in upstream)
        results = call(
            device, tile, "softmax_stats_backward", given, SavedStatistics(got.row_max, got.row_sum, got.one_minus_pt),
            penalty_margin, StatisticsGrads(*(of_statistics[name] if name in upstream else None for name in names)),
            mask,
        )  # fmt: skip
        of_leaves = torch.autograd.grad(total, leaf, allow_unused=True)
        truth = dict(zip(("logits", "scale", "bias", "target_override"), of_leaves, strict=True))
        if made["target_override"] is not None:
            truth["logits"] = through_label(made, truth["logits"], truth["target_override"])
        for name, one in zip(_names(mask), results, strict=True):
            wrong += difference(f"gradient of {name}", one, truth[name])
        return wrong

    return run


def class_statistics(
    *, dtype: torch.dtype = torch.float32, rows: int = 50, width: int = 37, classes: int = 6,
    per_feature: bool = False, tile: tuple[int, ...] | None = (2, 16, 8, 4), kind: str = "",
) -> Callable[[str], list[str]]:  # fmt: skip
    """class_stats against loops over the classes; features lie a thousand spreads away from zero."""

    def run(device: str) -> list[str]:
        from fusedloss.backends.triton import launch
        from fusedloss.backends.triton.class_stats import class_stats

        made = _labelled_features(dtype, rows, width, classes, kind)
        before, given, old = made.mean.clone(), made.mean.to(device), on_device(made.features, device)
        moved, present = made.labels.to(device), made.seen.to(device)
        with launch.forced(features=tile and launch.FeatureTile(*tile)):
            count, total, square, skipped = repeated(
                device, lambda: class_stats(old, moved, given, present, -100, per_feature)
            )
        wrong: list[str] = []
        truth = [torch.zeros(classes), torch.zeros(classes, width), torch.zeros(classes, width)]
        truth = [value.double() for value in truth]
        for c, mine in enumerate(made.usable()):
            if len(mine) and made.seen[c] == 0:
                before[c] = mine[0].to(before.dtype)
            deviation = mine - before[c].double()
            truth[0][c], truth[1][c], truth[2][c] = len(mine), deviation.sum(0), deviation.square().sum(0)
        if not torch.equal(given.cpu().nan_to_num(), before.nan_to_num()):
            wrong.append("shift of the new classes")
        wrong += difference("count", count, truth[0]) + difference("sum", total, truth[1])
        if skipped != made.skipped:
            wrong.append(f"{int(skipped)} rows left out, not {made.skipped}")
        return wrong + difference("square", square, truth[2] if per_feature else truth[2].sum(1))

    return run


def class_updates(
    *, dtype: torch.dtype = torch.float32, rows: int = 50, width: int = 37, classes: int = 6,
    per_feature: bool = False, tile: tuple[int, ...] | None = (2, 64, 8, 4), kind: str = "",
    momentum: float | None = 0.3, mean_dtype: torch.dtype | None = None,
) -> Callable[[str], list[str]]:  # fmt: skip
    """update_from_rows against the moments of all rows by class, in one pass and by two steps."""

    def run(device: str) -> list[str]:
        from fusedloss.backends.triton import launch
        from fusedloss.backends.triton.class_stats import update_from_rows

        made = _labelled_features(dtype, rows, width, classes, kind)
        mean = made.mean.to(mean_dtype or made.mean.dtype)
        variance = torch.rand(classes, width, dtype=mean.dtype)
        start = (made.seen, mean, variance.double().sum(1), variance if per_feature else None)
        features, labels = on_device(made.features, device), made.labels.to(device)

        def step() -> tuple[Tensor, ...]:
            state = [None if part is None else part.to(device, copy=True) for part in start]
            with launch.forced(features=tile and launch.FeatureTile(*tile)):
                skipped = update_from_rows(features, labels, *state, -100, momentum)
            return (skipped, *(part for part in state if part is not None))

        skipped, *found = repeated(device, step)
        wrong = [] if skipped == made.skipped else [f"{int(skipped)} rows left out, not {made.skipped}"]
        truth = [made.seen.double(), mean.double(), start[2].clone(), variance.double()]
        for c, mine in enumerate(made.usable()):
            if not len(mine):
                continue
            before = int(made.seen[c])
            share = len(mine) / (before + len(mine)) if momentum is None else momentum if before else 1.0
            center = mine.mean(0)
            distance = (center - truth[1][c]).square() if before else torch.zeros_like(center)
            spread = (mine - center).square().mean(0)
            truth[3][c] += share * (spread + (1 - share) * distance - truth[3][c])
            truth[2][c] += share * (spread.sum() + (1 - share) * distance.sum() - truth[2][c])
            truth[1][c] = truth[1][c] + share * (center - truth[1][c]) if before else center
            truth[0][c] += len(mine)
        for name, got, right in zip(("count", "mean", "scatter", "variance"), found, truth, strict=False):
            if mean.dtype == torch.float64 and name != "count":
                # The truth is no better: features lie far from zero.
                exact = torch.allclose(got.cpu(), right, rtol=1e-12, atol=1e-12)
                wrong += [] if exact else [f"{name}: {got}, not {right}"]
            else:
                wrong += difference(name, got.float() if name == "scatter" else got, right)
        absent = [c for c, mine in enumerate(made.usable()) if not len(mine)]
        if any(not torch.equal(part.cpu()[absent], old[absent]) for part, old in zip(found, start, strict=False)):
            wrong.append("an absent class moved")
        return wrong

    return run


class _LabelledFeatures(NamedTuple):
    features: Tensor
    labels: Tensor
    mean: Tensor
    seen: Tensor
    skipped: int

    def usable(self) -> list[Tensor]:
        """The rows of each class that count, in float64."""
        of_class = (self.features[self.labels == c].double() for c in range(len(self.seen)))
        return [rows[(rows.abs() <= 2.0**50).all(1)] for rows in of_class]


def _labelled_features(dtype: torch.dtype, rows: int, width: int, classes: int, kind: str) -> _LabelledFeatures:
    """Most rows in class 1; class 4 is absent; classes 0 and 3 are new."""
    generator = torch.Generator().manual_seed(0)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    features = torch.randn(rows, width, generator=generator).add(1000.0 if compute == dtype else 4.0).to(dtype)
    labels = torch.randint(classes, (rows,), generator=generator)
    head = 3 if kind.startswith("new head") else 1
    labels[: int(0.7 * rows)] = head
    labels[labels == 4] = 0
    labels[-2:] = -100
    if kind == "strided":
        features, labels = features.t().contiguous().t(), labels.repeat_interleave(2)[::2]
    if kind == "nan":
        features[5, 3], features[-3] = math.nan, -math.inf
        features[-1], features[0] = math.nan, 2.0**52  # an ignored row, and the first of its class
    if kind == "new head nan":
        # The first row of a class that is new and has many segments, a whole segment and more, and one in its middle.
        labels[:15] = head
        features[:15, -1] = torch.tensor([2.0**52, -math.inf, math.nan], dtype=torch.float64).repeat(5).to(dtype)
        features[20, 0] = math.nan
    if kind == "last column":
        features[labels == 0, -1] = math.nan  # the whole of a new class, for one block of columns to see
        features[(labels == 2).nonzero()[0, 0], -1] = math.inf
    shift = torch.randn(classes, width, generator=generator).add(1000.0).to(compute)
    wrong = ~(features.double().abs() <= 2.0**50).all(1) & (labels >= 0)
    return _LabelledFeatures(features, labels, shift, torch.arange(classes) % 3, int(wrong.sum()))


def scaling(device: str) -> list[str]:
    """scale_in_place: by 1 nothing is written, by another factor every layout."""
    from fusedloss.backends.triton.softmax_ce import scale_in_place

    wrong = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        for layout in ("", "transposed", "gaps"):
            for factor in (1.0, -0.3, 0.0):
                values = laid_out(torch.randn(5, 7, 3).to(dtype), layout)
                gradient = on_device(values, device)
                got = scale_in_place(gradient, torch.tensor(factor, dtype=compute, device=device))
                if got is not gradient or gradient.stride() != values.stride():
                    wrong.append("another tensor came back")
                truth = (values.to(compute) * torch.tensor(factor, dtype=compute)).double()
                wrong += difference(f"{dtype} {layout} times {factor}", gradient, truth)
    return wrong


def bad_labels(device: str) -> list[str]:
    """With assertions off a label out of range makes its own row NaN; 2^32 isn't class 0."""
    from fusedloss.backends.triton import softmax_ce

    wrong = []
    check, softmax_ce._Call.check_labels = (
        softmax_ce._Call.check_labels,
        lambda self, parts=None, finished=None: None if finished is None else finished.zero_(),
    )
    try:
        for tile in (STEPS, ONE_BLOCK):
            logits, labels = torch.randn(6, 37), torch.tensor([1, 37, -1, 2**32, 2**31, 4])
            for override in (None, torch.randn(6)):
                inputs = LogitInputs(logits, labels, target_override=override, target_override_grad=override)
                options = RowOptions(label_smoothing=0.1, penalty_margin=0.5, penalty_strength=0.1)
                mask = SoftmaxMask(logits=True, target_override=True)
                _, rows, (gradient, of_label) = call(
                    device, tile, "softmax_ce", inputs, RowInputs(), options, False, mask
                )
                options = StatisticsOptions(0.5, True, True, True)
                statistics = call(device, tile, "softmax_stats", inputs._replace(target_override_grad=None), options)
                named = {
                    "loss": rows,
                    "gradient": gradient[:, 0],
                    "label": of_label,
                    "one_minus_pt": statistics.one_minus_pt,
                    "hinge": statistics.hinge,
                }
                for name, value in named.items():
                    if value.isnan().tolist() != [False, True, True, True, True, False]:
                        wrong.append(f"{name}: {value.tolist()}")
    finally:
        softmax_ce._Call.check_labels = check
    return wrong


def empty(device: str) -> list[str]:
    """No rows: the mean is NaN, the sum 0, column sums 0."""
    wrong = []
    for mean, truth in ((True, math.nan), (False, 0.0)):
        inputs = LogitInputs(torch.empty(0, 37), torch.empty(0, dtype=torch.int64), torch.ones(37))
        mask = SoftmaxMask(logits=True, affine=True)
        loss, _, gradients = call(device, STEPS, "softmax_ce", inputs, RowInputs(), RowOptions(), mean, mask)
        wrong += difference("loss", loss, torch.tensor(truth))
        wrong += difference("scale", gradients[1], torch.zeros(37))
    return wrong


def other_strides(values: Any) -> Any:
    """The same values in every second place of memory, of each tensor of a named tuple but logits and target."""
    if not isinstance(values, tuple):
        return laid_out(values, "gaps") if isinstance(values, Tensor) and values.dim() else values
    kept = ("logits", "target")
    return type(values)(*(
        value if name in kept else other_strides(value) for name, value in zip(values._fields, values, strict=True)
    ))  # fmt: skip


def expanded(values: Any) -> Any:
    """One value for all classes, in tensors whose stride is 0."""
    classes = ("scale", "bias", "class_weight", "class_norm")
    changed = {
        name: getattr(values, name)[:1].expand(37) for name in classes if getattr(values, name, None) is not None
    }
    return values._replace(**changed)


def same_bits(name: str, default_device: str | None = None) -> Check:
    """Whatever the strides of what goes with the logits, and under another default device: the same bits."""

    def run(device: str) -> list[str]:
        wrong = []
        for function, inputs, *more in _calls_of(name):
            for given in (inputs, expanded(inputs)):
                dense = type(given)(*(v.contiguous() if isinstance(v, Tensor) else v for v in given))
                arguments = [on_device(value, device) for value in (dense, *more)]
                first = _flat(function(*arguments))
                arguments = [on_device(other_strides(value), device) for value in (given, *more)]
                if given is not inputs:
                    arguments[0] = expanded(arguments[0])
                with torch.device(default_device) if default_device else contextlib.nullcontext():
                    second = _flat(function(*arguments))
                for i, (one, other) in enumerate(zip(first, second, strict=True)):
                    if one.device != other.device or not torch.equal(one.nan_to_num(1.5), other.nan_to_num(1.5)):
                        wrong.append(f"{function.__name__}: result {i}")
        return wrong

    return run


def _calls_of(name: str) -> Iterator[tuple[Any, ...]]:
    """Functions of the backend with their arguments: the inputs first."""
    options = RowOptions(focal_gamma=2.0, poly_epsilon=0.5, z_loss=0.01, penalty_margin=1.0)
    if name == "softmax":
        from fusedloss.backends.triton import softmax_ce as backend

        for rows in ((7,), (3, 5)):
            made = make(rows=rows, cap=2.5, margin=True)
            inputs, row = logit_inputs(made), made["per_row"]
            mask = SoftmaxMask(*(True,) * 5)
            yield backend.softmax_ce, inputs, RowInputs(row, row + 0.25, 1 - row), options, True, mask
            needed = StatisticsOptions(1.0, True, True, True)
            statistics = backend.softmax_stats(inputs._replace(target_override_grad=None), needed)
            yield backend.softmax_stats, inputs._replace(target_override_grad=None), needed
            saved = SavedStatistics(statistics.row_max, statistics.row_sum, statistics.one_minus_pt)
            grads = StatisticsGrads(*(row * i for i in range(1, 7)))
            yield backend.softmax_stats_backward, inputs, saved, 1.0, grads, mask._replace(label_smoothing=False)
    else:
        from fusedloss.backends.triton import linear_ce as backend

        dtype, normalize = (torch.float32, True) if name == "cosine" else (torch.bfloat16, False)
        made = make(rows=(7,), dtype=dtype, margin=True)
        generator = torch.Generator().manual_seed(0)
        x, w = (torch.randn(count, 21, generator=generator).to(dtype) for count in (7, 37))
        norms = [backend.row_norms(rows) if normalize else None for rows in (x, w)]
        row, override_grad = made["per_row"], made["target_override_grad"].double()
        values = (made["scale"], made["bias"], made["class_weight"], made["target_override"], override_grad)
        inputs = LinearInputs(x, w, made["target"], *norms, *values)
        inputs = inputs._replace(target_product=backend.target_products(inputs))
        mask = LinearMask(*(True,) * 6)
        yield backend.linear_ce, inputs, RowInputs(row, row + 0.25), options, True, mask
        statistics = backend.linear_stats(inputs, StatisticsOptions(smooth_loss=True))
        yield backend.linear_stats, inputs, StatisticsOptions(smooth_loss=True)
        saved = SavedStatistics(statistics.row_max, statistics.row_sum, statistics.one_minus_pt)
        grads = StatisticsGrads(*(row * i for i in range(1, 6)))
        yield backend.linear_stats_backward, inputs, saved, 0.0, grads, mask._replace(label_smoothing=False)


def _flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in _flat(part)]


def through_the_operation(reduction: str, stats: bool, dtype: torch.dtype = torch.float32) -> Check:
    """Terms, rows and penalty as a user gives them: values and every gradient, against the reference in float64."""

    def run(device: str) -> list[str]:
        generator = torch.Generator().manual_seed(0)
        given = [3 * torch.randn(6, 37, generator=generator), torch.rand(37, generator=generator) + 0.5]
        given += [torch.rand(6, generator=generator) for _ in range(2)]
        target = torch.randint(37, (6,), generator=generator)
        target[2] = -100
        double = [given[0].to(dtype).double(), *(value.double() for value in given[1:])]
        truth_of = _user_call(double, target, "reference", reduction, stats)
        moved = [given[0].to(dtype), *given[1:]]
        got = _user_call([value.to(device) for value in moved], target.to(device), "triton", reduction, stats)
        wrong = []
        for name, truth in truth_of.items():
            wrong += difference(name, got[name], truth)
        return wrong

    return run


def no_kept_row(device: str) -> list[str]:
    """A mean over no rows is 0 / 0, with weights of the rows too; beside a kept row the others count nothing."""
    import fusedloss

    logits, weight = torch.randn(2, 5, device=device), torch.tensor([1.5, 0.5], device=device)
    losses = {}
    for label in (-100, 3):
        target = torch.tensor([-100, label], device=device)
        for name, given in (("plain", {}), ("weighted", {"sample_weight": weight})):
            with fusedloss.backend("triton"):
                losses[f"{name} {label}"] = fusedloss.cross_entropy(logits, target, **given)
    truth = torch.nn.functional.cross_entropy(logits[1:].double(), torch.tensor([3], device=device))
    nan = torch.tensor(float("nan"), dtype=torch.float64, device=device)
    return [
        line
        for name, loss in losses.items()
        for line in difference(name, loss, nan if name.endswith("-100") else truth)
    ]


def _user_call(
    given: list[Tensor], target: Tensor, backend: str, reduction: str, stats: bool
) -> dict[str, Tensor]:  # fmt: skip
    import fusedloss

    logits, tau, smoothing, strength = (value.detach().requires_grad_() for value in given)
    terms = [fusedloss.SoftCap(5.0), fusedloss.ClassTemperature(tau), fusedloss.AdditiveMargin(0.4)]
    penalty = fusedloss.MarginPenalty(2.0, strength, mix=True)
    with fusedloss.backend(backend):
        result = fusedloss.cross_entropy(
            logits, target, terms=terms, label_smoothing=smoothing, focal_gamma=2.0, z_loss=0.01, reduction=reduction,
            margin_penalty=penalty, return_stats=stats,
        )  # fmt: skip
        loss, row_stats = result if stats else (result, None)
        total = loss.sum() + (0.1 * row_stats.log_sum_exp.sum() + 0.2 * row_stats.target_logit.sum() if stats else 0.0)
        total.backward()
    grads = {"logits": logits.grad, "tau": tau.grad, "smoothing": smoothing.grad, "strength": strength.grad}
    return {"loss": loss, **grads, **({"confidence": row_stats.confidence} if stats else {})}
