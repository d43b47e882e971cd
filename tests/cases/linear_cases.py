"""Linear heads for tests: random ones, the truth about them in float64, and how near to it a loss must be."""

from dataclasses import dataclass, field, replace

import torch
from oracle import Case, cast, eager
from softmax_battery import fused_terms

import fusedloss


def ramp(low, high, *shape):
    return torch.linspace(low, high, int(torch.tensor(shape).prod())).reshape(shape)


OPTIONS = {
    "plain": {},
    "weight": {"weight": ramp(0.2, 2.0, 23)},
    "smoothing": {"label_smoothing": 0.1},
    "weight and smoothing": {"weight": ramp(0.2, 2.0, 23), "label_smoothing": 0.3},
    "smoothing per row": {"label_smoothing": ramp(0.0, 0.9, 9), "learned": ("label_smoothing",)},
    "temperature": {"terms": (("temperature", ramp(0.5, 2.0, 23)),), "learned": ("term0",)},
    "scale and prior": {
        "terms": (("scale", torch.tensor(1.7)), ("prior", ramp(-3.0, 0.0, 23), 1.0)),
        "learned": ("term0", "term1"),
    },
    "soft cap": {"terms": (("soft cap", 3.0),)},
    "soft cap after a scale": {"terms": (("scale", 2.0), ("soft cap", 3.0))},
    "focal and z loss": {"focal_gamma": 2.0, "z_loss": 1e-2},
    "poly": {"poly_epsilon": 1.5},
    "additive margin": {"terms": (("additive", ramp(0.1, 0.5, 23)), ("scale", 1.5)), "learned": ("term0",)},
    "penalty": {"penalty": (1.0, "mean", False), "penalty_strength": 0.1},
    "penalty per row": {
        "penalty": (0.5, "sum", True),
        "penalty_strength": ramp(0.0, 0.5, 9),
        "learned": ("penalty_strength",),
    },
    "sample weight": {"sample_weight": ramp(0.1, 2.0, 9), "learned": ("sample_weight",)},
}
COSINES = {
    "plain": {},
    "scale": {"terms": (("scale", torch.tensor(8.0)),), "learned": ("term0",)},
    "temperature": {"terms": (("scale", 8.0), ("temperature", ramp(0.5, 2.0, 23))), "learned": ("term1",)},
    "angular": {"terms": (("angular", 0.5, "monotone", "exact"), ("scale", torch.tensor(8.0))), "learned": ("term1",)},
    "angular per class": {
        "terms": (("angular", ramp(0.1, 0.6, 23), "easy", "exact"), ("scale", 8.0)),
        "learned": ("term0",),
    },
    "angular per row": {"terms": (("angular", ramp(0.1, 0.6, 9, 1), "none", "exact"), ("scale", 8.0))},
    "straight through": {"terms": (("angular", 0.5, "none", "straight_through"), ("scale", 8.0))},
    "additive": {"terms": (("additive", 0.35), ("scale", 8.0))},
    "combined": {"terms": (("combined", 0.3, 1.2, 0.1, "monotone", "exact"), ("scale", 8.0))},
    "margin, smoothing, weight": {
        "terms": (("angular", 0.5, "monotone", "exact"), ("scale", 8.0)),
        "label_smoothing": 0.1,
        "weight": ramp(0.2, 2.0, 23),
        "focal_gamma": 1.0,
        "poly_epsilon": -0.7,
    },
}


@dataclass
class Head:
    """Arguments of linear_cross_entropy: `case` has the rest, its own input is never read."""

    case: Case
    x: torch.Tensor
    w: torch.Tensor
    b: torch.Tensor | None = None
    normalize: bool = False
    learned: tuple[str, ...] = field(default=("x", "w", "b"))

    def tensors(self):
        own = {"x": self.x, "w": self.w, "b": self.b}
        named = {name: value for name, value in own.items() if value is not None}
        more = {name: value for name, value in self.case.tensors().items() if name in self.case.learned}
        more.pop("input", None)
        return {name: value for name, value in (named | more).items() if value.requires_grad}


def random_head(rows=9, num_classes=23, width=7, *, dtype=torch.float32, seed=0, spread=1.0, bias=False, soft=False,
                ignored=0.2, normalize=False, **options):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    w = (spread * torch.randn(num_classes, width, generator=generator)).to(dtype)
    b = torch.randn(num_classes, generator=generator).to(dtype) if bias else None
    if soft:
        target = torch.rand(rows, num_classes, generator=generator).softmax(1).to(dtype)
    else:
        target = torch.randint(num_classes, (rows,), generator=generator)
        target = torch.where(torch.rand(rows, generator=generator) < ignored, -100, target)
        target[:1] = num_classes - 1
    return Head(Case(torch.zeros(rows, num_classes), target, **{"learned": (), **options}), x, w, b, normalize)


def in_dtype(head: Head, dtype) -> Head:
    """Every floating tensor as a leaf in `dtype`."""

    def leaf(tensor, name):
        if tensor is None:
            return None
        return tensor.detach().to(dtype).clone().requires_grad_(name in head.learned)

    x, w, b = leaf(head.x, "x"), leaf(head.w, "w"), leaf(head.b, "b")
    return replace(head, case=cast(head.case, dtype), x=x, w=w, b=b)


def truth(head: Head) -> torch.Tensor:
    """The loss in the dtype of the head's tensors, of logits that are stored."""
    x, w = head.x, head.w
    if head.normalize:
        x, w = (rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True) for rows in (x, w))
    logits = torch.nn.functional.linear(x, w, head.b)
    if head.normalize:
        logits = logits.clamp(-1, 1)
    return eager(replace(head.case, input=logits))


def fused(head: Head, **keywords) -> torch.Tensor:
    """The package's loss."""
    case = head.case
    penalty = None
    if case.penalty is not None:
        margin, over, mix = case.penalty
        penalty = fusedloss.MarginPenalty(margin, case.penalty_strength, over, mix)
    return fusedloss.linear_cross_entropy(
        head.x,
        head.w,
        case.target,
        linear_bias=head.b,
        normalize=head.normalize,
        weight=case.weight,
        ignore_index=case.ignore_index,
        reduction=case.reduction,
        label_smoothing=case.label_smoothing,
        terms=fused_terms(case),
        focal_gamma=case.focal_gamma,
        poly_epsilon=case.poly_epsilon,
        z_loss=case.z_loss,
        margin_penalty=penalty,
        sample_weight=case.sample_weight,
        **keywords,
    )


def gradients(head: Head, loss_of) -> dict[str, torch.Tensor]:
    loss = loss_of(head)
    found = {"loss": loss.detach()}
    wanted = head.tensors()
    if wanted:
        upstream = torch.as_tensor(head.case.upstream, dtype=loss.dtype).expand(loss.shape)
        found |= dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()), upstream), strict=True))
    return found


def check(head: Head, loss_of=fused, epsilons=64.0) -> dict[str, torch.Tensor]:
    """Asserts each tensor's error in norm: at most twice eager's in the computing type, and some roundings."""
    dtype = head.x.dtype
    computing = torch.float64 if dtype == torch.float64 else torch.float32
    exact = gradients(in_dtype(head, torch.float64), truth)
    usual = gradients(in_dtype(head, computing), truth)
    found = gradients(in_dtype(head, dtype), loss_of)
    assert set(found) == set(exact)
    for name, expected in exact.items():
        assert found[name].dtype == (computing if name == "loss" else dtype) or name not in ("loss", "x", "w", "b")
        error = float((found[name].double() - expected).norm())
        eager_error = float((usual[name].double() - expected).norm())
        # 16-bit slopes, then 16-bit products: two roundings of each addend.
        rounding = 4 * torch.finfo(dtype).eps if dtype != computing else 0.0
        allowed = 2 * eager_error + (epsilons * torch.finfo(computing).eps + rounding) * float(expected.norm()) + 1e-14
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}, eager {eager_error:.3g}"
    return found
