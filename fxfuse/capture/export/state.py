"""What a forward changes beside computing: all Python state that its code can reach, compared before and after.

The attributes of every module and helper object, lists and dicts in them, the variables that functions close over,
the globals and class attributes that the code names. A graph repeats none of these changes, so one is a reason not
to believe it.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping, MutableSet
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from fxfuse.refusal import CaptureError

_MISSING = object()
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_SEALED = (*_PLAIN, Tensor, torch.dtype, torch.device, torch.Size, torch.jit.ScriptModule)
_OURS = ("_tensor_constant", "_torchbind_obj", "_param_constant")  # what a trace itself adds to a module
_FOREIGN = {"torch", "numpy", "fxfuse", "builtins"} | sys.stdlib_module_names
_CACHE = type(functools.lru_cache(lambda: None))


class _Named(dict[str, Any]):
    """The globals of one module that some code names; they are written back to `home`."""

    def __init__(self, home: dict[str, Any], names: set[str]) -> None:
        super().__init__((n, home[n]) for n in names if n in home)
        self.home, self.names = home, names


@contextmanager
def still(model: nn.Module) -> Iterator[Callable[[], None]]:
    """All that the model's code can reach is put back as it was.

    What is yielded is called when the forward is over, before anybody else puts something back: it raises a
    CaptureError if the forward changed anything. Entries that are new in a dict do not count, for without them the
    forward computes what it would have stored there.
    """
    saved = [(path, holder, _content(holder)) for path, holder in _reachable(model)]

    def over() -> None:
        for path, holder, before in saved:
            for changed in _differences(path, holder, before, _content(holder)):
                raise CaptureError(f"the forward changes {changed}, which a graph does not repeat")

    try:
        with _named_where_it_is_set(saved):
            yield over
    finally:
        for _, holder, before in saved:
            _put_back(holder, before)


def forget(model: nn.Module) -> None:
    """Empty the caches of functions that the code of `model` calls."""
    for _, holder in _reachable(model):
        if isinstance(holder, _CACHE):
            holder.cache_clear()


@contextmanager
def _named_where_it_is_set(saved: list[tuple[str, Any, Any]]) -> Iterator[None]:
    """Stop `self.name = value` at its line. torch.export's stand-ins for modules share their `__dict__`."""
    known = {id(vars(holder)): path for path, holder, _ in saved if isinstance(holder, nn.Module)}
    original = nn.Module.__setattr__

    def guarded_set(module: nn.Module, name: str, value: Any) -> None:
        path = known.get(id(vars(module)))
        allowed = isinstance(value, Tensor) and name in vars(module).get("_buffers", ())
        allowed = allowed or _of_torch(module, name) or _same(vars(module).get(name, _MISSING), value)
        if path is not None and not allowed:
            raise CaptureError(f"the forward sets {path}.{name}, which a graph does not repeat")
        original(module, name, value)

    with patch.object(nn.Module, "__setattr__", guarded_set):
        yield


def _reachable(model: nn.Module) -> list[tuple[str, Any]]:
    """Every holder of state that the code of `model` can get at, by the way to it."""
    found: list[tuple[str, Any]] = []
    seen, waiting = dict[int, Any](), [("self", model)]
    while waiting:
        path, value = waiting.pop()
        if id(value) in seen or isinstance(value, _SEALED) or _foreign(value):
            continue
        seen[id(value)] = value
        if _holds(value):
            found.append((path, value))
        waiting += _below(path, value)
    return found


def _holds(value: Any) -> bool:
    kinds = (dict, list, set, deque, _Named, type, types.CellType, _CACHE)
    plain = (types.FunctionType, types.MethodType, property, staticmethod, classmethod, functools.partial)
    return isinstance(value, kinds) or (hasattr(value, "__dict__") and not isinstance(value, plain))


def _foreign(value: Any) -> bool:
    """Classes, functions and modules of torch and Python, and objects of theirs without the user's state."""
    if isinstance(value, types.ModuleType):
        return True  # of which only what some code names is looked at
    if isinstance(value, (type, types.FunctionType)):
        return str(value.__module__).partition(".")[0] in _FOREIGN
    ours = isinstance(value, (nn.Module, dict, list, set, tuple, deque, types.CellType, types.MethodType, _CACHE))
    ours = ours or isinstance(value, (property, staticmethod, classmethod, functools.partial, types.SimpleNamespace))
    return not ours and str(type(value).__module__).partition(".")[0] in _FOREIGN


def _below(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, types.FunctionType):
        yield from _named_by(value)
    elif isinstance(value, (types.MethodType, staticmethod, classmethod)):
        yield path, value.__func__
        yield path, getattr(value, "__self__", None)
    elif isinstance(value, _CACHE):
        yield path, value.__wrapped__
    elif isinstance(value, property):
        yield path, value.fget
    elif isinstance(value, functools.partial):
        yield from ((path, part) for part in (value.func, value.args, value.keywords))
    elif isinstance(value, (list, tuple, set, deque)):
        yield from ((f"{path}[{i}]", entry) for i, entry in enumerate(value))
    elif isinstance(value, _Named):
        yield from ((f"{path}.{name}", entry) for name, entry in value.items())
    elif isinstance(value, dict):
        yield from ((f"{path}[{key!r}]", entry) for key, entry in value.items())
    elif isinstance(value, types.CellType):
        yield from ((path, entry) for entry in _content(value).values())
    elif isinstance(value, type):
        yield from ((f"{value.__qualname__}.{name}", entry) for name, entry in vars(value).items())
        yield from ((base.__qualname__, base) for base in value.__bases__)
    elif isinstance(value, nn.Module):
        yield from ((f"{path}.{name}", module) for name, module in value._modules.items())
        tables = vars(nn.Module()).keys()
        yield from ((f"{path}.{name}", entry) for name, entry in vars(value).items() if name not in tables)
        yield type(value).__qualname__, type(value)
    elif hasattr(value, "__dict__"):
        yield from ((f"{path}.{name}", entry) for name, entry in vars(value).items())
        yield type(value).__qualname__, type(value)


def _named_by(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function closes over, has as defaults, and names of its module and of other modules."""
    names, codes = set[str](), [function.__code__]
    for code in codes:
        names |= set(code.co_names)
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    yield from ((name, cell) for name, cell in cells)
    yield from ((function.__qualname__, default) for default in function.__defaults__ or ())
    yield function.__module__, _Named(function.__globals__, names)
    for name in names:
        module = function.__globals__.get(name)
        if isinstance(module, types.ModuleType) and module.__name__.partition(".")[0] not in _FOREIGN:
            yield module.__name__, _Named(vars(module), names)


def _content(holder: Any) -> dict[Any, Any]:
    """What a holder holds, by name, key or index."""
    if isinstance(holder, _Named):
        return {n: holder.home[n] for n in holder.names if n in holder.home}
    if isinstance(holder, _CACHE):
        return {"hits": holder.cache_info().currsize}
    if isinstance(holder, types.CellType):
        try:
            return {"": holder.cell_contents}
        except ValueError:  # a variable that has no value yet
            return {}
    if isinstance(holder, (list, deque)):
        return dict(enumerate(holder))
    if isinstance(holder, set):
        return {entry: entry for entry in holder}
    return dict(holder) if isinstance(holder, dict) else dict(vars(holder))


def _differences(path: str, holder: Any, before: dict[Any, Any], after: dict[Any, Any]) -> Iterator[str]:
    if isinstance(holder, _CACHE):
        return  # a memo: the forward computes what is in it
    memo = isinstance(holder, dict) and not isinstance(holder, _Named)
    for key in before.keys() | after.keys():
        old, new = before.get(key, _MISSING), after.get(key, _MISSING)
        stored = old is _MISSING and isinstance(getattr(type(holder), str(key), None), functools.cached_property)
        if not _same(old, new) and not (memo and old is _MISSING) and not stored and not _of_torch(holder, str(key)):
            inside = isinstance(holder, (list, deque, set, types.CellType))
            yield path if inside else f"{path}[{key!r}]" if memo else f"{path}.{key}"


def _same(old: Any, new: Any) -> bool:
    if old is new or getattr(new, "__wrapped__", new) is old:  # torch.fx records calls of some functions so
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, tuple):
        return len(old) == len(new) and all(map(_same, old, new))
    return isinstance(old, _PLAIN) and bool(old == new)


def _of_torch(holder: Any, name: str) -> bool:
    """Constants of the trace, and the lists of an RNN's weights, which torch.export exchanges for fake ones."""
    return name.startswith(_OURS) or (isinstance(holder, nn.RNNBase) and name.startswith("_flat_weight"))


def _put_back(holder: Any, before: dict[Any, Any]) -> None:
    now = _content(holder)
    if now.keys() == before.keys() and all(now[key] is value for key, value in before.items()):
        return
    if isinstance(holder, _CACHE):
        holder.cache_clear()  # which may hold what was made for this run alone
    elif isinstance(holder, types.CellType):
        if before:
            holder.cell_contents = before[""]
        else:
            del holder.cell_contents
    elif isinstance(holder, (list, deque)):
        holder.clear()
        holder.extend(before.values())
    elif isinstance(holder, MutableSet):
        holder.clear()
        holder |= set(before)
    elif isinstance(holder, type):
        for name in now.keys() - before.keys():
            delattr(holder, name)
        for name, value in before.items():
            if now.get(name, _MISSING) is not value:
                setattr(holder, name, value)
    else:
        table: MutableMapping[Any, Any] = holder.home if isinstance(holder, _Named) else holder
        table = table if isinstance(table, dict) else vars(holder)
        for name in now.keys() - before.keys():
            del table[name]
        if list(now) != list(before) and not isinstance(holder, _Named):
            table.clear()
        table.update(before)
