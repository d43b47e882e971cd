"""Gradients along one direction against difference quotients of the float64 formula, which know no derivative."""

from dataclasses import replace

import torch
from oracle import cast, computing_dtype, eager, loss_and_gradients

# A shorter step is taken where a kink (of a maximum, a hinge, a margin's fallback) lies within the longer one.
STEPS = (1e-6, 1e-7, 1e-8)
RELATIVE, ABSOLUTE = 1e-4, 1e-6


def check_direction(case, found):
    """Asserts what the found gradients give along a direction; whether the case can tell, None on a kink.

    A straight-through gradient is none by design. On a kink the quotients to both sides differ however short the step:
    half their difference bounds the error of the central one. Beside a tolerance, gradients may be as far from it as
    twice what eager PyTorch loses in the dtype that it computes in.
    """
    if not case.learned or any("straight_through" in term for term in case.terms):
        return False
    double = cast(case, torch.float64)
    direction = _direction(double)
    parts = _along(direction, found)
    if bool(parts.isnan().any()):
        return False  # a mean over no rows
    exact, usual = (
        _along(direction, loss_and_gradients(cast(case, dtype), eager))
        for dtype in (torch.float64, computing_dtype(case.input.dtype))
    )
    here = _value(double, direction, 0.0)
    relative = RELATIVE + torch.finfo(case.input.dtype).eps
    tolerance = relative * float(exact.norm() + exact.abs().max()) + ABSOLUTE * (1 + abs(here))
    slope = _smooth_slope(double, direction, here, tolerance)
    if slope is None:
        return None
    lost = 2 * float((usual - exact).norm())
    # The truth itself first, so that what eager loses is told from a wrong formula.
    for whose, sum_of_parts, allowed in (("exact", exact, tolerance), ("found", parts, tolerance + lost)):
        assert abs(float(sum_of_parts.sum()) - slope) <= allowed, (
            f"along a direction the {whose} gradients of {case.learned} give {float(sum_of_parts.sum()):.9g}, finite "
            f"differences {slope:.9g}, allowed error {allowed:.3g}"
        )
    return True


def _direction(double):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        for name, tensor in double.tensors().items()
        if name in double.learned
    }


def _along(direction, gradients):
    """What each entry contributes to the slope along the direction."""
    return torch.cat([(gradients[name].double() * step).reshape(-1) for name, step in direction.items()])


def _smooth_slope(double, direction, here, tolerance):
    """The difference quotient at the longest step within which there is no kink that matters; None on one."""
    for distance in STEPS:
        after, before = _value(double, direction, distance), _value(double, direction, -distance)
        if abs(after - 2 * here + before) / (2 * distance) <= tolerance / 2:
            return (after - before) / (2 * distance)
    return None


@torch.no_grad()
def _value(double, direction, distance):
    """The loss, weighed by its upstream gradient, `distance` along the direction."""
    moved = replace(double, learned=())
    for name, step in direction.items():
        tensor = double.tensors()[name] + distance * step
        if name.startswith("term"):
            i = int(name[4:])
            old = moved.terms[i]
            moved.terms = (*moved.terms[:i], (old[0], tensor, *old[2:]), *moved.terms[i + 1 :])
        else:
            setattr(moved, name, tensor)
    return float((torch.as_tensor(double.upstream, dtype=torch.float64) * eager(moved)).sum())
