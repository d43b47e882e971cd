"""A tensor subclass whose own memory is nobody's: what reads it must go through the dispatcher."""

import torch


class Wrapped(torch.Tensor):
    """A subclass that holds its values in another tensor: its own memory is nobody's."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.inner = inner.detach()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        unwrapped = torch.utils._pytree.tree_map_only(Wrapped, lambda tensor: tensor.inner, (args, kwargs or {}))
        result = function(*unwrapped[0], **unwrapped[1])
        return torch.utils._pytree.tree_map_only(torch.Tensor, Wrapped, result)


def plain(value):
    return value.inner if isinstance(value, Wrapped) else value
