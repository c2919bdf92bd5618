"""Expressions in the weights of a model, as graphs of shared parts.

There is one object for one expression. So they are compared and hashed by identity, and whoever walks one visits each
part once; none of it recurses, as chains of thousands of steps are written by loops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from threading import Lock
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import torch


@dataclass(frozen=True, slots=True)
class Attr:
    """A parameter, buffer or tensor attribute of the model."""

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Apply:
    """`function(*args, **kwargs)`; a string is the name of a tensor method, or of an operator (`aten::add.Tensor`).

    There is one `Apply` of the same function and arguments in a process, and it never changes: equal is identical,
    and a comparison or a hash costs the same for an expression of any depth.

    Raises:
        TypeError: an argument cannot be hashed, see `freeze`.
    """

    __slots__ = ("__weakref__", "_leaves", "args", "dtype", "function", "kwargs", "shape")
    function: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    _leaves: tuple[Attr, ...] | None

    def __new__(
        cls,
        function: Callable[..., Any] | str,
        args: tuple[Any, ...],
        kwargs: tuple[tuple[str, Any], ...],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Apply:
        named = tuple((name, _exact(value)) for name, value in kwargs)
        key = (function, tuple(map(_exact, args)), named, tuple(shape), dtype)
        with _LOCK:
            found = _KNOWN.get(key)
            if found is None:
                found = super().__new__(cls)
                fields = {"function": function, "args": args, "kwargs": kwargs, "shape": tuple(shape), "dtype": dtype}
                for name, value in (fields | {"_leaves": None}).items():
                    object.__setattr__(found, name, value)
                _KNOWN[key] = found
        return found

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"an Apply never changes: {name}")

    def __repr__(self) -> str:
        return f"Apply({self.function!r}, {len(self.args) + len(self.kwargs)} arguments, {self.shape}, {self.dtype})"

    def __copy__(self) -> Apply:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Apply:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """As a flat table: pickle would recurse through a deep expression."""
        rows = operands_first(self)
        places = {part: Place(i) for i, part in enumerate(rows)}
        found = places.__getitem__
        table = [
            (r.function, _mapped(r.args, found), tuple((k, _mapped(v, found)) for k, v in r.kwargs), r.shape, r.dtype)
            for r in rows
        ]
        return _from_table, (table,)


_KNOWN: WeakValueDictionary[Any, Apply] = WeakValueDictionary()
_LOCK = Lock()


@dataclass(frozen=True, slots=True)
class Sequence:
    """A list, tuple or slice inside the arguments of an `Apply`, in a form that can be hashed."""

    kind: type
    items: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """The result of another row of a table, or of a program, by its number."""

    number: int


def freeze(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return Sequence(list if isinstance(value, list) else tuple, tuple(map(freeze, value)))
    if isinstance(value, slice):
        return Sequence(slice, tuple(map(freeze, (value.start, value.stop, value.step))))
    return value


def thaw(value: Any, known: Callable[[Any], Any]) -> Any:
    """A frozen argument as it was, `Attr`, `Apply` and `Place` in it as `known` has them."""
    if isinstance(value, Sequence):
        items = [thaw(v, known) for v in value.items]
        return slice(*items) if value.kind is slice else value.kind(items)
    return known(value) if isinstance(value, (Attr, Apply, Place)) else value


def _exact(value: Any) -> Any:
    """What tells an argument from every other: 1, 1.0 and True are equal, 0.0 and -0.0 too, but do not act alike."""
    if isinstance(value, Sequence):
        return value.kind, tuple(map(_exact, value.items))
    if isinstance(value, Apply):
        return Apply, id(value)  # which lives as long as what is made of it
    return type(value), value.hex() if isinstance(value, float) else repr(value) if type(value) is complex else value


def _mapped(value: Any, replace: Callable[[Apply], Any]) -> Any:
    """An argument with each `Apply` in it replaced; a plain tuple is one of arguments."""
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_mapped(v, replace) for v in value)
    if isinstance(value, Sequence):
        return Sequence(value.kind, _mapped(value.items, replace))
    return replace(value) if isinstance(value, Apply) else value


def rebuilt(const: Apply, replace: Callable[[Apply], Any]) -> Apply:
    """`const` with each of its operands that is an `Apply` replaced."""
    kwargs = tuple((k, _mapped(v, replace)) for k, v in const.kwargs)
    return Apply(const.function, _mapped(const.args, replace), kwargs, const.shape, const.dtype)


def _from_table(table: list[Any]) -> Apply:
    rows: list[Apply] = []

    def put(value: Any) -> Any:
        if isinstance(value, Place):
            return rows[value.number]
        if isinstance(value, Sequence):
            return Sequence(value.kind, tuple(map(put, value.items)))
        return value

    for function, args, kwargs, shape, dtype in table:
        rows.append(Apply(function, tuple(map(put, args)), tuple((k, put(v)) for k, v in kwargs), shape, dtype))
    return rows[-1]


def parts(value: Any) -> Iterator[Attr | Apply]:
    """The constants in a frozen argument, left to right, repeats included."""
    if isinstance(value, (Attr, Apply)):
        yield value
    elif isinstance(value, Sequence):
        for item in value.items:
            yield from parts(item)


def operands(const: Apply) -> Iterator[Attr | Apply]:
    """The constants among the arguments of `const`, left to right, repeats included."""
    for value in (*const.args, *(v for _, v in const.kwargs)):
        yield from parts(value)


def operands_first(*consts: Any) -> list[Apply]:
    """Every `Apply` in `consts` and below, each once and after its operands."""
    order: dict[Apply, None] = {}
    todo: list[tuple[Apply, Iterator[Attr | Apply]]] = []
    begun = set[Apply]()

    def begin(values: Iterable[Attr | Apply]) -> bool:
        fresh = next((v for v in values if isinstance(v, Apply) and v not in begun), None)
        if fresh is not None:
            begun.add(fresh)
            todo.append((fresh, operands(fresh)))
        return fresh is not None

    tops = [v for c in consts for v in parts(c)]
    while begin(tops):
        while todo:
            const, rest = todo[-1]
            if not begin(rest):
                order[const] = None
                todo.pop()
    return list(order)


def leaves(const: Any) -> tuple[Attr, ...]:
    """Every `Attr` in `const` and below, left to right, each once."""
    if isinstance(const, Apply) and const._leaves is not None:
        return const._leaves
    found: dict[Attr, None] = {}
    seen, todo = set[Apply](), list(parts(const))[::-1]
    while todo:
        part = todo.pop()
        if isinstance(part, Attr) or part._leaves is not None:
            found.update(dict.fromkeys(leaves(part) if isinstance(part, Apply) else (part,)))
        elif part not in seen:
            seen.add(part)
            todo += list(operands(part))[::-1]
    if isinstance(const, Apply):
        object.__setattr__(const, "_leaves", tuple(found))
    return tuple(found)
