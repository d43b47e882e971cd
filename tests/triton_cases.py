"""Cases of the Triton backend against independent float64 formulas; as a script, in Triton's interpreter.

Prints one JSON object: the name of each case and what was wrong with it (an empty list when nothing was).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CASES: dict[str, Callable[[str], list[str]]] = {}
# Loops of several ragged steps, in tiles of several rows; one block; and the sizes that a GPU gets.
STEPS, ONE_BLOCK, OWN = (4, 16, 4), (4, 64, 4), None
# Relative and absolute error of what is computed in a type, and of a gradient rounded to it.
EVERY = "log_sum_exp target_logit cross_entropy uniform rest"
COMPUTED = {torch.float32: (2e-5, 2e-6), torch.float64: (1e-12, 1e-13)}
ROUNDED = {**COMPUTED, torch.bfloat16: (2.0**-7, 2e-6), torch.float16: (2.0**-10, 2e-7)}


def case(function: Callable[[str], list[str]], name: str) -> None:
    CASES[name] = function


def difference(what: str, got: Tensor, truth: Tensor, tolerance: tuple[float, float]) -> list[str]:
    """What is wrong with `got`, in words; infinities and NaN must sit at the same places."""
    if got.shape != truth.shape:
        return [f"{what}: shape {tuple(got.shape)}, not {tuple(truth.shape)}"]
    got, truth = got.detach().cpu().double(), truth.detach().double()
    if torch.isclose(got, truth, *tolerance, equal_nan=True).all():
        return []
    return [f"{what}: {got.flatten()[:40].tolist()}, not {truth.flatten()[:40].tolist()}"]


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "transposed":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "gaps":
        wide = torch.full((*values.shape[:-1], 2 * values.shape[-1] + 3), math.nan, dtype=values.dtype)
        wide[..., 1 : 2 * values.shape[-1] + 1 : 2] = values
        return wide[..., 1 : 2 * values.shape[-1] + 1 : 2]
    if layout == "channels last":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    return values


def make(
    *, dtype: torch.dtype = torch.float32, rows: tuple[int, ...] = (7,), classes: int = 37,
    soft: bool = False, terms: str = "scale bias weight", layout: str = "", special: str = "", seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Inputs of one case, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (rows[0], classes, *rows[1:])
    logits = (3 * torch.randn(shape, generator=generator)).to(dtype)
    labels = torch.randint(classes, rows, generator=generator)
    if rows[0] > 2:
        labels[2] = -100
    probabilities = torch.rand(shape, generator=generator).softmax(1)
    if special == "infinite":
        logits[:, :20], labels[0], labels[1] = (
            -math.inf,
            3,
            30,
        )  # the first block and a target; row 2 stays whole
        logits[2], logits[3] = 0.0, -math.inf
        probabilities[:, :20] = 0
    if special == "nan":
        logits[1, 5], logits[4, int(labels[4])] = math.nan, math.nan
    if special == "plus infinity":
        logits[5, 3] = math.inf
    if special == "offset":
        logits = (logits.float() + 2.0**22).to(dtype)
    if special == "confident":
        logits[:, :], labels[:] = -12.0, 5
        logits[:, 5] = 12.0
    if special == "ignored":
        labels[:] = -100
    classwise = {
        "scale": torch.rand(classes, generator=generator) + 0.5,
        "bias": torch.randn(classes, generator=generator),
        "class_weight": torch.rand(classes, generator=generator) * (torch.arange(classes) % 5 != 4),
    }
    return {
        "logits": laid_out(logits, layout),
        "target": laid_out(probabilities.to(dtype), layout) if soft else labels,
        **{key: value.to(compute) if key.split("_")[-1] in terms else None for key, value in classwise.items()},
        "per_row": torch.rand(rows, generator=generator, dtype=torch.float64).to(compute),
    }


def leaves(made: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits, scale, bias in float64 as leaves, and class weights."""
    classes = made["logits"].shape[1]
    x = made["logits"].detach().double().clone().requires_grad_()
    scale, bias, weight = (
        torch.full((classes,), default, dtype=torch.float64) if made[key] is None else made[key].double()
        for key, default in (("scale", 1.0), ("bias", 0.0), ("class_weight", 1.0))
    )
    return x, scale.clone().requires_grad_(), bias.clone().requires_grad_(), weight


def columns(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (like.dim() - 2))


def affine(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """z, without a gradient through scale and bias where x is -inf."""
    masked = x == -math.inf
    inner = torch.where(masked, 0.0, x) * columns(scale, x) + columns(bias, x)
    return torch.where(masked, x, inner)


def statistics(made: dict[str, Any], z: Tensor, weight: Tensor, ignore_index: int = -100) -> dict[str, Tensor]:
    """The row statistics in float64, differentiable."""
    target = made["target"]
    log_p = z.log_softmax(1)
    spread = columns(weight, z).expand_as(z)

    def weighted(factor: Tensor, values: Tensor) -> Tensor:
        return torch.where(factor == 0, 0.0, factor * values).sum(1)

    if target.is_floating_point():
        q = target.double() * spread
        kept = torch.ones_like(z[:, 0], dtype=torch.bool)
        logit, hard, rest = weighted(q, z), weighted(q, -log_p), torch.zeros_like(z[:, 0])
    else:
        kept = target != ignore_index
        label = torch.where(kept, target, 0).unsqueeze(1)
        logit = z.gather(1, label).squeeze(1)
        hard = -log_p.gather(1, label).squeeze(1) * weight[label.squeeze(1)]
        others = torch.ones_like(z, dtype=torch.bool).scatter(1, label, False)
        rest = torch.where(others, log_p.exp(), 0.0).sum(1)
    found = {"target_logit": logit, "cross_entropy": hard, "uniform": weighted(spread, -log_p), "rest": rest}
    found = {key: torch.where(kept, value, 0.0) for key, value in found.items()}
    return {"log_sum_exp": z.logsumexp(1), **found, "kept": kept}


def loss_formula(made: dict[str, Any], found: dict[str, Tensor], eps: Any, gamma: float, z_loss: float) -> Tensor:
    """Loss of each row."""
    row = found["cross_entropy"]
    if isinstance(eps, Tensor) or eps:
        row = (1 - eps) * row + eps / made["logits"].shape[1] * found["uniform"]
    if gamma:
        row = found["rest"] ** gamma * row
    if z_loss:
        row = row + z_loss * found["log_sum_exp"].square()
    return torch.where(found["kept"], row, 0.0)


def call(device: str, tile: tuple[int, int, int] | None, function: str, *arguments: Any) -> Any:
    """A function of the backend, in tiles of that size, twice: both answers must have the same bits."""
    from fusedloss.backends.triton import launch, softmax_ce

    moved = [value.to(device) if isinstance(value, Tensor) else value for value in arguments]
    # A copy between devices keeps dense strides only.
    moved = [new if not isinstance(new, Tensor) or new.stride() == old.stride() else _strided(old, device)
             for old, new in zip(arguments, moved, strict=True)]  # fmt: skip
    with launch.forced(tile and launch.Tile(*tile), 3 if tile else None):
        first, second = (getattr(softmax_ce, function)(*moved) for _ in range(2))
    for one, other in zip(_flat(first), _flat(second), strict=True):
        bits = [value.detach().cpu().nan_to_num(12345.0) for value in (one, other)]
        assert torch.equal(*bits), f"{function}: two runs differ"
    return first


def _strided(values: Tensor, device: str) -> Tensor:
    size = 1 + sum((n - 1) * step for n, step in zip(values.shape, values.stride(), strict=True))
    made = torch.empty(size, dtype=values.dtype, device=device).as_strided(values.shape, values.stride())
    return made.copy_(values)


def _flat(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [tensor for part in found for tensor in _flat(part)]


def cross_entropy(
    tile: tuple[int, int, int] | None = STEPS, *, smoothing: float = 0.0, per_row: bool = False,
    gamma: float = 0.0, z_loss: float = 0.0, mean: bool = True,
    wanted: tuple[bool, bool, bool] = (True, True, False), torch_agrees: bool = False, **inputs: Any,
) -> Callable[[str], list[str]]:  # fmt: skip
    """softmax_ce: loss, row losses and every gradient that is wanted."""

    def run(device: str) -> list[str]:
        made = make(**inputs)
        row_smoothing, row_scale = (made["per_row"], made["per_row"] + 0.25) if per_row else (None, None)
        loss, row_loss, gradients = call(
            device, tile, "softmax_ce", made["logits"], made["target"], made["scale"], made["bias"],
            made["class_weight"], row_smoothing, row_scale, smoothing, gamma, z_loss, -100, mean,
            list(wanted),
        )  # fmt: skip
        x, scale, bias, weight = leaves(made)
        eps = (
            row_smoothing.double().clone().requires_grad_() if per_row else torch.tensor(smoothing, dtype=torch.float64)
        )
        found = statistics(made, affine(x, scale, bias), weight)
        rows = loss_formula(made, found, eps if per_row else smoothing, gamma, z_loss)
        soft = made["target"].is_floating_point()
        labels = made["target"][found["kept"]] if not soft else None
        denominator = 1.0 if not mean else float(rows.numel()) if soft else float(weight[labels].sum())
        total = (rows * (row_scale.double() if per_row else 1.0)).sum()
        total = total / denominator if denominator else total * math.nan
        if torch_agrees:
            torch_loss = F.cross_entropy(
                affine(x, scale, bias), made["target"] if not soft else made["target"].double(), weight,
                label_smoothing=smoothing,
            )  # fmt: skip
            torch.testing.assert_close(torch_loss, total, equal_nan=True)
        truth = list(torch.autograd.grad(total, [x, scale, bias, *([eps] if per_row else [])], allow_unused=True))
        kept = found["kept"].unsqueeze(1)
        truth[0] = torch.where(kept, truth[0], 0.0)
        names = [("gradient of logits", truth[0])] if wanted[0] else []
        names += [("gradient of scale", truth[1]), ("gradient of bias", truth[2])] if wanted[1] else []
        names += [("gradient of smoothing", truth[3])] if wanted[2] else []
        if len(names) != len(gradients):
            return [f"{len(gradients)} gradients, not {len(names)}"]
        tolerance = COMPUTED[loss.dtype]
        wrong = difference("loss", loss, total, tolerance) + difference("row loss", row_loss, rows, tolerance)
        for (name, value), got in zip(names, gradients, strict=True):
            wrong += difference(name, got, value, ROUNDED[got.dtype])
        if wanted[0] and gradients[0].dtype != made["logits"].dtype:
            wrong.append(f"gradient in {gradients[0].dtype}")
        return wrong

    return run


def sweep(tile: tuple[int, int, int] | None = STEPS, *, upstream: str = EVERY,
          wanted: tuple[bool, bool] = (True, True), **inputs: Any) -> Callable[[str], list[str]]:  # fmt: skip
    """softmax_stats, then softmax_sweep under upstream gradients of some of the statistics."""

    def run(device: str) -> list[str]:
        made = make(**inputs)
        arguments = [made[key] for key in ("logits", "target", "scale", "bias", "class_weight")]
        names = ("log_sum_exp", "target_logit", "cross_entropy", "uniform", "rest")
        got = call(device, tile, "softmax_stats", *arguments, -100, "uniform" in upstream, True)
        row_max, row_sum, rest, prediction = got[0], got[1], got[6], got[7]
        x, scale, bias, weight = leaves(made)
        z = affine(x, scale, bias)
        found = statistics(made, z, weight)
        tolerance = COMPUTED[row_max.dtype]
        wrong = []
        for name, value in zip(names, got[2:7], strict=True):
            if name != "uniform" or "uniform" in upstream:
                wrong += difference(name, value, found[name], tolerance)
            elif value.shape != (0,):
                wrong.append("uniform was not wanted")
        if not torch.equal(prediction.cpu(), z.argmax(1)):
            wrong.append(f"prediction: {prediction.tolist()}, not {z.argmax(1).tolist()}")
        wrong += difference("row maximum and sum", (row_max + row_sum.log()), found["log_sum_exp"], tolerance)
        generator = torch.Generator().manual_seed(1)
        gradients = {name: torch.randn(row_max.shape, generator=generator).to(row_max.dtype) for name in names}
        total = sum((gradients[name].double() * found[name]).sum() for name in names if name in upstream)
        truth = torch.autograd.grad(total, [x, scale, bias], allow_unused=True)
        given = [gradients[name] if name in upstream else None for name in names]
        swept = call(device, tile, "softmax_sweep", *arguments, row_max, row_sum, rest, -100, *given, list(wanted))
        chosen = [("logits", truth[0])] * wanted[0] + [("scale", truth[1]), ("bias", truth[2])] * wanted[1]
        for (name, value), one in zip(chosen, swept, strict=True):
            wrong += difference(f"gradient of {name}", one, value, ROUNDED[one.dtype])
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
            features[5] = math.nan
        shift = torch.randn(classes, width, generator=generator).add(1000.0).to(compute)
        seen = torch.arange(classes) % 3
        before, given, old = shift.clone(), shift.to(device), features.to(device)
        if kind == "strided":
            old = _strided(features, device)
        with launch.forced(features=tile and launch.FeatureTile(*tile)):
            count, total, square = class_stats(old, labels.to(device), given, seen.to(device), -100, per_feature)
            other = before.clone().to(device)
            again = class_stats(old, labels.to(device), other, seen.to(device), -100, per_feature)
        both = zip((count, total, square), again, strict=True)
        wrong = ["two runs differ" for a, b in both if not torch.equal(a.nan_to_num(), b.nan_to_num())]
        truth = [torch.zeros(classes), torch.zeros(classes, width), torch.zeros(classes, width)]
        truth = [value.double() for value in truth]
        for c in range(classes):
            mine = features[labels == c].double()
            if len(mine) and seen[c] == 0:
                before[c] = mine[0].to(compute)
            deviation = mine - before[c].double()
            truth[0][c], truth[1][c], truth[2][c] = len(mine), deviation.sum(0), deviation.square().sum(0)
        if not torch.equal(given.cpu().nan_to_num(), before.nan_to_num()):
            wrong.append("shift of the new classes")
        tolerance = (1e-5, 1e-3 if compute == torch.float32 else 1e-8)
        wrong += difference("count", count, truth[0], (0, 0)) + difference("sum", total, truth[1], tolerance)
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
                gradient = _strided(values, device)
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
            arguments = (logits, labels, None, None, None)
            _, rows, (gradient,) = call(
                device, tile, "softmax_ce", *arguments, None, None, 0.1, 0.0, 0.0, -100, False,
                [True, False, False],
            )  # fmt: skip
            found = call(device, tile, "softmax_stats", *arguments, -100, True, True)
            for name, value in (("loss", rows), ("gradient", gradient[:, 0]), ("rest", found[6])):
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
            None, 0.0, 0.0, 0.0, -100, mean, [True, True, False],
        )  # fmt: skip
        wrong += difference("loss", loss, torch.tensor(truth), (0, 0))
        wrong += difference("scale", gradients[1], torch.zeros(37), (0, 0))
    return wrong


def mutants(device: str) -> list[str]:
    """Wrong kernels must fail the comparison."""
    import triton_mutants

    from fusedloss.backends.triton import class_stats, softmax_ce, softmax_kernels

    wrong = []
    checks = {
        "label_row": (softmax_ce, cross_entropy()),
        "soft_row": (softmax_ce, cross_entropy(soft=True)),
        "sweep_row": (softmax_ce, sweep()),
        "statistics_row": (softmax_ce, sweep()),
        "add_columns": (softmax_kernels, cross_entropy(ONE_BLOCK)),
        "add_block": (softmax_kernels, cross_entropy()),
        "add_chunks": (class_stats, class_statistics()),
    }
    for name, (module, check) in checks.items():
        right = getattr(module, name)
        setattr(module, name, getattr(triton_mutants, name))
        try:
            if not check(device):
                wrong.append(f"a wrong {name} passed")
        finally:
            setattr(module, name, right)
    return wrong


for _dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    _word = str(_dtype).split(".")[1]
    for _tile, _size in ((STEPS, "steps"), (ONE_BLOCK, "one block")):
        case(cross_entropy(_tile, dtype=_dtype, smoothing=0.1), f"ce {_word} {_size}")
        case(
            cross_entropy(_tile, dtype=_dtype, soft=True, smoothing=0.1, z_loss=0.01),
            f"ce probabilities {_word} {_size}",
        )
    _focal = {"gamma": 2.0, "per_row": True, "mean": False, "wanted": (True, True, True), "z_loss": 0.01}
    case(cross_entropy(dtype=_dtype, **_focal), f"ce focal, per row, {_word}")
    case(sweep(dtype=_dtype), f"statistics {_word} steps")
    case(sweep(dtype=_dtype, soft=True), f"statistics probabilities {_word}")
    case(class_statistics(dtype=_dtype), f"classes {_word}")
for _terms in ("", "scale", "bias", "weight", "scale weight"):
    case(cross_entropy(terms=_terms, torch_agrees=True), f"ce with terms '{_terms}'")
    case(
        cross_entropy(ONE_BLOCK, terms=_terms, smoothing=0.2, torch_agrees=True),
        f"ce smooth with terms '{_terms}'",
    )
case(cross_entropy(soft=True, torch_agrees=True, smoothing=0.2), "ce probabilities as torch")
case(
    cross_entropy(soft=True, terms="", per_row=True, mean=False, wanted=(True, False, True)),
    "ce probabilities per row",
)
for _wanted in ((False, False, False), (True, False, False), (False, True, False), (False, True, True)):
    for _tile in (STEPS, ONE_BLOCK):
        case(
            cross_entropy(_tile, wanted=_wanted, per_row=_wanted[2], mean=not _wanted[2]),
            f"ce wanted {_wanted} {_tile}",
        )
for _layout in ("", "transposed", "gaps", "channels last"):
    for _tile in (STEPS, ONE_BLOCK):
        case(
            cross_entropy(_tile, rows=(3, 5), layout=_layout, smoothing=0.1),
            f"ce positions {_layout} {_tile}",
        )
    case(cross_entropy(rows=(5, 2), layout=_layout, soft=True), f"ce probabilities positions {_layout}")
    case(sweep(ONE_BLOCK, rows=(3, 5), layout=_layout), f"statistics positions {_layout}")
for _layout in ("transposed", "gaps"):
    case(cross_entropy(layout=_layout), f"ce {_layout}")
    case(cross_entropy(layout=_layout, soft=True, dtype=torch.bfloat16), f"ce probabilities {_layout}")
for _special in ("offset", "confident", "nan", "plus infinity", "ignored"):
    for _tile in (STEPS, ONE_BLOCK):
        case(
            cross_entropy(_tile, special=_special, terms="weight", wanted=(True, False, False)),
            f"ce {_special} {_tile}",
        )
for _tile in (STEPS, ONE_BLOCK):
    case(
        cross_entropy(_tile, special="infinite", terms="", wanted=(True, False, False)),
        f"ce infinite {_tile}",
    )
    case(
        cross_entropy(_tile, special="infinite", terms="", soft=True, wanted=(True, False, False)),
        f"ce infinite soft {_tile}",
    )
    case(
        cross_entropy(_tile, special="confident", gamma=0.5, terms="scale", mean=False),
        f"ce focal confident {_tile}",
    )
    case(sweep(_tile, special="confident"), f"statistics confident {_tile}")
    case(sweep(_tile, special="nan", terms="", wanted=(True, False)), f"statistics nan {_tile}")
for _upstream in ("log_sum_exp", "target_logit", "cross_entropy rest", "uniform"):
    case(sweep(upstream=_upstream), f"statistics, gradient of {_upstream}")
    case(
        sweep(upstream=_upstream, soft=True, terms="bias"),
        f"statistics probabilities, gradient of {_upstream}",
    )
case(sweep(wanted=(False, True)), "statistics, columns alone")
case(sweep(terms="", wanted=(True, False)), "statistics without terms")
case(cross_entropy(OWN, classes=1, rows=(5,), terms="scale"), "ce one class")
case(cross_entropy(OWN, classes=2, rows=(1,), terms="scale bias"), "ce one row")
case(cross_entropy(OWN, classes=130, rows=(20,)), "ce own tiles")
case(cross_entropy(OWN, classes=9000, rows=(3,), smoothing=0.1), "ce own tiles, long rows")
case(sweep(OWN, classes=5000, rows=(3,)), "statistics own tiles, long rows")
for _per_feature in (False, True):
    case(class_statistics(per_feature=_per_feature, tile=None), f"classes own tiles {_per_feature}")
    case(class_statistics(per_feature=_per_feature, kind="strided"), f"classes strided {_per_feature}")
    case(class_statistics(per_feature=_per_feature, kind="nan"), f"classes nan {_per_feature}")
case(class_statistics(rows=4, classes=40, per_feature=True), "classes mostly absent")
case(scaling, "scale in place")
case(bad_labels, "labels out of range")
case(empty, "no rows")
# On a GPU a replaced function is compiled already.
INTERPRETED = {"mutants": mutants}


def outcome(check: Callable[[str], list[str]], device: str) -> list[str]:
    try:
        return check(device)
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    chosen = {name: check for name, check in {**CASES, **INTERPRETED}.items() if sys.argv[1:] in ([], [name])}
    print(json.dumps({name: outcome(check, "cpu") for name, check in chosen.items()}))
