"""Where two objects that should be alike differ: attributes, containers, closures, class attributes, iterators."""

from __future__ import annotations

import functools
import itertools
import types
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, torch.layout)
UNSEEN = (
    "__builtins__",
    "__slotnames__",
    "__dict__",
    "__weakref__",
    "__doc__",
    "__module__",
    "__name__",
    "__spec__",
    "__loader__",
)
WRITABLE = (list, dict, set, deque, Tensor)
ITERATORS = (itertools.count, itertools.cycle, type(iter([])), type(iter(range(1))), type(iter(())))


def difference(a: Any, b: Any, ours: str, theirs: str) -> str:
    """The path to the first difference of `a` of module `ours` and `b` of module `theirs`, and what it is; or ''."""
    return _Pairs(ours, theirs).walk(a, b, "")


class _Pairs:
    def __init__(self, ours: str, theirs: str) -> None:
        self.ours, self.theirs = ours, theirs
        self.seen: dict[int, int] = {}  # of all that was walked, by id
        self.met: dict[int, int] = {}  # the other way round, of what can be written to
        self.kept: list[Any] = []

    def walk(self, a: Any, b: Any, path: str) -> str:
        """The first difference of two objects, and of all that can be reached from them."""
        if type(a) is not type(b) and self._name(type(a)) != self._name(type(b)):
            return f"{path} is {type(a).__name__} instead of {type(b).__name__}"
        if isinstance(a, PLAIN):
            return "" if a == b or a != a else f"{path} is {a!r} instead of {b!r}"
        if id(a) in self.seen:
            return "" if self.seen[id(a)] == id(b) or a is b else f"{path} is another object"
        if isinstance(a, WRITABLE) and self.met.setdefault(id(b), id(a)) != id(a):
            return f"{path} is an object of its own"
        self.seen[id(a)] = id(b)
        self.kept += [a, b]  # so that no id is given again
        if isinstance(a, Tensor):
            return self._tensors(a, b, path) or self.walk(getattr(a, "__dict__", {}), getattr(b, "__dict__", {}), path)
        for name, one, other in self._inside(a, b, path):
            if found := self.walk(one, other, path + name):
                return found
        return ""

    def _tensors(self, a: Tensor, b: Tensor, path: str) -> str:
        for what in ("shape", "dtype", "requires_grad", "is_leaf"):
            if getattr(a, what) != getattr(b, what):
                return f"{path}.{what} is {getattr(a, what)} instead of {getattr(b, what)}"
        same = torch.equal(torch.nan_to_num(a.detach()), torch.nan_to_num(b.detach()))
        return "" if same else f"{path} has other values"

    def _inside(self, a: Any, b: Any, path: str) -> Any:
        """What two objects hold, in pairs."""
        if isinstance(a, types.ModuleType | types.BuiltinFunctionType | torch.fx.Proxy):
            return
        if isinstance(a, dict):
            keys = [[k for k in d if type(k) is not str or k not in UNSEEN] for d in (a, b)]
            hooks = path.endswith("hooks']")  # whose keys are counted through the process
            yield (".len", *map(len, keys)) if hooks else (".keys()", *keys)
            yield from ((f"[{k!r:.40}]", a[k], b[m]) for k, m in zip(*keys, strict=True) if not isinstance(k, Tensor))
        elif isinstance(a, list | tuple | deque):
            yield ".len", len(a), len(b)
            yield from ((f"[{i}]", x, y) for i, (x, y) in enumerate(zip(a, b, strict=True)))
        elif isinstance(a, set | frozenset):
            yield ".len", len(a), len(b)
            yield ".set", sorted(map(repr, a)), sorted(map(repr, b))
        elif isinstance(a, types.FunctionType):
            yield from self._function(a, b)
        elif isinstance(a, types.MethodType | functools.partial):
            names = ("__func__", "__self__") if isinstance(a, types.MethodType) else ("func", "args", "keywords")
            yield from ((f".{n}", getattr(a, n), getattr(b, n)) for n in names)
        elif isinstance(a, types.GeneratorType):
            yield ".locals", a.gi_frame and dict(a.gi_frame.f_locals), b.gi_frame and dict(b.gi_frame.f_locals)
        elif isinstance(a, ITERATORS):
            yield ".next", a.__reduce__()[1:], b.__reduce__()[1:]
        elif isinstance(a, weakref.ref):
            yield "()", a(), b()
        elif isinstance(a, functools._lru_cache_wrapper):  # what is cached may be there earlier
            yield from self._function(a.__wrapped__, b.__wrapped__)
        elif isinstance(a, type):
            if a.__module__ == self.ours:
                yield "", dict(vars(a)), dict(vars(b))
        elif hasattr(a, "__dict__"):
            yield "", vars(a), vars(b)

    def _function(self, a: Any, b: Any) -> Any:
        yield ".__defaults__", a.__defaults__, b.__defaults__
        cells = [[c.cell_contents for c in f.__closure__ or ()] for f in (a, b)]
        yield ".__closure__", *cells

    def _name(self, cls: type) -> tuple[str, str]:
        return cls.__module__.replace(self.ours, self.theirs), cls.__qualname__
