"""Arguments of a call as the readers need them, and what a reader returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxfuse.algebra.constants import Apply, Attr
from fxfuse.algebra.operator import IDENTITY, Operator
from fxfuse.facts.fact import Fact
from fxfuse.ops.call import Call
from fxfuse.ops.movement import ints_of

PASS_EXAMPLES = "pass example_inputs to optimize, they settle the rank"


@dataclass(frozen=True, slots=True)
class Affine:
    """An affine node: `inputs` are (tensor, coefficient); `op` is the operator of a unary one.

    `kind` is "unary", "sum" or "concat"; `spatial` is the layout a concatenation fixes. `assumes`
    is a rank taken for granted (a batch dim before the channels), to be guarded where the node is
    fused; so is `width`, a number of channels that only the examples have. `extra` are nodes that go with
    it: the slice assignments of a border fill.
    """

    kind: str
    inputs: tuple[tuple[Node, float], ...]
    op: Operator = IDENTITY
    spatial: int | None = None
    assumes: int | None = None
    width: int | None = None
    extra: tuple[Node, ...] = ()


class Unknown(Exception):
    """An argument is not known before the model runs: the node stays opaque."""


def data(call: Call) -> Node:
    value = call.args["input"]
    if not isinstance(value, Node):
        raise Unknown
    return value


def tensor(call: Call, name: str, dims: int | None = None) -> Attr | Apply:
    value = call.args[name]
    if not isinstance(value, (Attr, Apply)) or (dims is not None and len(value.shape) != dims):
        raise Unknown
    return value


def optional(call: Call, name: str) -> Attr | Apply | None:
    return None if call.args[name] is None else tensor(call, name, 1)


def ints(value: Any, count: int) -> tuple[int, ...]:
    items = ints_of(value) or ()
    items = items * count if len(items) == 1 else items
    if len(items) != count:
        raise Unknown
    return items


def one_dtype(*consts: Attr | Apply | None) -> torch.dtype:
    dtypes = {c.dtype for c in consts if c is not None}
    if len(dtypes) != 1 or not all(d.is_floating_point or d.is_complex for d in dtypes):
        raise Unknown
    return dtypes.pop()


def unary(source: Node, op: Operator, assumes: int | None = None, width: int | None = None) -> Affine:
    return Affine("unary", ((source, 1.0),), op, assumes=assumes, width=width)


def wide_axes(const: Attr | Apply) -> list[int]:
    """The axes, from the end, along which a constant may vary."""
    return [i - len(const.shape) for i, n in enumerate(const.shape) if n != 1]


def layout(fact: Fact, spatial: int | None = None) -> tuple[int | None, int | None]:
    """(spatial dims, assumed rank) of a tensor whose channels are axis 1 of a batch.

    Between two and three or more trailing dims a conv has left no doubt but the batch dim itself,
    which is then assumed and guarded; with fewer the alternatives are all common, so no guess.
    """
    if fact.rank is not None:
        return (fact.rank - 2, fact.taken) if fact.rank >= 2 else (None, None)
    return (None, None) if fact.likely is None else (fact.likely - 2, fact.likely)


def axis_layout(fact: Fact, dim: Any) -> tuple[int, int | None]:
    """(spatial dims, assumed rank) if `dim` is to be the channel axis."""
    axis, assumes = fact.axis(dim), None
    if axis is not None and dim >= 0:
        assumes = fact.taken
    if axis is None and dim == 1:
        spatial, assumes = layout(fact)
        axis = None if spatial is None else -spatial - 1
    if axis is None:
        raise Unknown
    return -axis - 1, assumes
