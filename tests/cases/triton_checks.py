"""What is asked of the Triton backend's functions: each check runs one case and says what was wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton_truth import (
    COMPUTED,
    ROUNDED,
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

Check = Callable[[str], list[str]]
# Loops of several ragged steps, in tiles of several rows; one block; and the sizes that a GPU gets.
STEPS, ONE_BLOCK, OWN = (4, 16, 4), (4, 64, 4), None
EVERY = "log_sum_exp target_logit cross_entropy uniform rest"
WITH_HINGE = f"{EVERY} hinge"


def call(device: str, tile: tuple[int, int, int] | None, function: str, *arguments: Any) -> Any:
    """A function of the backend, in tiles of that size."""
    from fusedloss.backends.triton import launch, softmax_ce

    moved = [on_device(value, device) for value in arguments]
    with launch.forced(tile and launch.Tile(*tile), 3 if tile else None):
        return repeated(device, lambda: getattr(softmax_ce, function)(*moved))


def inputs_of(made: dict[str, Any]) -> list[Any]:
    names = ("logits", "target", "scale", "bias", "class_weight", "target_override", "target_override_grad")
    return [made[name] for name in names]


def cross_entropy(
    tile: tuple[int, int, int] | None = STEPS, *, smoothing: float = 0.0, per_row: bool = False,
    gamma: float = 0.0, z_loss: float = 0.0, penalty: Penalty | None = None, mean: bool = True,
    wanted: str = "logits columns", torch_agrees: bool = False, **inputs: Any,
) -> Check:  # fmt: skip
    """softmax_ce: loss, row losses and every gradient that is wanted of logits, columns, smoothing, label, penalty."""

    def run(device: str) -> list[str]:
        made = make(**inputs)
        own, row_scale = (made["per_row"], made["per_row"] + 0.25) if per_row else (None, None)
        strength = (1.0 - made["per_row"]) if penalty and penalty.strength is None else None
        numbers = penalty or Penalty(0.0, 0.0)
        want = [word in wanted for word in ("logits", "columns", "smoothing", "label", "penalty")]
        loss, rows, gradients = call(
            device, tile, "softmax_ce", *inputs_of(made), own, row_scale, strength, made["cap"], smoothing, gamma,
            z_loss, numbers.margin, numbers.strength or 0.0, numbers.share, numbers.mix, -100, mean, want,
        )  # fmt: skip
        leaf, weight = leaves(made)
        eps = own.double().clone().requires_grad_() if per_row else smoothing
        pull = numbers.strength if strength is None else strength.double().clone().requires_grad_()
        found = statistics(made, final_logits(made, leaf), weight, numbers.margin)
        true_rows = row_loss(made, found, eps, gamma, z_loss, penalty, pull)
        total = _reduced(made, true_rows, found["kept"], weight, row_scale, mean)
        if torch_agrees:
            torch_loss = F.cross_entropy(
                plain_logits(made, leaf), made["target"].double() if inputs.get("soft") else made["target"], weight,
                label_smoothing=smoothing,
            )  # fmt: skip
            torch.testing.assert_close(torch_loss, total, equal_nan=True)
        wrong = difference("loss", loss, total, COMPUTED[loss.dtype])
        wrong += difference("row loss", rows, true_rows, COMPUTED[loss.dtype])
        truth = _gradients(made, total, leaf, found["kept"], eps, pull)
        names = [name for name, chosen in zip(truth, (want[0], want[1], *want[1:]), strict=True) if chosen]
        if len(names) != len(gradients):
            return [f"{len(gradients)} gradients, not {len(names)}"]
        for name, got in zip(names, gradients, strict=True):
            wrong += difference(f"gradient of {name}", got, truth[name], ROUNDED[got.dtype])
        if want[0] and gradients[0].dtype != made["logits"].dtype:
            wrong.append(f"gradient in {gradients[0].dtype}")
        return wrong

    return run


def flat_rows(device: str) -> list[str]:
    """Equal logits, smoothed to the uniform distribution: every slope is p - 1 / K = 0, to the rounding of 1 / K."""
    made = make(terms="", classes=41)
    made["logits"].zero_()
    want = [True, False, False, False, False]
    options = (None, None, None, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, False, -100, False, want)
    *_, (gradient,) = call(device, STEPS, "softmax_ce", *inputs_of(made), *options)
    most = float(gradient.abs().max())
    return [] if most <= 2.0**-24 / 10 else [f"gradient of logits: {most}, not 0"]


def _reduced(
    made: dict[str, Any], rows: Tensor, kept: Tensor, weight: Tensor, row_scale: Tensor | None, mean: bool
) -> Tensor:
    total = (rows * (1.0 if row_scale is None else row_scale.double())).sum()
    if not mean:
        return total
    soft = made["target"].is_floating_point()
    denominator = float(rows.numel()) if soft else float(weight[made["target"][kept]].sum())
    return total / denominator if denominator else total * math.nan


def _gradients(made: dict[str, Any], total: Tensor, leaf: Any, kept: Tensor, eps: Any, pull: Any) -> dict[str, Tensor]:
    """By name, in the order in which they come back."""
    per_row = {"smoothing": eps, "label": leaf.target_override, "penalty": pull}
    asked = {"logits": leaf.x, "scale": leaf.scale, "bias": leaf.bias, **per_row}
    tensors = {name: value for name, value in asked.items() if isinstance(value, Tensor)}
    found = torch.autograd.grad(total, list(tensors.values()), allow_unused=True)
    truth = dict(zip(tensors, found, strict=True))
    truth["logits"] = torch.where(kept.unsqueeze(1), truth["logits"], 0.0)
    if made["target_override"] is not None:
        truth["logits"] = through_label(made, truth["logits"], truth["label"])
    return {name: truth.get(name) for name in asked}


def sweep(tile: tuple[int, int, int] | None = STEPS, *, upstream: str = EVERY, wanted: str = "logits columns",
          penalty_margin: float = 1.5, **inputs: Any) -> Check:  # fmt: skip
    """softmax_stats, then softmax_stats_backward under upstream gradients of some of the statistics."""

    def run(device: str) -> list[str]:
        made = make(**inputs)
        logits_of = inputs_of(made)
        names = WITH_HINGE.split()
        got = call(
            device, tile, "softmax_stats", *logits_of[:6], made["cap"], penalty_margin, -100, "uniform" in upstream,
            "hinge" in upstream, True,
        )  # fmt: skip
        row_max, row_sum, rest, prediction, confidence = got[0], got[1], got[6], got[8], got[9]
        leaf, weight = leaves(made)
        found = statistics(made, final_logits(made, leaf), weight, penalty_margin)
        tolerance = COMPUTED[row_max.dtype]
        wrong = []
        for name, value in zip(names, got[2:8], strict=True):
            if name not in ("uniform", "hinge") or name in upstream:
                wrong += difference(name, value, found[name], tolerance)
            elif value.shape != (0,):
                wrong.append(f"{name} was not wanted")
        best, sure = guess(made, leaf)
        wrong += difference("confidence", confidence, sure, tolerance)
        if not torch.equal(prediction.cpu(), best):
            wrong.append(f"prediction: {prediction.tolist()}, not {best.tolist()}")
        wrong += difference("row maximum and sum", (row_max + row_sum.log()), found["log_sum_exp"], tolerance)
        generator = torch.Generator().manual_seed(1)
        gradients = {name: torch.randn(row_max.shape, generator=generator).to(row_max.dtype) for name in names}
        total = sum((gradients[name].double() * found[name]).sum() for name in names if name in upstream)
        given = [gradients[name] if name in upstream else None for name in names]
        want = [word in wanted for word in ("logits", "columns", "label")]
        swept = call(
            device, tile, "softmax_stats_backward", *logits_of, row_max, row_sum, rest, made["cap"], penalty_margin, -100,
            *given, want,
        )  # fmt: skip
        truth = dict(zip(("logits", "scale", "bias", "label"), torch.autograd.grad(total, leaf, allow_unused=True),
                         strict=True))  # fmt: skip
        if made["target_override"] is not None:
            truth["logits"] = through_label(made, truth["logits"], truth["label"])
        chosen = [name for name, yes in zip(truth, (want[0], want[1], *want[1:]), strict=True) if yes]
        for name, one in zip(chosen, swept, strict=True):
            wrong += difference(f"gradient of {name}", one, truth[name], ROUNDED[one.dtype])
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

        generator = torch.Generator().manual_seed(0)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        features = torch.randn(rows, width, generator=generator).add(1000.0 if compute == dtype else 4.0).to(dtype)
        labels = torch.randint(classes, (rows,), generator=generator)
        labels[: int(0.7 * rows)] = 1
        labels[labels == 4] = 0  # class 4 is absent
        labels[-2:] = -100
        if kind == "strided":
            features, labels = features.t().contiguous().t(), labels.repeat_interleave(2)[::2]
        if kind == "nan":
            features[5, 3], features[-3] = math.nan, -math.inf
            features[-1], features[0] = math.nan, 2.0**52  # an ignored row, and the first of its class
        shift = torch.randn(classes, width, generator=generator).add(1000.0).to(compute)
        seen = torch.arange(classes) % 3
        before, given, old = shift.clone(), shift.to(device), on_device(features, device)
        moved, present = labels.to(device), seen.to(device)
        with launch.forced(features=tile and launch.FeatureTile(*tile)):
            count, total, square, skipped = repeated(
                device, lambda: class_stats(old, moved, given, present, -100, per_feature)
            )
        wrong: list[str] = []
        truth = [torch.zeros(classes), torch.zeros(classes, width), torch.zeros(classes, width)]
        truth = [value.double() for value in truth]
        for c in range(classes):
            mine = features[labels == c].double()
            mine = mine[(mine.abs() <= 2.0**50).all(1)]
            if len(mine) and seen[c] == 0:
                before[c] = mine[0].to(compute)
            deviation = mine - before[c].double()
            truth[0][c], truth[1][c], truth[2][c] = len(mine), deviation.sum(0), deviation.square().sum(0)
        if not torch.equal(given.cpu().nan_to_num(), before.nan_to_num()):
            wrong.append("shift of the new classes")
        tolerance = (1e-5, 1e-3 if compute == torch.float32 else 1e-8)
        wrong += difference("count", count, truth[0], (0, 0)) + difference("sum", total, truth[1], tolerance)
        if skipped != (3 if kind == "nan" else 0):
            wrong.append(f"{int(skipped)} rows left out")
        return wrong + difference("square", square, truth[2] if per_feature else truth[2].sum(1), tolerance)

    return run


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
                wrong += difference(f"{dtype} {layout} times {factor}", gradient, truth, ROUNDED[dtype])
    return wrong


def bad_labels(device: str) -> list[str]:
    """With assertions off a label out of range makes its own row NaN; 2^32 isn't class 0."""
    from fusedloss.backends.triton import softmax_ce

    wrong = []
    check, softmax_ce._Call.check_labels = softmax_ce._Call.check_labels, lambda self, weights=None: None
    try:
        for tile in (STEPS, ONE_BLOCK):
            logits, labels = torch.randn(6, 37), torch.tensor([1, 37, -1, 2**32, 2**31, 4])
            for stand_in in (None, torch.randn(6)):
                arguments = (logits, labels, None, None, None, stand_in)
                _, rows, (gradient, of_label) = call(
                    device, tile, "softmax_ce", *arguments, stand_in, None, None, None, 0.0, 0.1, 0.0, 0.0, 0.5, 0.1,
                    1.0, False, -100, False, [True, False, False, True, False],
                )  # fmt: skip
                found = call(device, tile, "softmax_stats", *arguments, 0.0, 0.5, -100, True, True, True)
                named = {
                    "loss": rows,
                    "gradient": gradient[:, 0],
                    "label": of_label,
                    "rest": found[6],
                    "hinge": found[7],
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
        logits, scale = torch.empty(0, 37), torch.ones(37)
        loss, _, gradients = call(
            device, STEPS, "softmax_ce", logits, torch.empty(0, dtype=torch.int64), scale, None, None, None,
            None, None, None, None, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, False, -100, mean,
            [True, True, False, False, False],
        )  # fmt: skip
        wrong += difference("loss", loss, torch.tensor(truth), (0, 0))
        wrong += difference("scale", gradients[1], torch.zeros(37), (0, 0))
    return wrong


def through_the_operation(reduction: str, stats: bool, dtype: torch.dtype = torch.float32) -> Check:
    """Terms, rows and penalty as a user gives them: values and every gradient, against the reference in float64."""

    def run(device: str) -> list[str]:
        generator = torch.Generator().manual_seed(0)
        given = [3 * torch.randn(6, 37, generator=generator), torch.rand(37, generator=generator) + 0.5]
        given += [torch.rand(6, generator=generator) for _ in range(2)]
        target = torch.randint(37, (6,), generator=generator)
        target[2] = -100
        wanted = _user_call([given[0].to(dtype).double(), *(value.double() for value in given[1:])], target,
                            "reference", reduction, stats)  # fmt: skip
        moved = [given[0].to(dtype), *given[1:]]
        got = _user_call([value.to(device) for value in moved], target.to(device), "triton", reduction, stats)
        wrong = []
        for name, truth in wanted.items():
            tolerance = ROUNDED[dtype] if name == "logits" else (1e-4, 1e-5)
            wrong += difference(name, got[name], truth, tolerance)
        return wrong

    return run


def _user_call(
    given: list[Tensor], target: Tensor, backend: str, reduction: str, stats: bool
) -> dict[str, Tensor]:  # fmt: skip
    import fusedloss

    logits, tau, smoothing, strength = (value.detach().requires_grad_() for value in given)
    terms = [fusedloss.SoftCap(5.0), fusedloss.ClassTemperature(tau), fusedloss.AdditiveMargin(0.4)]
    penalty = fusedloss.MarginPenalty(2.0, strength, mix=True)
    with fusedloss.backend(backend):
        answer = fusedloss.cross_entropy(
            logits, target, terms=terms, label_smoothing=smoothing, focal_gamma=2.0, z_loss=0.01, reduction=reduction,
            margin_penalty=penalty, return_stats=stats,
        )  # fmt: skip
        loss, found = answer if stats else (answer, None)
        total = loss.sum() + (0.1 * found.log_sum_exp.sum() + 0.2 * found.target_logit.sum() if found else 0.0)
        total.backward()
    grads = {"logits": logits.grad, "tau": tau.grad, "smoothing": smoothing.grad, "strength": strength.grad}
    return {"loss": loss, **grads, **({"confidence": found.confidence} if found else {})}
