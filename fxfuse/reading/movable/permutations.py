"""Permutations of channels: which nodes they are, and which channels they take.

One is a list of channels. Another is view -> transpose -> view, the channel shuffle as ShuffleNet writes it:
x.view(B, g, C // g, H, W).transpose(1, 2).reshape(B, C, H, W) is channel_shuffle(x, g) (Zhang et al. 2018, 3.1).
That it is one follows from sizes that are equal for every input. As one operation it is a permutation of channels,
which a neighbouring layer takes into its weight.

A third is `x[:, self.order]`: channels taken by a constant tensor of indices, which a layer takes where it would take
a list. What such a tensor holds decides the plan, where other weights only decide numbers. So the graph it is written
into notes what it held (`Captured.held`), and whoever gives that graph new weights compares first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from fxfuse.algebra.constants import Apply, Attr, Held, held, model_values
from fxfuse.algebra.operator import Ints, shuffled
from fxfuse.facts.sizes import order_of
from fxfuse.names import is_aten, plain
from fxfuse.ops.index_lists import Pick, pick
from fxfuse.reading.affine import Affine, Unknown, axis_layout
from fxfuse.reading.nodes import Nodes

_OPENS, _CLOSES = ("reshape", "unflatten"), ("reshape", "flatten")
LONGEST = 1 << 14  # channels that are worth being read


@dataclass(frozen=True)
class Permutation:
    """The nodes of a permutation in order, what they read, and the channels they take.

    `assumes` is the rank it takes for granted, `channels` the number of those it takes from, where it takes some or
    some again. `groups` are those of a shuffle, whose several nodes are not one operation on the channels yet.
    """

    nodes: tuple[Node, ...]
    source: Node
    reads: Ints
    spatial: int
    assumes: int | None = None
    channels: int | None = None
    groups: int | None = None

    @property
    def whole(self) -> bool:
        """Whether it takes every channel once."""
        return self.channels in (None, len(self.reads)) and len(set(self.reads)) == len(self.reads)

    @property
    def last(self) -> Node:
        return self.nodes[-1]


def permutation_of(node: Node, affine: Affine) -> Permutation | None:
    """The permutation that a node is, if it is one and moves anything."""
    op, reads = affine.op, affine.op.reads
    if affine.kind != "unary" or (op.kind, op.law) != ("select", "select") or reads is None or op.spatial is None:
        return None
    every = tuple(range(op.in_channels))
    if reads == every or tuple(sorted(reads)) != every:
        return None
    return Permutation((node,), affine.inputs[0][0], reads, op.spatial, affine.assumes)


def transposes(nodes: Nodes) -> Iterator[Node]:
    """Transposes behind a reshape, each of which may be a shuffle."""
    for node, call in nodes.shapings.items():
        opening = nodes.shapings.get(call.args["input"]) if call.op in ("transpose", "permute") else None
        if opening is not None and opening.op in _OPENS:
            yield node


def find_shuffles(nodes: Nodes) -> Iterator[Permutation]:
    """The shuffles of a graph, those whose values between nobody else reads."""
    return filter(None, (_shuffle(node, nodes) for node in transposes(nodes)))


def _shuffle(transpose: Node, view: Nodes) -> Permutation | None:
    first = view.shapings[transpose].args["input"]
    nodes, last = [first, transpose], transpose
    while len(last.users) == 1 and len(first.users) == 1:
        last = next(iter(last.users))
        nodes.append(last)
        call = view.shapings.get(last)
        if call is not None and call.op in _CLOSES and call.args["input"] is nodes[-2]:
            break
        if plain(last.target) not in ("contiguous", "clone") or last.op == "call_module" or len(last.args) != 1:
            return None
        if last.kwargs.get("memory_format") not in (None, torch.contiguous_format):
            return None
    else:
        return None
    source = view.shapings[first].args["input"]
    x, opened, closed = (view.dims.of(n) for n in (source, first, last))
    if x is None or opened is None or len(x) < 3 or len(opened) != len(x) + 1:
        return None
    groups, inner = opened[1], opened[2]
    whole = closed == x and opened[0] == x[0] and opened[3:] == x[2:] and groups * inner == x[1]
    if not whole or x[1].unknowns or groups.factor < 2 or inner.factor < 2:
        return None
    if order_of(view.shapings[transpose], len(opened)) != (0, 2, 1, *range(3, len(opened))):
        return None
    reads = shuffled(x[1].factor, groups.factor)
    return Permutation(tuple(nodes), source, reads, len(x) - 2, groups=groups.factor)


class Indexed(NamedTuple):
    """A selection by a constant tensor, what that is, and the entries it holds."""

    permutation: Permutation
    axis: int
    const: Attr | Apply
    entries: Held


def indexed(nodes: Nodes) -> Iterator[Indexed]:
    """All selections of channels by constant tensors of indices."""
    captured = nodes.captured
    values = model_values(captured.root, captured.constants)
    for node in captured.graph.nodes:
        if node in nodes.constants or (read := _read(node, nodes)) is None:
            continue
        source, axis, const, signed = read
        entries = held(const, values)
        try:
            spatial, assumes = axis_layout(nodes.facts[source], axis)
        except Unknown:
            continue
        channels = nodes.facts[source].channels(spatial)
        reads = None if channels is None else Pick(axis, entries).reads(channels)
        if channels is not None and reads and spatial >= 0 and (signed or min(entries) >= 0):
            yield Indexed(Permutation((node,), source, reads, spatial, assumes, channels), axis, const, entries)


def _read(node: Node, nodes: Nodes) -> tuple[Node, int, Attr | Apply, bool] | None:
    """The tensor indexed, the axis, the constant that indexes it, and whether that may count from the end."""
    call, index = nodes.calls.get(node), None
    if call is not None and call.op == "index_select":
        index, signed = (call.args["dim"], call.args["index"]), False
    elif call is not None and call.op == "getitem" and isinstance(call.args["index"], tuple):
        index, signed = _only(call.args["index"], nodes), True
    elif is_aten(node) and plain(node.target) == "index" and len(node.args) == 2:
        items: Any = node.args[1]
        index, signed = _only(tuple(slice(None) if i is None else i for i in items), nodes), True
    source = node.args[0] if node.args else None
    if index is None or not isinstance(source, Node):
        return None
    axis, const = index
    plain_index = isinstance(const, (Attr, Apply)) and const.dtype in (torch.int64, torch.int32)
    if not plain_index or len(const.shape) != 1 or not 0 < const.shape[0] <= LONGEST or not isinstance(axis, int):
        return None
    return source, axis, const, signed


def _only(index: tuple[Any, ...], nodes: Nodes) -> tuple[int, Any] | None:
    """The axis that one constant indexes while all others are whole, and the constant."""
    constants = [nodes.constants[i] for i in index if isinstance(i, Node) and i in nodes.constants]
    picked = pick(tuple([0] if isinstance(i, Node) else i for i in index))  # any list stands for a tensor
    return (picked.axis, constants[0]) if picked is not None and len(constants) == 1 else None
