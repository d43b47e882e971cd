"""The upstream gradient of the next backward, expected before it comes.

A gradient that leaves with the forward is multiplied by the upstream gradient in a pass of its own: gradient
accumulation's ``(loss / 4).backward()``, a gradient scaler's factor. Where a CPU has seen the same power of two twice
running, the next forward writes it into the gradient as it goes. Powers of two alone: multiplying by them rounds
nothing that stays in the normal range, so that a right guess, a wrong one and none give the same bits.
"""

from __future__ import annotations

import math

# Beyond, products with small gradients would leave the normal range.
_LARGEST_EXPONENT = 24

_expected = _last = 1.0


def expected_upstream() -> float:
    """What a forward multiplies its gradients by; 1 unless the last two backwards had something else in common."""
    return _expected


def note_upstream(upstream: float) -> None:
    """Tells what a backward brought."""
    global _expected, _last
    if upstream != _expected or upstream != _last:
        _expected = upstream if upstream == _last and _exact(upstream) else 1.0
        _last = upstream


def _exact(factor: float) -> bool:
    mantissa, exponent = math.frexp(factor)
    return mantissa == 0.5 and abs(exponent - 1) <= _LARGEST_EXPONENT
