"""What Python code can change, and what it held before: named where it has changed, and put back.

Containers, attributes, variables that functions close over. The namespaces of classes and of their modules, which no
copy could stand for, are held as they are.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy
from torch.utils._pytree import tree_leaves

from fxfuse.capture.copying import filled

CONTAINERS = (dict, OrderedDict, defaultdict, list, deque, set)
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device, range, slice)
_MISSING = object()


@dataclass(frozen=True, slots=True)
class Held:
    """Something a forward could change, and what it held before; in `attributes` a new key is a change too."""

    name: str
    value: Any
    before: Any
    attributes: bool = False

    def changed(self) -> list[str]:
        """Names of what is not as it was, which it is again afterwards."""
        now = _content(self.value)
        if _equal(now, self.before):
            return []
        named = [self.name]
        if self.attributes:
            keys = [
                k
                for k in (now.keys() | self.before.keys())
                if not _same(now.get(k, _MISSING), self.before.get(k, _MISSING))
            ]
            named = [f"{self.name}.{k}" for k in sorted(keys)]
        memo = (
            not self.attributes
            and isinstance(now, dict)
            and all(_same(now.get(k, _MISSING), v) for k, v in self.before.items())
        )
        memo = memo and not any(_depends_on_inputs(v) for k, v in now.items() if k not in self.before)
        give_back(self.value, self.before)
        return [] if memo else named


class Slot:
    """An attribute that lies in no dict."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def get(self) -> Any:
        return getattr(self.owner, self.name, self)

    def put(self, value: Any) -> None:
        object.__setattr__(self.owner, self.name, value)


def namespaces(model: nn.Module) -> Iterable[Held]:
    """What the model's classes share with others: their attributes, their modules' globals, defaults of methods."""
    seen = set[int]()
    for cls in dict.fromkeys(c for m in model.modules() for c in type(m).__mro__):
        if cls.__module__.partition(".")[0] in ("torch", "builtins") or id(cls) in seen:
            continue
        seen.add(id(cls))
        namespaces = [
            (cls.__name__, vars(cls)),
            (cls.__module__, getattr(sys.modules.get(cls.__module__), "__dict__", {})),
        ]
        for name, namespace in namespaces:
            if id(namespace) in seen:
                continue
            seen.add(id(namespace))
            held = {k: v for k, v in namespace.items() if not k.startswith("__")}
            yield Held(name, _Namespace(cls if name == cls.__name__ else namespace), held, attributes=True)
            for key, value in held.items():
                yield from _shared(f"{name}.{key}", value)


def _shared(name: str, value: Any, depth: int = 0) -> Iterator[Held]:
    """The containers in a namespace, and plain objects of the user's, a few levels down; defaults of functions."""
    function = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else value
    if isinstance(function, types.FunctionType):
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            yield from _shared(name, default, 3)
        for cell in function.__closure__ or ():
            if filled(cell):
                yield Held(name, cell, cell.cell_contents)
                yield from _shared(name, cell.cell_contents, 3)
    elif type(value) in CONTAINERS:
        yield Held(name, value, value.copy())
        if depth < 3 and len(value) < 100:
            for inner in list(value.values() if isinstance(value, dict) else value):
                yield from _shared(name, inner, depth + 1)
    elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, (type, types.ModuleType)):
        if of_libraries(value) or callable(value) or depth > 3:
            return
        yield Held(name, vars(value), dict(vars(value)), attributes=True)
        for inner in list(vars(value).values()):
            yield from _shared(name, inner, depth + 2)


class _Namespace:
    """The attributes of a class, or the globals of a module."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def content(self) -> dict[str, Any]:
        namespace = self.owner if isinstance(self.owner, dict) else vars(self.owner)
        return {k: v for k, v in namespace.items() if not k.startswith("__")}

    def put(self, before: dict[str, Any]) -> None:
        for name, value in self.content().items():
            if name not in before:
                self.owner.pop(name) if isinstance(self.owner, dict) else delattr(self.owner, name)
            elif before[name] is not value:
                self._set(name, before[name])
        for name in before.keys() - self.content().keys():
            self._set(name, before[name])

    def _set(self, name: str, value: Any) -> None:
        if isinstance(self.owner, dict):
            self.owner[name] = value
        else:
            setattr(self.owner, name, value)


def _content(value: Any) -> Any:
    if isinstance(value, types.CellType):
        return value.cell_contents if filled(value) else value
    if isinstance(value, Slot):
        return value.get()
    return value.content() if isinstance(value, _Namespace) else value


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, PLAIN) and a == b)


def _equal(now: Any, before: Any) -> bool:
    """Whether nothing was changed: the same objects in the same places, or equal plain ones."""
    if isinstance(before, dict):
        return len(now) == len(before) and all(_same(now.get(k, _MISSING), v) for k, v in before.items())
    if isinstance(before, (list, deque)):
        return len(now) == len(before) and all(map(_same, now, before))
    return bool(now == before) if isinstance(before, set) else _same(now, before)


def give_back(value: Any, before: Any) -> None:
    if isinstance(value, types.CellType):
        value.cell_contents = before
    elif isinstance(value, (Slot, _Namespace)):
        value.put(before)
    else:
        value.clear()
        (value.extend if isinstance(value, (list, deque)) else value.update)(before)


def _depends_on_inputs(value: Any) -> bool:
    """Whether what a trace put into a dict is another for other inputs."""
    proxies = (v for v in tree_leaves(value) if issubclass(type(v), Proxy))
    return any(not p.tracer.known.knows(p.node) for p in proxies)


def of_libraries(value: Any) -> bool:
    """Whether an object is torch's, or one by which threads wait for each other, which no copy could stand for."""
    return type(value).__module__.partition(".")[0] in ("torch", "threading", "_thread", "logging", "re")
