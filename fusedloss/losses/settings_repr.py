"""The repr of a loss: the call that makes it, without what is left at its default."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from torch import Tensor, nn

_UNKNOWN = object()


class SettingsRepr(nn.Module):
    """Shows the constructor's required arguments, and every other one whose value now differs from its default."""

    def settings(self) -> dict[str, Any]:
        """Values of constructor parameters that are not attributes of the same name."""
        return {}

    def extra_repr(self) -> str:
        own = self.settings()
        shown = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = own[name] if name in own else getattr(self, name, _UNKNOWN)
            if value is not _UNKNOWN and not _same(value, parameter.default):
                shown.append(f"{name}={described(value)}")
        return ", ".join(shown)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def described(value: Any) -> str:
    """``repr``, but a tensor is its shape, and an options object the call that makes it."""
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)}" if value.dim() or value.device.type == "meta" else repr(value.item())
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(described, value))}]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = [
            f"{field.name}={described(getattr(value, field.name))}"
            for field in dataclasses.fields(value)
            if not _same(getattr(value, field.name), field.default)
        ]
        return f"{type(value).__name__}({', '.join(changed)})"
    return repr(value)


def _same(value: Any, default: Any) -> bool:
    return value is default or (not isinstance(value, Tensor) and not isinstance(default, Tensor) and value == default)
