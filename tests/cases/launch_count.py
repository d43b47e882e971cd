"""Counts what a call would launch on a GPU: PyTorch's operations that compute something, and this package's kernels."""

import collections
import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton_supcon import resolve_backend

# Operations that make a view, or memory that nothing is written to.
_NO_KERNEL = {
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "view", "_unsafe_view", "t", "transpose",
    "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "detach", "alias", "as_strided", "split", "unbind",
    "diagonal", "lift_fresh", "promote_types", "result_type", "_local_scalar_dense", "split_with_sizes", "resize_",
}  # fmt: skip
_OPERATIONS = ("linear_ce", "softmax_ce", "supcon")


class _Operations(TorchDispatchMode):
    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if function.namespace == "aten" and name not in _NO_KERNEL:
            self.names[name] += 1
        return function(*args, **(kwargs or {}))


def launches_of(call):
    """How often each operation and kernel is launched by `call`, whose tensors may lie on a CPU: no kernel runs."""
    from fusedloss.backends.triton import launch

    names = collections.Counter()

    def start(kernel, grid, *arguments, **constants):
        if 0 not in grid:
            names[kernel.__name__] += 1

    with contextlib.ExitStack() as stack:
        # The way that plain tensors go, though the operations are observed.
        for stem in _OPERATIONS:
            stack.enter_context(mock.patch(f"fusedloss.ops.{stem}.is_direct", lambda *tensors: True))
        stack.enter_context(resolve_backend("cpu"))
        stack.enter_context(mock.patch.object(launch, "start", start))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(_Operations(names))
        call()
    return names
