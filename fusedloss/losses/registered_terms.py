"""What a module keeps of its terms: their tensors, and a watch over parameters that nobody steps."""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from fusedloss.core.user_warnings import warn_user
from fusedloss.losses.settings_repr import described
from fusedloss.terms import Term


class RegisteredTerm(nn.Module):
    """One term whose tensors are this module's: a Parameter as a parameter, another tensor as a buffer."""

    def __init__(self, term: Term) -> None:
        super().__init__()
        if not isinstance(term, Term):
            got = getattr(term, "__name__", type(term).__name__)
            raise TypeError(f"terms must hold objects of fusedloss.terms; got {got}")
        self._template = copy.copy(term)
        self._names = [
            field.name for field in dataclasses.fields(term) if isinstance(getattr(term, field.name), Tensor)
        ]
        for name in self._names:
            value = getattr(term, name)
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)
            object.__setattr__(self._template, name, None)

    def current(self) -> Term:
        """The term with the tensors as they are now."""
        if not self._names:
            return self._template
        # Not copy.copy(), which torch.compile of torch 2.8 can't trace.
        term: Term = object.__new__(type(self._template))
        for name in type(self._template).__dataclass_fields__:
            object.__setattr__(term, name, getattr(self if name in self._names else self._template, name))
        return term

    def __repr__(self) -> str:
        return f"RegisteredTerm({described(self.current())})"


def sequence_of(terms: Sequence[Term] | Term) -> tuple[Term, ...]:
    """A sequence of terms, or one."""
    if isinstance(terms, Term):
        return (terms,)
    if isinstance(terms, (str, Tensor)) or not isinstance(terms, Iterable):
        raise TypeError(f"terms must be a sequence of fusedloss.terms objects; got {type(terms).__name__}")
    return tuple(terms)


def registered(terms: Sequence[Term] | Term) -> nn.ModuleList:
    """A sequence of terms, or one, in order: ``terms.0.log_prior`` in a state dict."""
    return nn.ModuleList(RegisteredTerm(term) for term in sequence_of(terms))


def current(terms: nn.ModuleList) -> tuple[Term, ...]:
    """What was registered, with the tensors as they are now."""
    return tuple(term.current() for term in terms)  # type: ignore[operator]


class StepWatch:
    """Warns once when a loss's own parameters get gradients and no optimizer has them."""

    _optimizer_steps = 0
    _hooked = False

    def __init__(self) -> None:
        self._seen: tuple[int, int] | None = None
        self._done = False

    def look(self, loss: nn.Module) -> None:
        """Called by each forward of `loss`."""
        if self._done:
            return
        parameters = [p for p in loss.parameters() if p.requires_grad]
        if not parameters or not loss.training:
            return
        StepWatch._start()
        if all(p.grad is None for p in parameters):
            return
        versions = sum(p._version for p in parameters)
        if self._seen is None or self._seen[1] != versions:
            self._done = self._seen is not None
            self._seen = (StepWatch._optimizer_steps, versions)
        elif StepWatch._optimizer_steps >= self._seen[0] + 2:
            # Another optimizer may have stepped twice while the one that has these parameters accumulates gradients.
            self._done = True
            if not _in_an_optimizer(parameters):
                warn_user(
                    f"{type(loss).__name__} has parameters of its own that receive gradients but are never stepped: "
                    "give loss.parameters() to the optimizer too"
                )

    @classmethod
    def _start(cls) -> None:
        if not cls._hooked:
            cls._hooked = True
            register_optimizer_step_post_hook(cls._count)

    @classmethod
    def _count(cls, *_: object) -> None:
        cls._optimizer_steps += 1


def _in_an_optimizer(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether an optimizer that is alive has one of `parameters`; looks at all objects, so once per loss at most."""
    known = {id(p) for p in parameters}
    optimizers = [thing for thing in gc.get_objects() if issubclass(type(thing), Optimizer)]
    groups = [group for optimizer in optimizers for group in getattr(optimizer, "param_groups", ())]
    return any(id(p) in known for group in groups for p in group["params"])
