"""The truth that kernels are judged by: eager PyTorch in float64, sharing no code with the package.

`eager` is the loss in plain operations in any dtype. In float64 it is the truth; in the dtype that a kernel
computes in it is what a user would have had: a kernel may be no further from the truth than twice that, plus
a tolerance.
"""

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

# The tolerance in units of the computing dtype's epsilon: of a tensor's largest entry, and of each entry.
TENSOR_EPSILONS = 16
ENTRY_EPSILONS = 4


@dataclass
class Case:
    """Arguments of a loss.

    `terms` hold ("temperature", tau), ("scale", s), ("prior", log_prior, factor), ("soft cap", cap),
    ("additive", m), ("angular", m, fallback, gradient) or ("combined", m2, m1, m3, fallback, gradient);
    `penalty` is (margin, over, mix) and `penalty_strength` goes with it.
    """

    input: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor | None = None
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float | torch.Tensor = 0.0
    terms: tuple = ()
    focal_gamma: float = 0.0
    poly_epsilon: float = 0.0
    z_loss: float = 0.0
    sample_weight: torch.Tensor | None = None
    penalty: tuple[float, str, bool] | None = None
    penalty_strength: float | torch.Tensor = 0.0
    upstream: torch.Tensor | float = 1.0
    learned: tuple[str, ...] = field(default=("input",))

    def tensors(self):
        """The tensors by name that a gradient may be asked for."""
        named = {
            "input": self.input,
            "label_smoothing": self.label_smoothing,
            "sample_weight": self.sample_weight,
            "penalty_strength": self.penalty_strength,
        }
        named |= {f"term{i}": term[1] for i, term in enumerate(self.terms)}
        return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


def computing_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def zero_safe_product(weight, value):
    """weight * value, and 0 where the weight is 0: a class that does not count may be masked with -inf."""
    return torch.where(weight == 0, torch.zeros_like(value), weight * value)


def per_class(value, z):
    return value.reshape(-1, *[1] * (z.dim() - 2)) if isinstance(value, torch.Tensor) and value.dim() == 1 else value


def apply_terms(z, terms, target=None):
    """Logits after the terms; margins change the class of `target` (labels, -1 for none) and need it."""
    for name, value, *rest in terms:
        if name == "temperature":
            z = z / per_class(value, z)
        elif name == "scale":
            z = z * per_class(value, z)
        elif name == "soft cap":
            z = value * torch.tanh(z / value)
        elif name == "prior":
            z = z + rest[0] * per_class(value, z)
        elif target is not None:
            z = with_margin(z, target, name, value, *rest)
    return z


def with_margin(z, target, name, value, *rest):
    """The margin of each row's label: `value` is a float, one per class (K,), or one per row (B, 1)."""
    label = target.clamp(min=0)
    if isinstance(value, torch.Tensor) and value.dim() == 2:
        value = value.reshape(-1, *[1] * (label.dim() - 1)).expand(label.shape)
    elif isinstance(value, torch.Tensor) and value.dim() == 1:
        value = value[label]
    chosen = z.gather(1, label.unsqueeze(1)).squeeze(1)
    straight = rest[-1:] == ("straight_through",)
    x = chosen.detach() if straight else chosen
    if name == "additive":
        new = x - value
    else:
        m1, m3, fallback, _ = (1.0, 0.0, *rest) if name == "angular" else rest
        angle = m1 * x.acos() + value
        new = angle.cos()
        if fallback == "monotone":
            sine = value.sin() if isinstance(value, torch.Tensor) else math.sin(value)
            beyond = x - value * sine if m1 == 1 else -2 - new
            new = torch.where(angle > torch.pi, beyond, new)
        elif fallback == "easy":
            new = torch.where(x > 0, new, x)
        new = new - m3
        if straight:
            new = new + (chosen - chosen.detach())
    new = torch.where(target >= 0, new, chosen)
    return z.scatter(1, label.unsqueeze(1), new.unsqueeze(1))


def per_row(value, rows):
    if isinstance(value, torch.Tensor) and 0 < value.dim() < len(rows):
        return value.reshape(-1, *[1] * (len(rows) - 1)).expand(rows)
    return value


def eager(case: Case) -> torch.Tensor:
    """The loss of a case in the dtype of its tensors."""
    plain = not isinstance(case.label_smoothing, torch.Tensor) and case.sample_weight is None
    plain = plain and case.focal_gamma == 0 and case.poly_epsilon == 0 and case.z_loss == 0 and case.penalty is None
    z = case.input if case.input.dim() > 1 else case.input.unsqueeze(0)
    z = apply_terms(z, case.terms, _labels(case, z))
    masked = bool(torch.isinf(z).any()) and case.target.is_floating_point()
    if plain and not masked:
        z = z if case.input.dim() > 1 else z.squeeze(0)
        options = {"ignore_index": case.ignore_index, "reduction": case.reduction}
        target = case.target if case.target.is_floating_point() else case.target.long()
        return F.cross_entropy(z, target, case.weight, label_smoothing=case.label_smoothing, **options)
    return written_out(case, z)


def _labels(case, z):
    """Labels in the rows' shape, -1 in ignored rows; None for probabilities."""
    if case.target.is_floating_point():
        return None
    target = case.target.reshape(z.shape[:1] + z.shape[2:]).long()
    return torch.where(target == case.ignore_index, -1, target)


def written_out(case: Case, z: torch.Tensor) -> torch.Tensor:
    """The loss of logits `z` (terms applied) by its formula, for what torch has no argument for."""
    num_classes = z.shape[1]
    rows = z.shape[:1] + z.shape[2:]
    weight = torch.ones(num_classes, dtype=z.dtype) if case.weight is None else case.weight
    smoothing, sample_weight = per_row(case.label_smoothing, rows), per_row(case.sample_weight, rows)
    log_p = z.log_softmax(1)
    lse = z.logsumexp(1)
    if case.target.is_floating_point():
        q = case.target.reshape(z.shape)
        smooth = isinstance(smoothing, torch.Tensor) or smoothing != 0
        if smooth:
            eps = smoothing.reshape(rows).unsqueeze(1) if isinstance(smoothing, torch.Tensor) else smoothing
            q = (1 - eps) * q + eps / num_classes
        q = q * per_class(weight, z)
        if case.focal_gamma:
            p = log_p.exp()
            certain = p == 1
            q = torch.where(certain, 0, torch.where(certain, 0.5, 1 - p) ** case.focal_gamma * q)
        loss = -zero_safe_product(q, log_p).sum(1)
        if case.poly_epsilon:
            loss = loss + case.poly_epsilon * (case.target.reshape(z.shape) * (1 - log_p.exp())).sum(1)
        kept = torch.ones(rows, dtype=torch.bool)
        share = torch.ones(rows, dtype=z.dtype)
    else:
        target = case.target.reshape(rows).long()
        kept = target != case.ignore_index
        label = torch.where(kept, target, 0)
        picked = label.unsqueeze(1)
        label_weight = weight[label]
        hard = -label_weight * log_p.gather(1, picked).squeeze(1)
        loss = hard
        if isinstance(smoothing, torch.Tensor) or smoothing != 0:
            uniform = -zero_safe_product(per_class(weight, z).expand_as(z), log_p).sum(1)
            loss = (1 - smoothing) * hard + smoothing * uniform / num_classes
        others = log_p.masked_fill(torch.zeros_like(z, dtype=torch.bool).scatter(1, picked, True), -torch.inf)
        one_minus_pt = others.exp().sum(1)
        if case.focal_gamma:
            # A certain row has loss and slope 0; the power alone has an infinite slope there below gamma = 1.
            certain = one_minus_pt == 0
            loss = torch.where(certain, 0, torch.where(certain, 1, one_minus_pt) ** case.focal_gamma * loss)
        if case.poly_epsilon:
            loss = loss + case.poly_epsilon * one_minus_pt
        share = torch.where(kept, label_weight, 0)
    if case.penalty is not None:
        margin, over, mix = case.penalty
        gaps = (z.max(1, keepdim=True).values - z - margin).relu()
        hinge = gaps.mean(1) if over == "mean" else gaps.sum(1)
        strength = per_row(case.penalty_strength, rows)
        strength = strength.reshape(rows) if isinstance(strength, torch.Tensor) else strength
        loss = (1 - strength) * loss + strength * hinge if mix else loss + strength * hinge
    if case.z_loss:
        loss = loss + case.z_loss * lse.square()
    loss = torch.where(kept, loss, 0)
    if sample_weight is not None:
        loss, share = loss * sample_weight.reshape(rows), share * sample_weight.reshape(rows)
    if case.reduction == "none":
        return loss.reshape(()) if case.input.dim() == 1 else loss
    return loss.sum() if case.reduction == "sum" else loss.sum() / share.sum()


def cast(case: Case, dtype: torch.dtype) -> Case:
    """The case with every floating tensor in `dtype`, as leaves; those in `learned` require gradients."""

    def copy(value, name=None):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(dtype).clone().requires_grad_(name in case.learned)

    return Case(
        copy(case.input, "input"),
        copy(case.target),
        copy(case.weight),
        case.ignore_index,
        case.reduction,
        copy(case.label_smoothing, "label_smoothing"),
        tuple((t[0], copy(t[1], f"term{i}"), *t[2:]) for i, t in enumerate(case.terms)),
        case.focal_gamma,
        case.poly_epsilon,
        case.z_loss,
        copy(case.sample_weight, "sample_weight"),
        case.penalty,
        copy(case.penalty_strength, "penalty_strength"),
        copy(case.upstream),
        case.learned,
    )


def loss_and_gradients(case: Case, loss_of) -> dict[str, torch.Tensor]:
    """{"loss": value, name: gradient, ...} of loss_of(case) for the tensors that the case learns."""
    loss = loss_of(case)
    found = {"loss": loss.detach()}
    if case.learned:
        upstream = torch.as_tensor(case.upstream, dtype=loss.dtype).expand(loss.shape)
        wanted = {name: tensor for name, tensor in case.tensors().items() if name in case.learned}
        gradients = torch.autograd.grad(loss, list(wanted.values()), upstream)
        found |= dict(zip(wanted, gradients, strict=True))
    return found


def check(case: Case, loss_of, tensor_epsilons=TENSOR_EPSILONS, entry_epsilons=ENTRY_EPSILONS, roundings=1) -> dict:
    """Loss and gradients of loss_of(case), which are as near to float64 as eager PyTorch, plus a tolerance.

    float16 and bfloat16 logits are judged by eager PyTorch in float32, which is stricter than in their own
    dtype; their gradients are then allowed `roundings` to the stored dtype. In float64 the truth is eager
    PyTorch itself, whose own error shows as ours: the tolerance grows with the logits' range, and with what eager
    PyTorch loses in float32, as that does.
    """
    computing = computing_dtype(case.input.dtype)
    if computing == torch.float64:
        tensor_epsilons *= 4 * (4 + _range_of_logits(case))
    truth = loss_and_gradients(cast(case, torch.float64), eager)
    usual = loss_and_gradients(cast(case, computing), eager)
    if computing == torch.float64:
        single = loss_and_gradients(cast(case, torch.float32), eager)
        share = 8 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        usual = {name: value + share * (single[name].double() - value).abs() for name, value in truth.items()}
    with_leaves = cast(case, case.input.dtype)
    found = loss_and_gradients(_keep_layout(case, with_leaves), loss_of)
    # With one class everything cancels, and what is left is the rounding of terms of size 1.
    scales = dict.fromkeys(case.learned, 1.0) if case.input.shape[-1 if case.input.dim() == 1 else 1] == 1 else {}
    if case.reduction == "mean" and "sample_weight" in case.learned:
        scales["sample_weight"] = _scale_of_weight_gradients(case, truth["loss"])
    for more in (
        _scales_of_single_terms(case),
        _scales_below_a_soft_cap(case),
        _scales_of_mixed_parts(case),
        _scales_of_probabilities(case),
    ):
        scales |= {name: max(scale, scales.get(name, 0.0)) for name, scale in more.items()}
    for name, expected in truth.items():
        stored = found[name].dtype
        assert stored == (computing if name == "loss" else case.tensors()[name].dtype), name
        assert found[name].shape == expected.shape, (name, found[name].shape, expected.shape)
        scale = scales.get(name, 0.0)
        compare(
            name,
            found[name],
            usual[name],
            expected,
            computing,
            stored,
            tensor_epsilons,
            entry_epsilons,
            scale,
            roundings,
        )
    return found


def _range_of_logits(case: Case) -> float:
    z = case.input.detach().unsqueeze(0) if case.input.dim() == 1 else case.input.detach()
    z = apply_terms(z, tuple((t[0], torch.as_tensor(t[1]).detach(), *t[2:]) for t in case.terms))
    z = z[torch.isfinite(z).all(1, keepdim=True).expand_as(z)]
    return float(z.max() - z.min()) if z.numel() else 0.0


def _scale_of_weight_gradients(case: Case, mean: torch.Tensor) -> float:
    """max l_i / sum of shares: the gradient of a mean is the difference of two numbers of this size."""
    summed = replace(case, reduction="sum", upstream=1.0, learned=("sample_weight",))
    found = loss_and_gradients(cast(summed, torch.float64), eager)
    scale = found["sample_weight"].abs().max() * (mean / found["loss"]).abs() * abs(float(case.upstream))
    return float(scale) if torch.isfinite(scale) else 0.0


def _scales_of_mixed_parts(case: Case) -> dict[str, float]:
    """The parts whose difference is the gradient of what mixes them: a row's smoothing, or its penalty's strength."""
    mixers = {"label_smoothing", "penalty_strength"} & set(case.learned)
    if not mixers:
        return {}
    parts = []
    for smoothing, strength in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        part = replace(case, reduction="none", label_smoothing=smoothing, penalty_strength=strength, z_loss=0.0)
        parts.append(eager(cast(replace(part, learned=()), torch.float64)).abs())
    total, mean = (
        eager(cast(replace(case, reduction=reduction, learned=()), torch.float64)) for reduction in ("sum", "mean")
    )
    share = float((mean / total).abs()) if case.reduction == "mean" else 1.0
    upstream = float(torch.as_tensor(case.upstream, dtype=torch.float64).abs().max())
    largest = float(torch.stack(parts).nan_to_num(0.0, 0.0, 0.0).max()) if parts[0].numel() else 0.0
    found = share * upstream * largest
    return dict.fromkeys(mixers, found if math.isfinite(found) else 0.0)


def _scales_of_probabilities(case: Case) -> dict[str, float]:
    """The parts whose difference is a logit's gradient, p_j sum_k w_k q_k - w_j q_j: a row that is right has little."""
    if not case.target.is_floating_point() or "input" not in case.learned or case.input.numel() == 0:
        return {}
    double = cast(replace(case, learned=()), torch.float64)
    x = double.input.detach().requires_grad_()
    (slope,) = torch.autograd.grad(apply_terms(x.unsqueeze(0) if x.dim() == 1 else x, double.terms).sum(), x)
    weight = 1.0 if double.weight is None else float(double.weight.max())
    rows = case.input.numel() // case.input.shape[-1 if case.input.dim() == 1 else 1]
    share = 1 / rows if case.reduction == "mean" else 1.0
    upstream = float(torch.as_tensor(case.upstream, dtype=torch.float64).abs().max())
    found = share * upstream * weight * float(double.target.max() * slope.abs().nan_to_num(0.0, 0.0, 0.0).max())
    return {"input": found} if math.isfinite(found) else {}


def _scales_of_single_terms(case: Case) -> dict[str, float]:
    """sum_j |dL/d(term of class j)| for a learned term that all classes share: its gradient is a sum of these."""
    shared = {
        f"term{i}": i
        for i, term in enumerate(case.terms)
        if f"term{i}" in case.learned and isinstance(term[1], torch.Tensor) and term[1].dim() == 0
    }
    if not shared:
        return {}
    width = case.input.shape[-1 if case.input.dim() == 1 else 1]
    terms = tuple(
        (t[0], t[1].detach().expand(width), *t[2:]) if i in shared.values() else t for i, t in enumerate(case.terms)
    )
    found = loss_and_gradients(cast(replace(case, terms=terms, learned=tuple(shared)), torch.float64), eager)
    return {name: float(found[name].abs().sum().nan_to_num(0.0)) for name in shared}


def _scales_below_a_soft_cap(case: Case) -> dict[str, float]:
    """The gradient above the last soft cap, for what lies below it: 1 - tanh^2 has the rounding of 1."""
    last = max((i for i, term in enumerate(case.terms) if term[0] == "soft cap"), default=-1)
    if last < 0 or not case.learned or case.input.numel() == 0:
        return {}
    double = cast(replace(case, learned=()), torch.float64)
    z = double.input.unsqueeze(0) if case.input.dim() == 1 else double.input
    capped = apply_terms(z, double.terms[: last + 1], _labels(double, z)).reshape(case.input.shape)
    above = replace(double, input=capped.requires_grad_(), terms=double.terms[last + 1 :], learned=("input",))
    gradient = loss_and_gradients(above, eager)["input"].abs().nan_to_num(0.0)
    factor = 1.0
    for name, value, *_ in double.terms[:last]:
        if name in ("temperature", "scale"):
            factor *= float(
                (1 / torch.as_tensor(value) if name == "temperature" else torch.as_tensor(value)).abs().max()
            )
    found = {"input": factor * float(gradient.max())}
    largest = max(1.0, float(z[torch.isfinite(z)].abs().max()))
    terms = (name for name in case.learned if name.startswith("term") and int(name[4:]) < last)
    return found | {name: factor * largest * float(gradient.sum()) for name in terms}


def compare(name, found, usual, expected, computing, stored, tensor_epsilons, entry_epsilons, scale=0.0, roundings=1):
    """Asserts |found - expected| <= 2 |usual - expected| + tolerance; NaN and infinities in place."""
    found, usual = found.double(), usual.double()
    usual_error = (usual - expected).abs().nan_to_num(0.0, 0.0, 0.0)
    finite = torch.isfinite(expected)
    largest = max(scale, float(expected[finite].abs().max()) if bool(finite.any()) else 0.0)
    computing_epsilon = torch.finfo(computing).eps
    rounding = roundings * torch.finfo(stored).eps * expected.abs() if stored != computing else 0.0
    # Where everything cancels (one class) double precision leaves its own rounding, and so may a row's sums.
    smallest = torch.finfo(stored).smallest_normal * torch.finfo(stored).eps + 16 * torch.finfo(torch.float64).eps
    allowed = (
        2 * float(usual_error.max() if usual_error.numel() else 0)
        + tensor_epsilons * computing_epsilon * largest
        + entry_epsilons * computing_epsilon * expected.abs()
        + rounding
        + smallest
    )
    too_large = expected.abs() > torch.finfo(stored).max
    same = (torch.isnan(found) & torch.isnan(expected)) | (found == expected) | (too_large & torch.isinf(found))
    wrong = ~(same | ((found - expected).abs() <= allowed))
    if bool(wrong.any()):
        where = tuple(wrong.nonzero()[0].tolist())
        limit = torch.as_tensor(allowed).expand_as(expected)[where].item()
        raise AssertionError(
            f"{name}{list(where)}: got {found[where].item():.9g}, truth {expected[where].item():.9g}, eager "
            f"{usual[where].item():.9g}, allowed error {limit:.3g}; "
            f"{int(wrong.sum())} of {wrong.numel()} entries are wrong"
        )


def _keep_layout(case: Case, leaves: Case) -> Case:
    """`leaves` with the strides that the case's tensors came with, and their own dtypes."""
    for name, tensor in case.tensors().items():
        leaf = tensor.detach().requires_grad_(name in case.learned)
        if name.startswith("term"):
            i = int(name[4:])
            terms = list(leaves.terms)
            terms[i] = (terms[i][0], leaf, *terms[i][2:])
            leaves.terms = tuple(terms)
        else:
            setattr(leaves, name, leaf)
    leaves.target, leaves.weight, leaves.upstream = case.target, case.weight, case.upstream
    return leaves
