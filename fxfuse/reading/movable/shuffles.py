"""view -> transpose -> view, the channel shuffle as ShuffleNet writes it, made one operation on the channels.

x.view(B, g, C // g, H, W).transpose(1, 2).reshape(B, C, H, W) is channel_shuffle(x, g) (Zhang et al. 2018, 3.1).
That it is one follows from sizes that are equal for every input. As one operation it is a permutation of channels,
which a neighbouring layer takes into its weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch.fx import Node

from fxfuse.algebra.operator import shuffled
from fxfuse.facts.sizes import Dims, order_of
from fxfuse.names import plain
from fxfuse.ops.call import Call
from fxfuse.reading.movable.permutation import Permutation
from fxfuse.reading.nodes import Nodes

_OPENS, _CLOSES = ("reshape", "unflatten"), ("reshape", "flatten")


class Shuffle(NamedTuple):
    """A shuffle of the channels in `groups` groups, as a permutation of several nodes."""

    permutation: Permutation
    groups: int


def candidates(shapings: Mapping[Node, Call]) -> list[Node]:
    """Transposes behind a reshape."""
    found = []
    for node, call in shapings.items():
        before = call.args.get("input") if call.op in ("transpose", "permute") else None
        if isinstance(before, Node) and before in shapings and shapings[before].op in _OPENS:
            found.append(node)
    return found


def find_shuffles(nodes: Nodes) -> Iterator[Shuffle]:
    """The shuffles of a graph, those whose values between nobody else reads."""
    for node in candidates(nodes.shapings):
        if (found := _read(node, nodes.shapings, nodes.dims)) is not None:
            yield found


def _read(transpose: Node, shapings: Mapping[Node, Call], dims: Dims) -> Shuffle | None:
    first = shapings[transpose].args["input"]
    nodes, last = [first, transpose], transpose
    while len(last.users) == 1 and len(first.users) == 1:
        last = next(iter(last.users))
        nodes.append(last)
        call = shapings.get(last)
        if call is not None and call.op in _CLOSES and call.args["input"] is nodes[-2]:
            break
        if plain(last.target) not in ("contiguous", "clone") or last.op == "call_module" or len(last.args) != 1:
            return None
        if last.kwargs.get("memory_format") not in (None, torch.contiguous_format):
            return None
    else:
        return None
    source = shapings[first].args["input"]
    x, opened, closed = (dims.of(n) for n in (source, first, last))
    if x is None or opened is None or closed is None or len(x) < 3 or len(opened) != len(x) + 1:
        return None
    groups, inner = opened[1], opened[2]
    swap = (0, 2, 1, *range(3, len(opened)))
    whole = closed == x and opened[0] == x[0] and opened[3:] == x[2:] and groups * inner == x[1]
    if not whole or x[1].unknowns or groups.factor < 2 or inner.factor < 2:
        return None
    if order_of(shapings[transpose], len(opened)) != swap:
        return None
    reads = shuffled(x[1].factor, groups.factor)
    return Shuffle(Permutation(tuple(nodes), source, reads, len(x) - 2, plain=False), groups.factor)
