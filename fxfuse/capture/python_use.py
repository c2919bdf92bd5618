"""Which submodules the Python code of a module only calls.

A module whose forward cannot be traced stays as it is, and runs as Python. A submodule of it may be
replaced by its optimized form only where nothing but its call is used: not where its weight is read,
its parts are called one by one, or it is handed to somebody else. That is read off the source of
the methods which the forward can reach. What the source does not show counts as used in every way.
"""

from __future__ import annotations

import ast
import dis
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxfuse.capture.python_source import Source, arguments, compared_with_is, elements, name_called, source_of

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_VIEWS = {"values", "items", "children", "named_children"}
_LOOPS = {"enumerate", "zip", "reversed", "list", "tuple"}


@dataclass
class Reach:
    """How the code uses each attribute: called itself, its elements called, or used otherwise (where).

    Calls are counted by their number of positional arguments, None for any other form. `asked` are plain
    values (numbers, strings) that are read from a submodule: they have to be there afterwards.
    """

    called: dict[str, set[int | None]] = field(default_factory=dict)
    elements: dict[str, set[int | None]] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)
    asked: dict[str, set[str]] = field(default_factory=dict)
    opaque: str = ""

    def replaceable(self, module: nn.Module) -> Iterator[tuple[str, nn.Module, int | None]]:
        """Submodules whose call is all that is used of them, plain values aside: path, module, number of arguments."""
        if self.opaque:
            return
        for name, child in module._modules.items():
            if child is None or name in self.used:
                continue
            counts = self.elements.get(name, set()) | self.called.get(name, set())
            given = counts.pop() if len(counts) == 1 else None
            if name in self.elements:
                yield from ((f"{name}.{key}", m, given) for key, m in child._modules.items() if m is not None)
            elif name in self.called:
                yield name, child, given


def reach(module: nn.Module) -> Reach:
    """How the forward of `module`, and the methods it calls, use its submodules."""
    found = Reach()
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        found.called = {name: {1} for name in module._modules}
        return found
    if "forward" in module.__dict__ or any(getattr(module, h) for h in ("_forward_hooks", "_forward_pre_hooks")):
        found.opaque = "its forward is replaced or has hooks"
        return found
    waiting, seen = [("forward", 0)], set[Any]()
    while waiting and not found.opaque:
        name, start = waiting.pop()
        function, owner = _method(module, name, start) or (None, 0)
        if function is None or function in seen:
            continue
        seen.add(function)
        if (source := source_of(function)) is None:
            found.opaque = f"the source of {name} is not there to be read"
        else:
            _Uses(module, found, waiting, source, owner, name).walk()
    kept = {id(m) for m in _held(vars(module))}
    for name, child in module._modules.items():
        if child is not None and not kept.isdisjoint(id(m) for m in child.modules()):
            found.used.setdefault(name, "an attribute that is no submodule holds a part of it as well")
    return found


def _method(module: nn.Module, name: str, start: int = 0) -> tuple[Any, int] | None:
    """The function behind `self.name` or `super().name`, and the place of its class."""
    for place, cls in enumerate(type(module).__mro__[start:], start):
        if name in vars(cls):
            if isinstance(vars(cls)[name], (staticmethod, classmethod)):
                return None  # it is not given the module
            held: Any = vars(cls)[name]
            if isinstance(held, (property, cached_property)):
                held = held.fget if isinstance(held, property) else held.func
            value = inspect.unwrap(held)
            return (value, place) if inspect.isfunction(value) else None
    return None


def _methods(cls: type) -> Iterator[str]:
    """Names of the functions that the user's own classes define."""
    for each in cls.__mro__:
        if each is nn.Module or each in CONTAINERS:
            return
        yield from (n for n, v in vars(each).items() if inspect.isfunction(inspect.unwrap(v)) and n != "__init__")


@cache
def _set_later(cls: Any) -> frozenset[str]:
    """The attributes that methods of the user's set, after the constructor: what they hold now may not last."""
    found = set[str]()
    for each in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, value in vars(each).items():
            code = getattr(inspect.unwrap(value), "__code__", None) if name != "__init__" and callable(value) else None
            if code is not None:
                found.update(i.argval for i in dis.get_instructions(code) if i.opname == "STORE_ATTR")
    return frozenset(found)


@dataclass(frozen=True)
class _Uses:
    """Sorts every mention of `self` in the method `name` of the class at `owner`; adds what it calls to `waiting`."""

    module: nn.Module
    found: Reach
    waiting: list[tuple[str, int]]
    source: Source
    owner: int
    name: str

    def walk(self) -> None:
        cls: Any = type(self.module)
        set_later = _set_later(cls)
        for node in self.source.alive({n: v for n, v in vars(self.module).items() if n not in set_later}):
            if self.source.is_self(node):
                self._of_self(node)
            elif name_called(node) == "super" and isinstance(outer := self.source.parent[node], ast.Attribute):
                self.waiting.append((outer.attr, self.owner + 1))

    def _of_self(self, node: ast.AST) -> None:
        outer = self.source.parent[node]
        if isinstance(outer, ast.Attribute):
            if outer.attr in self.module._modules:
                self._of_child(outer.attr, outer)
            elif hasattr(type(self.module), outer.attr):
                self._of_method(outer)
        elif isinstance(outer, ast.Call) and name_called(outer) == "getattr":
            self._by_name(outer)
        elif name_called(outer) not in ("super", "hasattr"):
            self._used(node, *self.module._modules)

    def _of_method(self, attribute: ast.Attribute) -> None:
        """`self.method`: followed if it is the user's own; torch's own may hand out any submodule."""
        if attribute.attr in ("parameters", "buffers", "named_parameters") and self._asks_kind(attribute):
            return
        found = _method(self.module, attribute.attr)
        owner = type(self.module).__mro__[found[1]] if found else None
        if owner is nn.Module or owner in CONTAINERS:
            self._used(attribute, *self.module._modules)
        elif found:
            self.waiting.append((attribute.attr, 0))

    def _asks_kind(self, attribute: ast.Attribute) -> bool:
        """`next(self.parameters()).dtype` and `.device`, which stay what they are."""
        following = self.source.parent.get(self.source.parent[attribute])
        outer = self.source.parent.get(following) if following is not None else None
        asks = isinstance(outer, ast.Attribute) and outer.attr in ("dtype", "device", "is_cuda")
        return asks and name_called(following) == "next"

    def _of_child(self, name: str, node: ast.Attribute) -> None:
        """`self.child`, by what is done with it."""
        container = isinstance(self.module._modules[name], CONTAINERS)
        outer = self.source.parent[node]
        if call := self.source.call_of(node):
            self.found.called.setdefault(name, set()).add(arguments(call))
        elif container and (counts := self._elements_called(node)) is not None:
            self.found.elements.setdefault(name, set()).update(counts)
        elif isinstance(outer, ast.Attribute) and self._plain(name, outer):
            self.found.asked.setdefault(name, set()).add(outer.attr)
        elif not self._only_asked(node, outer, container):
            self._used(node, name)

    def _plain(self, name: str, read: ast.Attribute) -> bool:
        """`self.child.width`, where that is a number or a string the child holds."""
        value = vars(self.module._modules[name] or self).get(read.attr, self)
        kinds = (bool, int, float, str, type(None), torch.Size)
        flat = value if type(value) in (tuple, list) else (value,)
        own = hasattr(GraphModule, read.attr) or read.attr == "graph"
        return isinstance(read.ctx, ast.Load) and not own and all(type(v) in kinds for v in flat)

    def _only_asked(self, node: ast.Attribute, outer: ast.AST, container: bool) -> bool:
        """`self.child is None`, `if self.child`, `self.child.training`."""
        if isinstance(outer, (ast.BoolOp, ast.UnaryOp, ast.If, ast.IfExp)):
            inner: ast.AST = node
            while isinstance(outer, (ast.BoolOp, ast.UnaryOp)):
                inner, outer = outer, self.source.parent[outer]
            return isinstance(outer, (ast.If, ast.IfExp)) and outer.test is inner and not container
        training = isinstance(outer, ast.Attribute) and outer.attr == "training" and isinstance(outer.ctx, ast.Load)
        return training or compared_with_is(outer)

    def _elements_called(self, node: ast.expr) -> set[int | None] | None:
        """The calls in `self.list[i](x)`, `for m in self.list: m(x)`, `len(self.list)`; None for any other use."""
        outer = self.source.parent[node]
        if isinstance(outer, ast.Subscript) and outer.value is node and not isinstance(outer.slice, ast.Slice):
            call = self.source.call_of(outer)
            return {arguments(call)} if call else None
        if isinstance(outer, ast.Attribute) and outer.attr in _VIEWS and (call := self.source.call_of(outer)):
            return self._elements_called(call)
        if isinstance(outer, ast.Call) and node in outer.args:
            if name_called(outer) == "len":
                return set()
            return self._elements_called(outer) if name_called(outer) in _LOOPS else None
        if isinstance(outer, (ast.For, ast.comprehension)) and outer.iter is node:
            names = {n.id for n in elements(outer.target, node)}
            uses = [n for n in ast.walk(self.source.tree) if isinstance(n, ast.Name) and n.id in names]
            calls = {n: self.source.call_of(n) for n in uses if not isinstance(n.ctx, ast.Store)}
            if all(call or compared_with_is(self.source.parent[n]) for n, call in calls.items()):
                return {arguments(call) for call in calls.values() if call}
        return None

    def _by_name(self, call: ast.Call) -> None:
        """`getattr(self, f"prefix{i}")`: every name it may mean is called, or used otherwise."""
        named = call.args[1] if len(call.args) > 1 else None
        whole = isinstance(named, ast.Constant)
        if isinstance(named, ast.JoinedStr):
            named = named.values[0] if named.values else None
        elif isinstance(named, ast.BinOp):
            named = named.left
        prefix = str(named.value) if isinstance(named, ast.Constant) else ""
        for method in _methods(type(self.module)):
            if method == prefix if whole else method.startswith(prefix):
                self.waiting.append((method, 0))
        for name in self.module._modules:
            if name != prefix if whole else not name.startswith(prefix):
                continue
            if outer := self.source.call_of(call):
                self.found.called.setdefault(name, set()).add(arguments(outer))
            else:
                self._used(call, name)

    def _used(self, node: Any, *names: str) -> None:
        for name in names:
            if self.module._modules[name] is not None:
                self.found.used.setdefault(name, f"{self.name}, line {self.source.before + node.lineno}")


def outside(module: nn.Module) -> str:
    """Path of a submodule one of whose attributes holds a module elsewhere, whose changes a graph would not see."""
    inside = {id(m) for m in module.modules()}
    for path, inner in module.named_modules():
        if any(id(m) not in inside for m in _held(vars(inner))):
            return path or type(module).__name__
    return ""


def _held(value: Any, depth: int = 0) -> Iterator[nn.Module]:
    """Modules that plain attributes hold: in lists, dicts, partials and bound methods."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, partial):
        yield from _held([value.func, *value.args, *value.keywords.values()], depth)
    elif inspect.ismethod(value):
        yield from _held(value.__self__, depth)
    elif depth < 4 and isinstance(value, dict):
        for key, inner in value.items():
            if depth or key not in ("_modules", "_parameters", "_buffers"):
                yield from _held(inner, depth + 1)
    elif depth < 4 and isinstance(value, (list, tuple, set)):
        for inner in value:
            yield from _held(inner, depth + 1)
