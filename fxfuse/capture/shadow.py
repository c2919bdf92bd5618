"""A shadow of a model: everything in it that Python can change is a copy, its tensors are the model's own.

A trace runs a forward once, and whatever that forward sets, appends or counts would be left behind in the
model. It runs on a shadow instead, so that the caller's objects are not there to be touched, and what has changed
in the shadow afterwards is what a graph does not repeat. What no copy holds, the namespaces of modules and classes
and the defaults of functions, is compared and put back.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.capture.copying import filled, with_cells
from fxfuse.capture.held import CONTAINERS, PLAIN, Held, Slot, namespaces, of_libraries
from fxfuse.refusal import CaptureError

_AS_THEY_ARE = (*PLAIN, type, types.ModuleType, types.BuiltinFunctionType, Tensor, torch.Generator, Ellipsis.__class__)
_ITERABLE: tuple[Any, ...] = ([], (), {}, set(), range(0), {}.values(), {}.items(), "")
_ITERATORS = tuple({type(iter(v)) for v in _ITERABLE})
_TABLES = ("_parameters", "_buffers", "_modules")
# What torch keeps in every module beside its own attributes: never handed to a forward
_HOOKS = vars(nn.Module()).keys() - set(_TABLES) - {"training"}


class Shadow:
    """The shadow `root` of a module, over the same tensors; with `tensors` over the same parameters alone.

    Then buffers and other tensors are copies, so that it may be run.
    """

    def __init__(self, model: nn.Module, tensors: bool = False) -> None:
        self._tensors = tensors
        self._memo: dict[int, Any] = {}
        self._kept: list[Any] = []  # so that no id is given twice meanwhile
        self._held: list[Held] = []
        self._iterators: list[tuple[str, Any, str]] = []
        self._outside = list(namespaces(model))
        self.root: nn.Module = self.of(model, "self")

    def changed(self) -> list[str]:
        """Names of what the forward has changed since; all is put back.

        New keys in a dict are a memo, and not named, where what they hold depends on no input: without them a forward
        computes what it had stored.
        """
        found = [name for held in (*self._held, *self._outside) for name in held.changed()]
        return found + [n for n, iterator, before in self._iterators if repr(iterator.__reduce__()) != before]

    def memos(self) -> list[Any]:
        """What a forward has put into dicts under new keys, since."""
        dicts = (h for h in self._held if isinstance(h.value, dict) and not h.attributes)
        return [value for h in dicts for key, value in h.value.items() if key not in h.before]

    def of(self, value: Any, name: str = "") -> Any:
        """The shadow of a value that the model holds."""
        kind = type(value)
        if self._copies(value):
            return self._memo.setdefault(id(value), value.detach().clone())
        if kind in _AS_THEY_ARE or isinstance(value, _AS_THEY_ARE):
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        self._kept.append(value)
        made = self._made(value, kind, name)
        self._memo[id(value)] = made
        return made

    def _copies(self, value: Any) -> bool:
        return self._tensors and isinstance(value, Tensor) and not isinstance(value, nn.Parameter)

    def _made(self, value: Any, kind: type, name: str) -> Any:
        if isinstance(value, nn.Module):
            return value if isinstance(value, torch.jit.ScriptModule) else self._module(value, name)
        if kind in CONTAINERS:
            return self._container(value, name)
        if isinstance(value, tuple):
            items = [self.of(v, f"{name}[{i}]") for i, v in enumerate(value)]
            if all(a is b for a, b in zip(items, value, strict=True)):
                return value
            return kind(*items) if hasattr(value, "_fields") else kind(items)
        if kind is types.MethodType:
            return types.MethodType(value.__func__, self.of(value.__self__, name))
        if kind is functools.partial:
            return self._partial(value, name)
        if kind is types.FunctionType:
            return self._function(value, name)
        if kind is types.GeneratorType:
            return _Spent()
        if kind in _ITERATORS or kind.__module__ == "itertools":
            made = copy.copy(value)
            self._iterators.append((name, made, repr(made.__reduce__())))
            return made
        return self._object(value, name)

    def _module(self, module: nn.Module, name: str) -> nn.Module:
        new = self._memo[id(module)] = object.__new__(type(module))  # a GraphModule would make a class anew
        own = vars(new)
        prefix = f"{name}."
        for key, value in vars(module).items():
            if key == "_modules":
                table = own[key] = value.__class__()
                for child, inner in value.items():
                    table[child] = None if inner is None else self.of(inner, prefix + child)
            elif type(value) in _AS_THEY_ARE and not self._copies(value):
                own[key] = value
            elif key in _HOOKS and not value:
                own[key] = value.copy() if isinstance(value, dict) else value
                continue
            elif key in _TABLES:
                own[key] = value.copy()
                for tensor, held in value.items() if self._tensors else ():
                    own[key][tensor] = self.of(held)
            else:
                own[key] = self.of(value, prefix + key)
                continue
            if key in _TABLES and own[key]:
                self._held.append(Held(name, own[key], own[key].copy(), attributes=True))
        self._held.append(Held(name, own, dict(own), attributes=True))
        return new

    def _container(self, value: Any, name: str) -> Any:
        new: Any = value.__class__()
        if isinstance(value, deque):
            new = deque(maxlen=value.maxlen)
        self._memo[id(value)] = new
        if isinstance(value, dict):
            new.update({self.of(k, name): self.of(v, f"{name}[{k!r}]") for k, v in value.items()})
            if isinstance(value, defaultdict):
                new.default_factory = value.default_factory
        elif isinstance(value, set):
            new.update(self.of(v, name) for v in value)
        else:
            new.extend(self.of(v, f"{name}[{i}]") for i, v in enumerate(value))
        self._held.append(Held(name, new, new.copy()))
        return new

    def _partial(self, value: Any, name: str) -> Any:
        args, keywords = self.of(value.args, name), {k: self.of(v, name) for k, v in value.keywords.items()}
        return functools.partial(self.of(value.func, name), *args, **keywords)

    def _function(self, function: Any, name: str) -> Any:
        """A function whose closure holds something of the model sees its shadow."""
        cells = function.__closure__ or ()
        held = [c.cell_contents if filled(c) else None for c in cells]
        new = [self.of(v, name) for v in held]
        if all(a is b for a, b in zip(held, new, strict=True)):
            return function
        closure = tuple(types.CellType(v) if filled(c) else c for c, v in zip(cells, new, strict=True))
        made = with_cells(function, closure)
        for cell, (content, own) in zip(function.__code__.co_freevars, zip(new, closure, strict=True), strict=True):
            if filled(own):
                self._held.append(Held(f"{name} ({cell})", own, content))
        return made

    def _object(self, value: Any, name: str) -> Any:
        """An object of a class of the user's own, by its attributes; one of any other kind is shared."""
        if of_libraries(value):
            return value
        try:
            made = copy.copy(value)
        except Exception:  # what a class does when copied can be anything: such an object stays what it is
            return value
        if made is value or type(made) is not type(value):
            return value
        self._memo[id(value)] = made
        if isinstance(made, (dict, list, set)):  # a container of the user's own class
            self._held.append(Held(name, made, copy.copy(made)))
        attributes = getattr(made, "__dict__", None)
        if isinstance(attributes, dict):
            for key, inner in list(attributes.items()):
                attributes[key] = self.of(inner, f"{name}.{key}")
            self._held.append(Held(name, attributes, dict(attributes), attributes=True))
        for key in _slots(type(value)):
            if hasattr(value, key):
                inner = self.of(getattr(value, key), f"{name}.{key}")
                object.__setattr__(made, key, inner)
                self._held.append(Held(f"{name}.{key}", Slot(made, key), inner))
        return made


class _Spent:
    """In the place of a generator, which could not be wound back."""

    def __getattr__(self, name: str) -> Any:
        raise CaptureError("the forward takes from a generator, which a graph does not repeat")

    def __iter__(self) -> Any:
        return self.__getattr__("__iter__")

    def __next__(self) -> Any:
        return self.__getattr__("__next__")


def _slots(kind: type) -> Iterator[str]:
    for cls in kind.__mro__:
        names = vars(cls).get("__slots__", ())
        yield from (n for n in ((names,) if isinstance(names, str) else names) if n not in ("__dict__", "__weakref__"))
