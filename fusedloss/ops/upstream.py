"""The upstream gradient of the next backward, expected before it comes.

A gradient that leaves with the forward is multiplied by the upstream gradient in a pass of its own: gradient
accumulation's ``(loss / 4).backward()``, a gradient scaler's factor. Where a CPU has seen the same power of two twice
running for a loss, its next forward writes it into the gradient as it goes. Powers of two alone: multiplying by them
rounds nothing that stays in the normal range, so that a right guess, a wrong one and none give the same bits. Losses
are told apart by what they are given, not by object: classes, type and options.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import NamedTuple

# Beyond, products with small gradients would leave the normal range.
_LARGEST_EXPONENT = 24
_MOST_LOSSES = 256


class _Seen(NamedTuple):
    expected: float
    last: float


_seen: dict[Hashable, _Seen] = {}
_NOTHING = _Seen(1.0, 1.0)


def expected_upstream(loss: Hashable) -> float:
    """What a forward multiplies its gradients by; 1 unless the last two backwards had something else in common."""
    # Most programs bring 1 alone, and nothing is hashed for them.
    return _seen.get(loss, _NOTHING).expected if _seen else 1.0


def note_upstream(loss: Hashable, upstream: float) -> None:
    """Tells what a backward brought."""
    if upstream == 1.0 and not _seen:
        return
    expected, last = _seen.get(loss, _NOTHING)
    if upstream != expected or upstream != last:
        if len(_seen) >= _MOST_LOSSES:
            _seen.clear()
        _seen[loss] = _Seen(upstream if upstream == last and _exact(upstream) else 1.0, upstream)


def _exact(factor: float) -> bool:
    mantissa, exponent = math.frexp(factor)
    return mantissa == 0.5 and abs(exponent - 1) <= _LARGEST_EXPONENT
