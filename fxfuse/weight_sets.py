"""Which weights a compiled graph was given, and whether they are still what they were.

One graph compiled by Dynamo serves every instance of a class, and the weights of each may change at any
time. A `WeightSet` knows the tensors of one call by identity, and their state by version and address. It
holds them weakly: a model that is dropped is freed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

CHECKS = ("full", "identity", "never")

# Counts the events that change weights without a trace on the tensors: refresh(), steps of fused optimizers.
_epoch = 0
_stepped: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def bump() -> None:
    """From now on no set of weights counts as unchanged."""
    global _epoch
    _epoch += 1


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """A fused step writes parameters without counting it in their version."""
    if any(group.get("fused") for group in optimizer.param_groups):
        bump()


_hook: Any = None


def watch_optimizers() -> None:
    """Have fused optimizers tell; once a process."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)


class WeightSet:
    """The state tensors of one model, weakly, and what was made of them."""

    def __init__(self, tensors: Sequence[Tensor], check: str, gone: Callable[[WeightSet], None]) -> None:
        self.ids = [id(t) for t in tensors]
        self.check = check
        self.dead = False
        self.counted = [i for i, t in enumerate(tensors) if not t.is_inference()]
        me = weakref.ref(self)

        def lost(_: Any) -> None:
            this = me()
            if this is not None and not this.dead:
                this.dead = True
                gone(this)

        self.refs = [weakref.ref(t, lost) for t in tensors]
        self.runner: Callable[..., Any] | None = None
        self.folded: list[Tensor] = []
        self.changes = 0
        self.baked = False
        self.note(tensors)

    def note(self, tensors: Sequence[Tensor]) -> None:
        """Remember the state of the tensors as it is now."""
        self.epoch = _epoch
        self.versions = [tensors[i]._version for i in self.counted]
        self.addresses = [t.data_ptr() for t in tensors] if self.check == "full" else []
        self.grads = [t.requires_grad for t in tensors]

    def fresh(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors, known to be those of the set, are unchanged."""
        if self.epoch != _epoch:
            return False
        if self.check != "full":
            return True
        if len(self.counted) == len(tensors):
            same = self.versions == [t._version for t in tensors]
        else:
            same = self.versions == [tensors[i]._version for i in self.counted]
        return same and self.addresses == [t.data_ptr() for t in tensors]

    def kept(self) -> Iterable[Tensor]:
        return (t for t in (r() for r in self.refs) if t is not None)
