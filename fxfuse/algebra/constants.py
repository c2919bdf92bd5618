"""Constants of a model as small expressions that can be evaluated on any set of weights.

A `Const` is a Python number, an `Attr` (a parameter or buffer by its path) or an `Apply` (a pure
function of other constants). Structure (shape, dtype) is known without looking at a value, and
the expression is evaluated again whenever the weights change: that is what keeps a plan replayable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.algebra.expressions import (
    Apply,
    Attr,
    Place,
    Sequence,
    freeze,
    leaves,
    operands,
    operands_first,
    parts,
    thaw,
)
from fxfuse.attributes import attribute, owner_of
from fxfuse.names import operator_named

__all__ = ["Apply", "Attr", "Place", "Sequence", "freeze", "leaves", "operands_first", "parts", "thaw"]

CPU = torch.device("cpu")


Const = Attr | Apply | int | float | complex
Values = Callable[[Attr], Tensor]
Held = tuple[Any, ...]  # what a constant tensor holds, where the graph depends on it


def call(function: Callable[..., Any] | str, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """What an `Apply` of `function` stands for."""
    if not isinstance(function, str):
        return function(*args, **kwargs)
    if "::" in function:
        return operator_named(function)(*args, **kwargs)
    return getattr(args[0], function)(*args[1:], **kwargs)


def evaluate(const: Any, values: Values) -> Any:
    """The tensor (or number) behind `const`, leaves looked up in `values`.

    Each part is computed once, and forgotten after its last reader. All is computed on one device: that of the first
    leaf which is not on the CPU, if there is one: where a model moves a constant elsewhere, nothing is left of that.
    """
    if isinstance(const, Attr):
        return values(const)
    if not isinstance(const, (Apply, Sequence)):
        return const
    order = operands_first(const)
    tensors = {leaf: values(leaf) for leaf in leaves(const)}
    home = next((t.device for t in tensors.values() if t.device != CPU), None)
    readers = Counter(o for part in order for o in set(operands(part)))
    known: dict[Attr | Apply, Any] = {a: t if home is None else t.to(home) for a, t in tensors.items()}
    for part in order:
        args = [thaw(a, known.__getitem__) for a in part.args]
        result = call(part.function, args, {k: thaw(v, known.__getitem__) for k, v in part.kwargs})
        below = set(operands(part))
        away = home is not None and not below and isinstance(result, Tensor)  # it was made of numbers
        known[part] = result.to(home) if away else result
        readers.subtract(below)
        for operand in below:
            if not readers[operand] and isinstance(operand, Apply):
                del known[operand]
    return thaw(const, known.__getitem__)


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


def model_values(model: nn.Module, extra: Mapping[str, Tensor]) -> Values:
    """Leaves as the tensors `model` holds now; `extra` holds those that only a trace knows.

    A tensor that `Module.to` does not move is given on the device of the parameters and buffers, if they share
    one: where a forward can read both, it moves the one itself.
    """
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    home = devices.pop() if len(devices) == 1 else None

    def lookup(attr: Attr) -> Tensor:
        moves = False
        if attr.path in extra:
            tensor = extra[attr.path]
        else:
            tensor = attribute(model, attr.path).detach()
            owner, name = owner_of(model, attr.path)
            moves = name in owner._parameters or name in owner._buffers
        return tensor if moves or home is None else tensor.to(home)

    return lookup
