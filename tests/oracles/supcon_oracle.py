"""The truth that contrastive kernels are judged by: one anchor at a time in eager PyTorch, sharing no code with them.

In float64 it is the truth; in the dtype that a kernel computes in it is what a user would have had.
"""

from collections import Counter
from dataclasses import dataclass, fields, replace

import torch

_judged = {}
DIFFERENTIABLE = ("features", "temperature", "prototypes")
TENSOR_EPSILONS = 16


@dataclass
class Case:
    """Arguments of ``fusedloss.supcon``; `upstream` multiplies the loss before the backward."""

    features: torch.Tensor
    labels: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    temperature: torch.Tensor | float = 0.1
    normalize: bool = True
    reduction: str = "mean"
    class_weight: torch.Tensor | None = None
    prototypes: torch.Tensor | None = None
    prototype_labels: torch.Tensor | None = None
    class_balance: bool = False
    ignore_index: int = -100
    contrast: torch.Tensor | None = None
    contrast_labels: torch.Tensor | None = None
    contrast_mode: str = "all"
    prototype_weight: float = 1.0
    prototype_bias: torch.Tensor | None = None
    focal_gamma: float = 0.0
    upstream: torch.Tensor | float = 1.0


def unit(rows):
    length = rows.detach().double().norm(dim=1, keepdim=True)
    # Scaled first, so that the squares of long and of short rows are ordinary numbers in any dtype.
    scale = torch.where(length > 0, 1 / length, 0.0).to(rows.dtype)
    scaled = rows * scale
    return scaled / torch.where(length > 0, scaled.norm(dim=1, keepdim=True), 1.0)


def eager(case):
    """The loss of a case in the dtype of its tensors."""
    samples = len(case.features)
    views = 1 if case.features.dim() == 2 else case.features.shape[1]
    flat = case.features if case.features.dim() == 2 else torch.cat(case.features.flatten(2).unbind(1))
    parts = [flat, case.prototypes, case.contrast]
    counts = [0 if part is None else len(part) for part in parts]
    parts = [part for part in parts if part is not None]
    rows = torch.cat([unit(part) if case.normalize else part for part in parts])
    owner = list(range(samples)) * views
    if case.mask is None:
        own = owner if case.labels is None else case.labels.tolist() * views
        of_prototypes = [] if case.prototypes is None else case.prototype_labels.tolist()
        if case.contrast is None:
            of_contrast = []
        elif case.contrast_labels is None:
            of_contrast = [("negative", i) for i in range(counts[2])]
        else:
            of_contrast = case.contrast_labels.tolist()
        labels = [*own, *of_prototypes, *of_contrast]
    else:
        labels = owner
    ignored = [case.labels is not None and label == case.ignore_index for label in labels]
    bias, share = rows.new_zeros(len(rows)), rows.new_ones(len(rows))
    span = slice(counts[0], counts[0] + counts[1])
    share[span] = case.prototype_weight
    if case.prototype_bias is not None:
        bias[span] = case.prototype_bias
    # A bias of -inf leaves a prototype out.
    ignored = [gone or float(b) == -torch.inf for gone, b in zip(ignored, bias, strict=True)]
    losses, weights, averaged = [], [], []
    for i in range(samples if case.contrast_mode == "one" else len(flat)):
        loss, focus, has_positive = of_anchor(case, rows, labels, owner, ignored, bias, share, i)
        weight = focus
        if case.class_weight is not None:
            weight = 0.0 if ignored[i] else float(case.class_weight[labels[i]]) * focus
        losses.append(loss * weight)
        weights.append(weight)
        averaged.append(not ignored[i] if case.reduction == "mean_all" else has_positive)
    losses = torch.stack(losses) if losses else rows.new_zeros(0) * rows.sum()
    if case.reduction == "none":
        return losses
    if case.reduction == "sum":
        return losses.sum()
    chosen = [w for w, a in zip(weights, averaged, strict=True) if a]
    return losses.sum() / (sum(chosen) or 1.0)


def of_anchor(case, rows, labels, owner, ignored, bias, share, i):
    """(loss, detached focal weight, whether there is a positive)."""
    others = [j for j in range(len(rows)) if j != i and not ignored[j]]
    if case.mask is None:
        positive = [labels[j] == labels[i] for j in others]
    else:
        positive = [bool(case.mask[owner[i], owner[j]]) for j in others]
    chosen = torch.tensor(positive, dtype=torch.bool)
    q = share[others] * chosen if others else rows.new_zeros(0)
    if ignored[i] or not bool((q > 0).any()):
        return rows[i].sum() * 0, 1.0, False
    s = rows[others] @ rows[i] / case.temperature + bias[others]
    u = s
    if case.class_balance:
        members = Counter(label for label, gone in zip(labels, ignored, strict=True) if not gone)
        u = s - torch.tensor([members[labels[j]] - p for j, p in zip(others, positive, strict=True)]).to(s.dtype).log()
    relative = u - u.max().detach()
    log_p = relative - relative.exp().sum().log()
    loss = -(q * (log_p + (s - u))).sum() / q.sum()
    focus = 1.0
    if case.focal_gamma:
        # mean over positives of p, each positive counting its share
        p = log_p.detach().exp()[chosen].sum() / q.sum()
        focus = float((1 - p).clamp(0, 1) ** case.focal_gamma)
    return loss, focus, True


def cast(case, dtype):
    """The case with every floating tensor in `dtype`; those that get gradients are leaves, T a tensor."""
    changed = {}
    for field in fields(case):
        value = getattr(case, field.name)
        if field.name == "temperature":
            changed[field.name] = torch.as_tensor(value).detach().to(dtype).clone().requires_grad_()
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            changed[field.name] = value.detach().to(dtype).clone().requires_grad_(field.name in DIFFERENTIABLE)
    return replace(case, **changed)


def loss_and_gradients(case, loss_of):
    loss = loss_of(case)
    leaves = {name: getattr(case, name) for name in DIFFERENTIABLE if getattr(case, name) is not None}
    upstream = torch.as_tensor(case.upstream, dtype=loss.dtype).expand(loss.shape)
    gradients = torch.autograd.grad(loss, list(leaves.values()), upstream, allow_unused=True, materialize_grads=True)
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


def _dtype(case, name):
    rows = getattr(case, name)
    return None if rows is None else rows.dtype


def wrong_with(case, loss_of, narrow=False):
    """What is wrong with loss_of(case) and its gradients, in words: they may be no further from float64 than twice
    what eager PyTorch in the computing dtype is, plus a tolerance, plus one rounding to the stored dtype.

    With `narrow` gradients of similarities of 16-bit features may have been rounded to 16 bits before they were
    multiplied: those of rows are judged as a whole, by their norm.
    """
    stored = case.features.dtype
    computing = torch.float64 if stored == torch.float64 else torch.float32
    if id(case) not in _judged:
        judges = [loss_and_gradients(cast(case, dtype), eager) for dtype in (torch.float64, computing)]
        _judged[id(case)] = case, judges
    truth, usual = _judged[id(case)][1]
    leaves = cast(case, computing)
    # Prototypes and contrasts keep their type where it is that of the features.
    same = [name for name in ("features", "prototypes", "contrast") if _dtype(case, name) == stored]
    given = {name: getattr(case, name).detach().clone() for name in same}
    leaves = replace(leaves, **{name: rows.requires_grad_(name in DIFFERENTIABLE) for name, rows in given.items()})
    judged = loss_and_gradients(leaves, loss_of)
    wrong = []
    per_t = 1 / float(case.temperature)
    largest_s = per_t if case.normalize else per_t * float(case.features.detach().double().square().sum(-1).max())
    # In float64 the truth has the same rounding as what is judged, of similarities as large as these.
    tensor_epsilons = TENSOR_EPSILONS * (4 + largest_s if computing == torch.float64 else 1)
    for name, expected in truth.items():
        got = judged[name]
        dtype = stored if name in same else computing
        if got.dtype != dtype or got.shape != expected.shape:
            wrong.append(f"{name}: {got.dtype} {tuple(got.shape)}, not {dtype} {tuple(expected.shape)}")
            continue
        usual_error = (usual[name].double() - expected).abs().nan_to_num(0.0, 0.0, 0.0)
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        epsilon = torch.finfo(computing).eps
        allowed = 2 * float(usual_error.max() if usual_error.numel() else 0) + tensor_epsilons * epsilon * largest
        # Where positives and the softmax cancel, what is left is the rounding of terms of this size.
        sizes = {"loss": 4.0, "features": largest_s / len(case.features), "temperature": 4 * largest_s * per_t}
        allowed += epsilon * sizes.get(name, 0.0)
        allowed = allowed + (torch.finfo(stored).eps * expected.abs() if name in same else 0.0) + 1e-30
        error = (got.double() - expected).abs()
        if narrow and name in same and stored != computing:
            size = 2 * float(usual_error.norm()) + 2 * torch.finfo(stored).eps * float(expected.norm())
            size += 1e-30 + epsilon * largest_s / max(len(case.features), 1)
            if not float(error.norm()) <= size:
                wrong.append(f"{name}: off by {float(error.norm()):.3g} in norm, allowed {size:.3g}")
            continue
        bad = ~(error <= allowed)
        if bool(bad.any()):
            place = tuple(bad.nonzero()[0].tolist())
            wrong.append(
                f"{name}{list(place)}: got {got[place].item():.9g}, truth {expected[place].item():.9g}, eager "
                f"{usual[name][place].item():.9g}; {int(bad.sum())} of {bad.numel()} entries are wrong"
            )
    return wrong
