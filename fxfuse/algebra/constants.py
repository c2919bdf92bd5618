"""Constants of a model as small expression trees that can be evaluated on any set of weights.

A `Const` is a Python number, an `Attr` (a parameter or buffer by its path) or an `Apply` (a pure
function of other constants). Structure (shape, dtype) is known without looking at a value, and
the tree is evaluated again whenever the weights change: that is what keeps a plan replayable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.attributes import attribute
from fxfuse.names import operator_named


@dataclass(frozen=True, slots=True)
class Attr:
    """A parameter, buffer or tensor attribute of the model."""

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Apply:
    """`function(*args, **kwargs)`; a string is the name of a tensor method, or of an operator (`aten::add.Tensor`)."""

    function: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


Const = Attr | Apply | int | float | complex
Values = Callable[[Attr], Tensor]
Held = tuple[Any, ...]  # what a constant tensor holds, where the graph depends on it


@dataclass(frozen=True, slots=True)
class Sequence:
    """A list, tuple or slice inside the arguments of an `Apply`, in a form that can be hashed."""

    kind: type
    items: tuple[Any, ...]


def freeze(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return Sequence(list if isinstance(value, list) else tuple, tuple(map(freeze, value)))
    if isinstance(value, slice):
        return Sequence(slice, tuple(map(freeze, (value.start, value.stop, value.step))))
    return value


def evaluate(const: Any, values: Values) -> Any:
    """The tensor (or number) behind `const`, leaves looked up in `values`."""
    if isinstance(const, Attr):
        return values(const)
    if isinstance(const, Sequence):
        items = [evaluate(v, values) for v in const.items]
        return slice(*items) if const.kind is slice else const.kind(items)
    if isinstance(const, Apply):
        args = [evaluate(a, values) for a in const.args]
        kwargs = {k: evaluate(v, values) for k, v in const.kwargs}
        if isinstance(const.function, str):
            operator = operator_named(const.function) if "::" in const.function else None
            return operator(*args, **kwargs) if operator else getattr(args[0], const.function)(*args[1:], **kwargs)
        return const.function(*args, **kwargs)
    return const


def held(const: Attr | Apply, values: Values) -> Held:
    """What a constant tensor holds."""
    with torch.no_grad():
        return tuple(evaluate(const, values).flatten().tolist())


def changed(known: Mapping[Attr | Apply, Held], values: Values) -> str | None:
    """A tensor of indices that no longer holds what is `known` of it, by its path; None if there is none.

    Where what it holds decided a plan, whoever brings new weights compares first.
    """
    const = next((c for c, entries in known.items() if held(c, values) != entries), None)
    return None if const is None else ", ".join(a.path for a in leaves(const))


def leaves(const: Any) -> list[Attr]:
    """Every `Attr` below `const`, left to right, repeats included."""
    if isinstance(const, Attr):
        return [const]
    if isinstance(const, Sequence):
        return [a for v in const.items for a in leaves(v)]
    if isinstance(const, Apply):
        return [a for v in (*const.args, *(v for _, v in const.kwargs)) for a in leaves(v)]
    return []


def model_values(model: nn.Module, extra: Mapping[str, Tensor]) -> Values:
    """Leaves as the tensors `model` holds now; `extra` holds those that only a trace knows."""

    def lookup(attr: Attr) -> Tensor:
        if attr.path in extra:
            return extra[attr.path]
        tensor: Tensor = attribute(model, attr.path)
        return tensor.detach()

    return lookup
