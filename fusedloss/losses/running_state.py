"""When running statistics take a batch in, and what is said of rows that they leave out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusedloss.backends import CHECK_VALUES
from fusedloss.core.user_warnings import warn_user
from fusedloss.terms.term import readable

# The node that runs a reentrant checkpoint's backward, in torch and in the libraries that copied it.
_REENTRANT_NODE = "CheckpointFunctionBackward"


def statistics_move(module: nn.Module) -> bool:
    """Whether this forward of `module` moves its statistics: in training, with gradients, and once for each batch.

    Raises:
        RuntimeError: inside a ``torch.func`` transform, which state must not escape from.
    """
    if not module.training or not torch.is_grad_enabled() or is_recomputing():
        return False
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{type(module).__name__}: running statistics can't move inside a torch.func transform; call .eval() on "
            "the loss first, and let the statistics move in a plain forward"
        )
    return True


def is_recomputing() -> bool:
    """Whether a checkpoint (torch.utils.checkpoint) repeats, in the backward, a forward that has had gradients on.

    A reentrant checkpoint repeats one that had none: there the second forward is the one that counts.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return False
    node = torch._C._current_autograd_node()
    return node is None or node.name() != _REENTRANT_NODE


def register_skipped(module: nn.Module) -> None:
    """Gives `module` the buffer ``skipped``: rows left out since it was built, int64 ``()``, not in its state dict."""
    module.register_buffer("skipped", torch.zeros((), dtype=torch.int64), persistent=False)
    module._warned_of_skipped = False  # type: ignore[assignment]


def add_skipped(module: Any, skipped: Tensor | int, values: str = "features") -> None:
    """Counts rows that were left out and says so once, where that does not wait for a device."""
    if isinstance(skipped, int):
        number = skipped
    elif readable(skipped) or (CHECK_VALUES and not torch.compiler.is_compiling()):
        number = int(skipped)
    else:
        module.skipped.add_(skipped)
        return
    if number == 0:
        return
    module.skipped.add_(number)
    if not module._warned_of_skipped:
        module._warned_of_skipped = True
        warn_user(
            f"{type(module).__name__}: {number} of the rows have {values} that are not finite (or beyond 2**50) and "
            "are left out of the statistics; .skipped goes on counting them, and this is said once",
            RuntimeWarning,
        )
