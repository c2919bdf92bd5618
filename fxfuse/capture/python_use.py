"""Which submodules the Python code of a module only calls.

A module whose forward cannot be traced stays as it is, and runs as Python. A submodule of it may be
replaced by its optimized form only where nothing but its call is used: not where its weight is read,
its parts are called one by one, or it is handed to somebody else. That is read off the source of
the methods which the forward can reach. What the source does not show counts as used in every way.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_VIEWS = {"values", "items", "children", "named_children"}
_LOOPS = {"enumerate", "zip", "reversed", "list", "tuple"}
_Function = ast.FunctionDef | ast.Lambda
_HARMLESS = {"training"}


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
            given = _one(self.elements.get(name, set()) | self.called.get(name, set()))
            if name in self.elements:
                yield from ((f"{name}.{key}", m, given) for key, m in child._modules.items() if m is not None)
            elif name in self.called:
                yield name, child, given


def _one(counts: set[int | None]) -> int | None:
    return next(iter(counts)) if len(counts) == 1 else None


def reach(module: nn.Module) -> Reach:
    """How the forward of `module`, and the methods it calls, use its submodules."""
    found = Reach()
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        found.called = {name: {1} for name in module._modules}
        return found
    if "forward" in module.__dict__ or any(getattr(module, h) for h in ("_forward_hooks", "_forward_pre_hooks")):
        found.opaque = "its forward is replaced or has hooks"
        return found
    _Methods(module, found).run()
    kept = {id(m) for m in _held(vars(module))}
    for name, child in module._modules.items():
        if child is not None and not kept.isdisjoint(id(m) for m in child.modules()):
            found.used.setdefault(name, "an attribute that is no submodule holds a part of it as well")
    return found


def outside(module: nn.Module) -> str:
    """Path of a submodule one of whose attributes holds a module elsewhere, whose changes a graph would not see."""
    inside = {id(m) for m in module.modules()}
    for path, inner in module.named_modules():
        if any(id(m) not in inside for m in _held(vars(inner))):
            return path or type(module).__name__
    return ""


class _Methods:
    """Walks the methods that `forward` can reach, each once."""

    def __init__(self, module: nn.Module, found: Reach) -> None:
        self.module, self.found = module, found
        self.waiting: list[tuple[str, int]] = [("forward", 0)]
        self.seen: set[Any] = set()

    def run(self) -> None:
        while self.waiting and not self.found.opaque:
            name, start = self.waiting.pop()
            found = self._method(name, start)
            if found is None:
                continue
            function, owner = found
            if function in self.seen:
                continue
            self.seen.add(function)
            tree, first = _source(function)
            if tree is None:
                self.found.opaque = f"the source of {name} is not there to be read"
                return
            _Uses(self, tree, owner, f"{name}, line", first).walk()

    def _method(self, name: str, start: int) -> tuple[Any, int] | None:
        """The function behind `self.name` or `super().name`, and the place of its class."""
        for place, cls in enumerate(type(self.module).__mro__[start:], start):
            if name in vars(cls):
                if isinstance(vars(cls)[name], (staticmethod, classmethod)):
                    return None  # it is not given the module
                value = inspect.unwrap(getattr(vars(cls)[name], "fget", None) or vars(cls)[name])
                return (value, place) if inspect.isfunction(value) else None
        return None

    def is_method(self, name: str) -> bool:
        return name not in self.module._modules and hasattr(type(self.module), name)


class _Uses:
    """Sorts every mention of `self` in one function."""

    def __init__(
        self, methods: _Methods, tree: ast.FunctionDef | ast.Lambda, owner: int, place: str, first: int
    ) -> None:
        self.methods, self.found, self.modules = methods, methods.found, methods.module._modules
        self.tree, self.owner, self.place, self.first = tree, owner, place, first - 1
        self.parent = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self.self_name = [*tree.args.posonlyargs, *tree.args.args][0].arg

    def walk(self) -> None:
        dead = set(self._dead())
        for node in ast.walk(self.tree):
            if node in dead:
                continue
            if isinstance(node, ast.Name) and node.id == self.self_name:
                self._of_self(node)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super":
                outer = self.parent[node]
                if isinstance(outer, ast.Attribute):
                    self.methods.waiting.append((outer.attr, self.owner + 1))

    def _dead(self) -> Iterator[ast.AST]:
        """Nodes in branches not taken: those of `if self.flag` for a flag of the module, as gradient checkpointing."""
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.If, ast.IfExp)):
                known = self._value(node.test)
                never = [] if known is None else node.orelse if known else node.body
                for branch in never if isinstance(never, list) else [never]:
                    yield from ast.walk(branch)

    def _value(self, test: ast.expr) -> bool | None:
        """The truth of a test that the module's own flags decide."""
        if isinstance(test, ast.BoolOp):
            values = [self._value(v) for v in test.values]
            decisive = isinstance(test.op, ast.Or)
            if decisive in values:
                return decisive
            return None if None in values else not decisive
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self._value(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.Attribute) and isinstance(test.value, ast.Name) and test.value.id == self.self_name:
            flag = vars(self.methods.module).get(test.attr)
            return flag if isinstance(flag, bool) else None
        if isinstance(test, ast.Call) and ast.unparse(test.func) in ("torch.jit.is_scripting", "torch.jit.is_tracing"):
            return False
        return None

    def _of_self(self, node: ast.Name) -> None:
        outer = self.parent[node]
        if isinstance(outer, ast.Attribute):
            if outer.attr in self.modules:
                self._of_child(outer.attr, outer)
            elif self.methods.is_method(outer.attr):
                self._of_method(outer)
        elif isinstance(outer, ast.Call) and isinstance(outer.func, ast.Name) and outer.func.id in ("getattr", "super"):
            if outer.func.id == "getattr":
                self._by_name(outer)
        elif isinstance(outer, ast.Call) and isinstance(outer.func, ast.Name) and outer.func.id == "hasattr":
            return
        else:
            self._all(node)

    def _of_method(self, attribute: ast.Attribute) -> None:
        """`self.method`: followed if it is the user's own; torch's own may hand out any submodule."""
        found = self.methods._method(attribute.attr, 0)
        if attribute.attr in ("parameters", "buffers", "named_parameters") and self._asks_kind(attribute):
            return
        owner = type(self.methods.module).__mro__[found[1]] if found else None
        if owner is nn.Module or owner in CONTAINERS:
            self._all(attribute)
        elif found:
            self.methods.waiting.append((attribute.attr, 0))

    def _asks_kind(self, attribute: ast.Attribute) -> bool:
        """`next(self.parameters()).dtype` and `.device`, which stay what they are."""
        call = self.parent[attribute]
        following = self.parent.get(call)
        outer = self.parent.get(following) if following is not None else None
        first = isinstance(following, ast.Call) and isinstance(following.func, ast.Name) and following.func.id == "next"
        return first and isinstance(outer, ast.Attribute) and outer.attr in ("dtype", "device", "is_cuda")

    def _of_child(self, name: str, node: ast.Attribute) -> None:
        """`self.child`, by what is done with it."""
        container = isinstance(self.modules[name], CONTAINERS)
        outer = self.parent[node]
        if self._is_called(node):
            self.found.called.setdefault(name, set()).add(_arguments(self.parent[node]))
        elif container and (counts := self._elements_called(node)) is not None:
            self.found.elements.setdefault(name, set()).update(counts)
        elif isinstance(outer, ast.Attribute) and self._plain(name, outer):
            self.found.asked.setdefault(name, set()).add(outer.attr)
        elif not self._only_asked(node, outer, container):
            self._used(name, node)

    def _plain(self, name: str, read: ast.Attribute) -> bool:
        """`self.child.width`, where that is a number or a string the child holds."""
        value = vars(self.modules[name] or self).get(read.attr, self)
        kinds = (bool, int, float, str, type(None), torch.Size)
        flat = value if type(value) in (tuple, list) else (value,)
        own = hasattr(GraphModule, read.attr) or read.attr == "graph"
        return isinstance(read.ctx, ast.Load) and not own and all(type(v) in kinds for v in flat)

    def _only_asked(self, node: ast.Attribute, outer: ast.AST, container: bool) -> bool:
        """`self.child is None`, `if self.child`, `self.child.training`."""
        if isinstance(outer, ast.Compare):
            return all(isinstance(o, (ast.Is, ast.IsNot)) for o in outer.ops)
        if isinstance(outer, (ast.BoolOp, ast.UnaryOp, ast.If, ast.IfExp)):
            inner: ast.AST = node
            while isinstance(outer, (ast.BoolOp, ast.UnaryOp)):
                inner, outer = outer, self.parent[outer]
            return isinstance(outer, (ast.If, ast.IfExp)) and outer.test is inner and not container
        return isinstance(outer, ast.Attribute) and outer.attr in _HARMLESS and isinstance(outer.ctx, ast.Load)

    def _is_called(self, node: ast.AST) -> bool:
        outer = self.parent[node]
        return isinstance(outer, ast.Call) and outer.func is node

    def _elements_called(self, node: ast.expr) -> set[int | None] | None:
        """The calls in `self.list[i](x)`, `for m in self.list: m(x)`, `len(self.list)`; None for any other use."""
        outer = self.parent[node]
        if isinstance(outer, ast.Subscript) and outer.value is node and not isinstance(outer.slice, ast.Slice):
            return {_arguments(self.parent[outer])} if self._is_called(outer) else None
        if isinstance(outer, ast.Attribute) and outer.attr in _VIEWS and self._is_called(outer):
            return self._elements_called(self.parent[outer])  # type: ignore[arg-type]
        if isinstance(outer, ast.Call) and isinstance(outer.func, ast.Name) and node in outer.args:
            if outer.func.id == "len":
                return set()
            return self._elements_called(outer) if outer.func.id in _LOOPS else None
        if isinstance(outer, (ast.For, ast.comprehension)) and outer.iter is node:
            names = {n.id for n in ast.walk(_elements(outer.target, node)) if isinstance(n, ast.Name)}
            uses = [n for n in ast.walk(self.tree) if isinstance(n, ast.Name) and n.id in names]
            if all(self._loop_use(n) for n in uses):
                return {_arguments(self.parent[n]) for n in uses if self._is_called(n)}
        return None

    def _loop_use(self, name: ast.Name) -> bool:
        """A loop variable that is bound, called or compared with None."""
        if isinstance(name.ctx, ast.Store) or self._is_called(name):
            return True
        outer = self.parent[name]
        return isinstance(outer, ast.Compare) and all(isinstance(o, (ast.Is, ast.IsNot)) for o in outer.ops)

    def _by_name(self, call: ast.Call) -> None:
        """`getattr(self, f"prefix{i}")`: every name it may mean is called, or used otherwise."""
        named = call.args[1] if len(call.args) > 1 else None
        whole = isinstance(named, ast.Constant)
        if isinstance(named, ast.JoinedStr):
            named = named.values[0] if named.values else None
        prefix = str(named.value) if isinstance(named, ast.Constant) else ""
        for name in self.modules:
            if name != prefix if whole else not name.startswith(prefix):
                continue
            if self._is_called(call):
                self.found.called.setdefault(name, set()).add(_arguments(self.parent[call]))
            else:
                self._used(name, call)

    def _all(self, node: ast.AST) -> None:
        for name in self.modules:
            self._used(name, node)

    def _used(self, name: str, node: Any) -> None:
        self.found.used.setdefault(name, f"{self.place} {self.first + node.lineno}")


def _source(function: Any) -> tuple[_Function | None, int]:
    """A function of `self` as a tree, and its first line; None where its source is not there, or it has no self."""
    if function.__name__ == "<lambda>":
        return _lambda(function), 1
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except (OSError, TypeError, SyntaxError):  # built at run time, or in C, or a part of an expression
        return None, 0
    plain = isinstance(tree, ast.FunctionDef) and (tree.args.posonlyargs or tree.args.args)
    return (tree, first) if plain and isinstance(tree, ast.FunctionDef) else (None, 0)


def _lambda(function: Any) -> ast.Lambda | None:
    """The one lambda with these parameters on its line of the file."""
    code = function.__code__
    try:
        tree = ast.parse("".join(inspect.findsource(function)[0]))
    except (OSError, TypeError, SyntaxError):  # typed at a prompt, or built at run time
        return None
    here = [n for n in ast.walk(tree) if isinstance(n, ast.Lambda) and n.lineno == code.co_firstlineno]
    named = [n for n in here if [a.arg for a in n.args.args] == [*code.co_varnames[: code.co_argcount]]]
    return named[0] if len(named) == 1 and code.co_argcount else None


def _elements(target: ast.expr, source: ast.expr) -> ast.expr:
    """The part of a loop's target that is a module: not the number or the name that comes before it."""
    name = source.func if isinstance(source, ast.Call) else None
    counted = isinstance(name, ast.Name) and name.id == "enumerate"
    counted |= isinstance(name, ast.Attribute) and name.attr in ("items", "named_children")
    return target.elts[1] if counted and isinstance(target, ast.Tuple) and len(target.elts) == 2 else target


def _arguments(call: ast.AST) -> int | None:
    """How many positional arguments a call has; None with keywords or a star."""
    assert isinstance(call, ast.Call)
    plain = not call.keywords and not any(isinstance(a, ast.Starred) for a in call.args)
    return len(call.args) if plain else None


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
