"""Which weights a compiled graph was given, and whether they are still what they were.

One graph compiled by Dynamo serves every instance of a class, and the weights of each may change at any
time. A `WeightSet` knows the tensors of one call by identity, and their state by version and address. It
holds them weakly: a model that is dropped is freed.

Batch norms in training write their running statistics, and fused optimizers their parameters, without
counting it in a version. Optimizers tell through their hook, compiled training graphs are seen to run,
and of statistics on the CPU a few numbers are looked at on every call.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

CHECKS = ("full", "identity", "never")
_WORDS = {2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}

_epoch = 0  # how often everything was declared changed
_touches = 0  # how often single tensors were
_touched: dict[int, int] = {}  # when last, by id


def bump() -> None:
    """From now on no set of weights counts as unchanged."""
    global _epoch
    _epoch += 1


def touch(tensors: Iterable[Tensor]) -> None:
    """These tensors were written in a way that leaves no trace on them."""
    global _touches
    _touches += 1
    _touched.update((id(t), _touches) for t in tensors)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            touch(group["params"])


@functools.cache
def watch_optimizers() -> None:
    """Have fused optimizers tell; once a process."""
    register_optimizer_step_post_hook(_after_step)


@dataclass(slots=True)
class Seen:
    """The state of tensors at one moment; `words` are where some of their `numbers` lie in memory."""

    epoch: int
    touches: int
    versions: list[int]
    addresses: list[int]
    words: list[Any]
    numbers: list[int]


class WeightSet:
    """The state tensors of one model, weakly, and what was made of them.

    `looked` are positions of tensors some numbers of which are compared, beside version and address.
    """

    def __init__(
        self, tensors: Sequence[Tensor], check: str, looked: Iterable[int], gone: Callable[[WeightSet], None]
    ) -> None:
        self.ids = [id(t) for t in tensors]
        self.check = check
        self.looked = [i for i in looked if tensors[i].device.type == "cpu" and tensors[i].numel()]
        self.counted = [i for i, t in enumerate(tensors) if not t.is_inference()]
        self.dead = False
        self.baked = False
        self.folded: list[Tensor] = []
        self.runner: Callable[..., Any] | None = None
        me = weakref.ref(self)

        def lost(_: Any) -> None:
            this = me()
            if this is not None and not this.dead:
                this.dead = True
                gone(this)

        self.refs = [weakref.ref(t, lost) for t in tensors]
        self.seen = self.now(tensors)  # when the runner was made

    def now(self, tensors: Sequence[Tensor]) -> Seen:
        """The state of the tensors as it is now."""
        versions, addresses = [tensors[i]._version for i in self.counted], [t.data_ptr() for t in tensors]
        words = [word for i in self.looked for word in _some(tensors[i])]
        return Seen(_epoch, _touches, versions, addresses, words, [word.value for word in words])

    def fresh(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors, known to be those of the set, are unchanged."""
        seen = self.seen
        if seen.epoch != _epoch or (seen.touches != _touches and self._was_touched()):
            return False
        if self.check != "full":
            return True
        if len(self.counted) == len(tensors):
            same = seen.versions == [t._version for t in tensors]
        else:  # inference tensors have no version
            same = seen.versions == [tensors[i]._version for i in self.counted]
        # the numbers last: they lie in memory of tensors that are now known to be where they were
        return (
            same
            and seen.addresses == [t.data_ptr() for t in tensors]
            and seen.numbers == [word.value for word in seen.words]
        )

    def _was_touched(self) -> bool:
        if any(_touched.get(i, 0) > self.seen.touches for i in self.ids):
            return True
        self.seen.touches = _touches
        return False


def _some(tensor: Tensor) -> list[Any]:
    """The first, middle and last number of a tensor in memory, as the bits that they are."""
    size, word = tensor.element_size(), _WORDS.get(tensor.element_size())
    places = [[0 for n in tensor.shape], [n // 2 for n in tensor.shape], [n - 1 for n in tensor.shape]]
    offsets = {sum(i * s for i, s in zip(at, tensor.stride(), strict=True)) for at in places}
    return [] if word is None else [word.from_address(tensor.data_ptr() + o * size) for o in sorted(offsets)]
