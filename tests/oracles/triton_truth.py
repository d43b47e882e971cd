"""Inputs of the Triton backend's cases and what they should give, in float64 formulas of their own."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from oracle import ENTRY_EPSILONS, TENSOR_EPSILONS, compare
from torch import Tensor

from fusedloss.core.row_loss import RowOptions

# A GPU's exp and log are off by more than those of NumPy, which interprets; a power of 2 is rounded once more than exp.
_LOOSER, _LOOSER_ON_GPU = 2, 8


class Penalty(NamedTuple):
    """sum_k relu(max z - z_k - margin), times scale, times strength; strength None: one per row."""

    margin: float = 1.5
    strength: float | None = 0.3
    scale: float = 1.0 / 37
    mix: bool = False


def difference(what: str, got: Tensor, truth: Tensor) -> list[str]:
    """What is wrong with `got`, in words, by the oracle's rule as if eager PyTorch made no error."""
    if got.shape != truth.shape:
        return [f"{what}: shape {tuple(got.shape)}, not {tuple(truth.shape)}"]
    truth = truth.detach().double()
    if not got.is_floating_point():
        return [] if torch.equal(got.cpu().double(), truth) else [f"{what}: {got.tolist()}, not {truth.tolist()}"]
    factor = _LOOSER_ON_GPU if got.is_cuda else _LOOSER
    got = got.detach().cpu()
    computing = torch.float64 if got.dtype == torch.float64 else torch.float32
    try:
        compare(what, got, truth, truth, computing, got.dtype, factor * TENSOR_EPSILONS, factor * ENTRY_EPSILONS)
    except AssertionError as error:
        return [str(error)]
    return []


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


def on_device(values: Any, device: str) -> Any:
    """A copy there with the same strides (PyTorch's own copies are dense), of each tensor of a named tuple."""
    if isinstance(values, tuple):
        return type(values)(*(on_device(value, device) for value in values))
    if not isinstance(values, Tensor):
        return values
    size = max(0, 1 + sum((n - 1) * step for n, step in zip(values.shape, values.stride(), strict=True)))
    made = torch.empty(size, dtype=values.dtype, device=device).as_strided(values.shape, values.stride())
    return made.copy_(values)


def make(
    *, dtype: torch.dtype = torch.float32, rows: tuple[int, ...] = (7,), classes: int = 37, soft: bool = False,
    terms: str = "scale bias weight", layout: str = "", special: str = "", cap: float = 0.0, margin: bool = False,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Inputs of one case, on the CPU; with `margin` the label's logit is overridden."""
    generator = torch.Generator().manual_seed(seed)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (rows[0], classes, *rows[1:])
    logits = (3 * torch.randn(shape, generator=generator)).to(dtype)
    labels = torch.randint(classes, rows, generator=generator)
    if rows[0] > 2:
        labels[2] = -100
    probabilities = torch.rand(shape, generator=generator).softmax(1)
    _spoil(special, logits, labels, probabilities)
    classwise = {
        "scale": torch.rand(classes, generator=generator) + 0.5,
        "bias": torch.randn(classes, generator=generator),
        "class_weight": torch.rand(classes, generator=generator) * (torch.arange(classes) % 5 != 4),
    }
    per_row, target_override, target_override_grad = (
        torch.rand(rows, generator=generator, dtype=torch.float64).to(compute) for _ in range(3)
    )
    target_override = 6 * target_override - 3
    if special == "far label":
        target_override[0], target_override[1], target_override[3] = 300.0, -300.0, -math.inf
    return {
        "logits": laid_out(logits, layout),
        "target": laid_out(probabilities.to(dtype), layout) if soft else labels,
        **{key: value.to(compute) if key.split("_")[-1] in terms else None for key, value in classwise.items()},
        "target_override": target_override if margin else None,
        "target_override_grad": target_override_grad + 0.5 if margin else None,
        "cap": cap,
        "per_row": per_row,
    }


def _spoil(special: str, logits: Tensor, labels: Tensor, probabilities: Tensor) -> None:
    if special == "infinite":
        # The first block and a target; row 2 stays whole.
        logits[:, :20], labels[0], labels[1] = -math.inf, 3, 30
        logits[2], logits[3] = 0.0, -math.inf
        probabilities[:, :20] = 0
    if special == "nan":
        logits[1, 5], logits[4, int(labels[4])] = math.nan, math.nan
    if special == "plus infinity":
        logits[5, 3] = math.inf
    if special == "offset":
        logits += 2.0**22
    if special == "large":
        logits *= 2.0**13
    if special == "tiny":
        logits *= 2.0**-12
    if special == "confident":
        logits[:, :], labels[:] = -12.0, 5
        logits[:, 5] = 12.0
    if special == "ignored":
        labels[:] = -100
    if special == "ties":
        logits.round_().clamp_(-4, 4)


class Leaves(NamedTuple):
    """Differentiable inputs in float64."""

    x: Tensor
    scale: Tensor
    bias: Tensor
    target_override: Tensor


def leaves(made: dict[str, Any]) -> tuple[Leaves, Tensor]:
    """Leaves, and class weights."""
    classes = made["logits"].shape[1]
    x = made["logits"].detach().double().clone()
    scale, bias, weight = (
        torch.full((classes,), default, dtype=torch.float64) if made[key] is None else made[key].double()
        for key, default in (("scale", 1.0), ("bias", 0.0), ("class_weight", 1.0))
    )
    override = made["per_row"] if made["target_override"] is None else made["target_override"]
    return Leaves(*(value.clone().double().requires_grad_() for value in (x, scale, bias, override))), weight


def columns(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (like.dim() - 2))


def plain_logits(made: dict[str, Any], leaf: Leaves) -> Tensor:
    """scale * c(x) + bias, without a gradient through scale and bias where x is -inf."""
    capped = made["cap"] * torch.tanh(leaf.x / made["cap"]) if made["cap"] else leaf.x
    masked = capped == -math.inf
    inner = torch.where(masked, 0.0, capped) * columns(leaf.scale, capped) + columns(leaf.bias, capped)
    return torch.where(masked, capped, inner)


def final_logits(made: dict[str, Any], leaf: Leaves) -> Tensor:
    """The same with the override at the label."""
    z = plain_logits(made, leaf)
    if made["target_override"] is None:
        return z
    kept, label = _labels(made)
    at_label = torch.zeros_like(z, dtype=torch.bool).scatter(1, label, kept.unsqueeze(1))
    return torch.where(at_label, leaf.target_override.unsqueeze(1), z)


def through_label(made: dict[str, Any], gradient: Tensor, of_label: Tensor) -> Tensor:
    """dL/dx with the part that reaches it by way of the override."""
    kept, label = _labels(made)
    part = torch.where(kept, of_label * made["target_override_grad"].double(), 0.0).unsqueeze(1)
    return gradient.scatter_add(1, label, part)


def _labels(made: dict[str, Any]) -> tuple[Tensor, Tensor]:
    kept = made["target"] != -100
    return kept, torch.where(kept, made["target"], 0).unsqueeze(1)


def statistics(made: dict[str, Any], z: Tensor, weight: Tensor, penalty_margin: float = 0.0) -> dict[str, Tensor]:
    """The row statistics in float64, differentiable."""
    target = made["target"]
    log_p = z.log_softmax(1)
    spread = columns(weight, z).expand_as(z)

    def weighted(factor: Tensor, values: Tensor) -> Tensor:
        return torch.where(factor == 0, 0.0, factor * values).sum(1)

    if target.is_floating_point():
        q = target.double() * spread
        kept = torch.ones_like(z[:, 0], dtype=torch.bool)
        logit, hard, one_minus_pt = weighted(q, z), weighted(q, -log_p), torch.zeros_like(z[:, 0])
    else:
        kept, label = _labels(made)
        logit = z.gather(1, label).squeeze(1)
        hard = -log_p.gather(1, label).squeeze(1) * weight[label.squeeze(1)]
        others = torch.ones_like(z, dtype=torch.bool).scatter(1, label, False)
        one_minus_pt = torch.where(others, log_p.exp(), 0.0).sum(1)
    values = {
        "target_logit": logit,
        "cross_entropy": hard,
        "smooth_loss": weighted(spread, -log_p),
        "one_minus_pt": one_minus_pt,
        "hinge": _hinge(z, penalty_margin),
    }
    values = {key: torch.where(kept, value, 0.0) for key, value in values.items()}
    return {"log_sum_exp": z.logsumexp(1), **values, "kept": kept}


def _hinge(z: Tensor, margin: float) -> Tensor:
    """sum_k relu(max z - z_k - margin); the maximum's gradient goes to the first largest."""
    classes = torch.arange(z.shape[1]).view(1, -1, *[1] * (z.dim() - 2))
    first = torch.where(z == z.amax(1, keepdim=True), classes, z.shape[1]).amin(1, keepdim=True)
    top = z.gather(1, first.clamp(max=z.shape[1] - 1))
    return (top - z - margin).relu().sum(1)


def row_loss(
    made: dict[str, Any], values: dict[str, Tensor], options: RowOptions, smoothing: Any, strength: Any
) -> Tensor:
    """Loss of each row; `smoothing` and `strength` are numbers or one value per row."""
    row = values["cross_entropy"]
    if isinstance(smoothing, Tensor) or smoothing:
        row = (1 - smoothing) * row + smoothing / made["logits"].shape[1] * values["smooth_loss"]
    if options.focal_gamma:
        row = values["one_minus_pt"] ** options.focal_gamma * row
    if options.poly_epsilon:
        row = row + options.poly_epsilon * values["one_minus_pt"]
    if isinstance(strength, Tensor) or strength:
        penalty = options.penalty_scale * values["hinge"]
        row = (1 - strength) * row + strength * penalty if options.penalty_mix else row + strength * penalty
    if options.z_loss:
        row = row + options.z_loss * values["log_sum_exp"].square()
    return torch.where(values["kept"], row, 0.0)


def guess(made: dict[str, Any], leaf: Leaves) -> tuple[Tensor, Tensor]:
    """First largest class and its probability, of the logits without an override."""
    z = plain_logits(made, leaf)
    return z.argmax(1), z.softmax(1).amax(1)


def repeated(device: str, function: Callable[[], Any]) -> Any:
    """What the function returns.

    On a GPU it must return the same bits every time: again, where waiting for the device is an error, and captured in a
    graph and replayed.
    """
    first = function()
    if device != "cuda":
        return first
    torch.cuda.set_sync_debug_mode("error")
    try:
        others = [function()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    # Without PyTorch's own allocator, as under compute-sanitizer, nothing can be captured.
    if "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            others.append(function())
        graph.replay()
    for other in others:
        for one, again in zip(_flat(first), _flat(other), strict=True):
            bits = [value.detach().cpu().nan_to_num(12345.0) for value in (one, again)]
            assert torch.equal(*bits), "two runs differ"
    return first


def _flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in _flat(part)]
