"""Losses on logits beyond cross-entropy, forward and backward: all options at once, probability targets, FeDLaS."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedloss
from bench import roofline
from bench.cases import Case, Contest, Mismatch, compiled
from fusedloss import ClassTemperature, FeDLaSLoss, Prior

Loss = Callable[[Tensor, Tensor], Tensor]
# Beyond eager's own distance from float64, relative; torch.compile sums in another order, and less exactly.
_TOLERANCE, _RIVALS_TOLERANCE = 1e-6, 2e-5
_WIDTH = 512


class Rivals(NamedTuple):
    """The fused loss and eager ones of the same value; `eager` computes in the dtype of its logits.

    ``parameters`` are learned beside the logits. ``others`` are timed too, and are other losses.
    """

    fused: Loss
    eager: Loss
    soft: bool = False
    parameters: tuple[nn.Parameter, ...] = ()
    others: dict[str, Loss] = {}  # noqa: RUF012


def everything(rows: int, num_classes: int) -> Rivals:
    """Class weights, smoothing, focal, a temperature for each class and a prior, against plain cross-entropy too."""
    generator = torch.Generator().manual_seed(1)
    tau, weight = (torch.rand(num_classes, generator=generator) * 1.5 + 0.5 for _ in range(2))
    log_prior = torch.rand(num_classes, generator=generator).log_softmax(0)

    def eager(logits: Tensor, target: Tensor) -> Tensor:
        temperature, prior, weights = (tensor.to(logits.dtype) for tensor in (tau, log_prior, weight))
        log_p = (logits / temperature + prior).log_softmax(1)
        chosen = log_p.gather(1, target.unsqueeze(1)).squeeze(1)
        share = weights[target]
        row = -0.9 * share * chosen - 0.1 / log_p.shape[1] * (weights * log_p).sum(1)
        return ((1 - chosen.exp()) ** 2 * row).sum() / share.sum()

    def fused(logits: Tensor, target: Tensor) -> Tensor:
        terms = (ClassTemperature(tau), Prior(log_prior))
        return fusedloss.cross_entropy(logits, target, weight, label_smoothing=0.1, terms=terms, focal_gamma=2.0)

    return Rivals(fused, eager, others={"plain": fusedloss.cross_entropy})


def probabilities(rows: int, num_classes: int, weighted: bool) -> Rivals:
    """Mixup's targets; with class weights and smoothing as well where `weighted`."""
    weight = torch.rand(num_classes, generator=torch.Generator().manual_seed(1)) + 0.5 if weighted else None
    smoothing = 0.1 if weighted else 0.0

    def eager(logits: Tensor, target: Tensor) -> Tensor:
        weights = None if weight is None else weight.to(logits.dtype)
        return F.cross_entropy(logits, target.to(logits.dtype), weights, label_smoothing=smoothing)

    def fused(logits: Tensor, target: Tensor) -> Tensor:
        return fusedloss.cross_entropy(logits, target, weight, label_smoothing=smoothing)

    return Rivals(fused, eager, soft=True)


def fedlas(rows: int, num_classes: int, base: str, gate: str) -> Rivals:
    """A FeDLaS step: statistics of the features' norms, gate and loss, with the gate's gradients."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(rows, _WIDTH, generator=generator) * torch.linspace(0.5, 2.0, rows).unsqueeze(1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = FeDLaSLoss(num_classes, base, gate=gate)

    def fused(logits: Tensor, target: Tensor) -> Tensor:
        return module(logits, target, features)

    def eager(logits: Tensor, target: Tensor) -> Tensor:
        norms = features.to(logits.dtype).abs().sum(1)
        # Every batch of this benchmark is the same, so that the running statistics are the batch's.
        indicator = (norms - norms.mean()) / (norms.std(correction=0) + 1e-3)
        psi = torch.ones_like(norms)
        if module.gate is not None:
            network = module.gate if logits.dtype == torch.float32 else copy.deepcopy(module.gate).to(logits.dtype)
            p = network(logits.detach()).softmax(1)
            difference = p[:, 0] - p[:, 1]
            psi = torch.where(difference > 0, 1.0, -1.0) + (difference - difference.detach())
        alpha = 2 * module.strength * torch.sigmoid(module.beta * psi * indicator)
        log_p = logits.log_softmax(1)
        hard = -log_p.gather(1, target.unsqueeze(1)).squeeze(1)
        if base == "smoothing":
            other = -log_p.mean(1)
        else:
            other = (logits.max(1, keepdim=True).values - logits - module.margin).relu().mean(1)
        return ((1 - alpha) * hard + alpha * other).mean()

    return Rivals(fused, eager, parameters=tuple(module.parameters()))


def prepare(shape: tuple[int, int], make: Callable[[int, int], Rivals]) -> Contest:
    """Two sets of inputs, which repetitions alternate between, and the contestants on one leaf tensor."""
    rivals = make(*shape)
    generator = torch.Generator().manual_seed(0)
    rows, num_classes = shape
    sources = [4 * torch.randn(shape, generator=generator) for _ in range(2)]
    if rivals.soft:
        targets = [torch.randn(shape, generator=generator).mul(3).softmax(1) for _ in range(2)]
    else:
        targets = [torch.randint(num_classes, (rows,), generator=generator) for _ in range(2)]
    logits, target = sources[0].clone().requires_grad_(), targets[0].clone()
    losses = {"fused": rivals.fused, "eager": rivals.eager, "compiled": compiled(rivals.eager)}

    def refill(repetition: int) -> None:
        for leaf in (logits, *rivals.parameters):
            leaf.grad = None
        logits.detach().copy_(sources[repetition % 2])
        target.copy_(targets[repetition % 2])

    def step(loss: Loss) -> Callable[[], None]:
        return lambda: loss(logits, target).backward()

    return Contest(
        calls={name: step(loss) for name, loss in (losses | rivals.others).items()},
        limit=roofline.copy_of(logits),
        refill=refill,
        check=lambda: check(losses, sources[0], targets[0], rivals.parameters),
        peak_baseline=step(rivals.eager),
    )


def check(losses: dict[str, Loss], source: Tensor, target: Tensor, parameters: tuple[nn.Parameter, ...] = ()) -> None:
    """Raises `Mismatch` unless every loss and its gradients are as near to float64 as eager's, plus a tolerance."""
    truth = _truth(losses["eager"], source, target)
    usual = None
    for name in ("eager", *(name for name in losses if name != "eager")):
        leaf = source.detach().requires_grad_()
        value = losses[name](leaf, target)
        gradient, *others = torch.autograd.grad(value, [leaf, *parameters])
        distances = list(_distances(value, gradient, truth))
        if usual is None:
            usual, usual_others = distances, others
        beyond = _TOLERANCE if name == "fused" else _RIVALS_TOLERANCE
        if not all(found <= least + beyond for found, least in zip(distances, usual, strict=True)):
            raise Mismatch(f"{name} is {distances} from float64 (loss, gradient on average and at most), eager {usual}")
        for one, other in zip(others, usual_others, strict=True):
            if not torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max())):
                raise Mismatch(f"{name}: the gate's gradients are off by {float((one - other).abs().max()):.3g}")


def _truth(eager: Loss, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    leaf = source.double().requires_grad_()
    value = eager(leaf, target)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def _distances(value: Tensor, gradient: Tensor, truth: tuple[Tensor, Tensor]) -> Iterator[float]:
    exact_value, exact = truth
    error = gradient.double().sub_(exact).abs_()
    yield float((value.detach() - exact_value).abs() / exact_value.abs().clamp(min=1.0))
    yield float(error.sum() / exact.abs().sum())
    yield float(error.max() / exact.abs().max())


def _cases(
    title: str, make: Callable[[int, int], Rivals], targets: dict[tuple[int, int], dict[str, float]], soft: bool = False
) -> Iterator[Case]:
    for shape in (*targets, (512, 100)):
        yield Case(
            operation="logit_losses",
            title=title,
            shape=shape,
            dtype=torch.float32,
            # The logits, and probabilities where they are the target, are read once; one gradient is written.
            moved=(3 if soft else 2) * shape[0] * shape[1] * 4,
            limit="copy",
            prepare=functools.partial(prepare, shape, make),
            targets=targets.get(shape, {}),
            quick=shape not in targets,
        )


_SHAPES = ((4096, 1000), (1024, 10000))


def _for_each_shape(**targets: float) -> dict[tuple[int, int], dict[str, float]]:
    return dict.fromkeys(_SHAPES, targets)


CASES = (
    *_cases(
        "class weights, smoothing, focal, temperature and prior at once",
        everything,
        _for_each_shape(eager=6.0, compiled=3.0, plain=1 / 1.3, peak=1.0),
    ),
    *_cases("probability targets", functools.partial(probabilities, weighted=False), _for_each_shape(eager=3.0), True),
    *_cases(
        "probability targets, weights and smoothing",
        functools.partial(probabilities, weighted=True),
        _for_each_shape(eager=3.0),
        True,
    ),
    *(
        case
        for base in ("smoothing", "margin")
        for gate in ("learned", "positive")
        for case in _cases(
            f"FeDLaS step, base {base}, {gate} gate",
            functools.partial(fedlas, base=base, gate=gate),
            _for_each_shape(eager=4.0) | {(8192, 100): {"eager": 4.0}},
        )
    ),
)
