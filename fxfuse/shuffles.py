"""view -> transpose -> view, the channel shuffle as ShuffleNet writes it, made one operation on the channels.

x.view(B, g, C // g, H, W).transpose(1, 2).reshape(B, C, H, W) is channel_shuffle(x, g) (Zhang et al. 2018, 3.1).
That it is one follows from sizes that are equal for every input. As one operation it is a permutation of channels,
which a neighbouring layer takes into its weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from . import algebra
from .call import Call
from .dims import Dims, asks, order_of
from .names import plain
from .pattern import Selection
from .record import pointwise, shuffled
from .refusal import Refusal

if TYPE_CHECKING:
    from .view import View

_OPENS, _CLOSES = ("reshape", "unflatten"), ("reshape", "flatten")


@dataclass(frozen=True)
class Shuffle:
    """A shuffle of `channels` channels in `groups` groups: its input, and its nodes in order."""

    source: Node
    nodes: tuple[Node, ...]
    groups: int
    channels: int
    spatial: int


def candidates(shapings: Mapping[Node, Call]) -> list[Node]:
    """Transposes between two reshapes."""
    found = []
    for node, call in shapings.items():
        before = call.args.get("input") if call.op in ("transpose", "permute") else None
        if isinstance(before, Node) and before in shapings and shapings[before].op in _OPENS:
            found.append(node)
    return found


def find_shuffles(turns: Iterable[Node], shapings: Mapping[Node, Call], dims: Dims) -> tuple[Shuffle, ...]:
    """The shuffles among the `candidates` of a graph, those whose values between nobody else reads."""
    found = [_read(node, shapings, dims) for node in turns]
    return tuple(s for s in found if s is not None)


def _read(turn: Node, shapings: Mapping[Node, Call], dims: Dims) -> Shuffle | None:
    first = shapings[turn].args["input"]
    nodes, last = [first, turn], turn
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
    if order_of(shapings[turn], len(opened)) != swap:
        return None
    return Shuffle(source, tuple(nodes), groups.factor, x[1].factor, len(x) - 2)


def use_shuffles(view: View, patterns: Selection) -> bool:
    """Write those shuffles as one operation that a layer before or after them can take; whether there were any.

    The captured graph is changed, before the plan.
    """
    graph, done = view.captured.graph, False
    for shuffle in view.shuffles:
        at = [view.effects.position[n] for n in shuffle.nodes]
        written = view.effects.written_between(shuffle.source, at[0], at[-1], shuffle.nodes)
        if written is not None or not _taken(shuffle, view, patterns):
            continue
        last, done = shuffle.nodes[-1], True
        with graph.inserting_before(last):
            new = graph.call_function(torch.channel_shuffle, (shuffle.source, shuffle.groups))
        new.meta = {k: last.meta[k] for k in ("nn_module_stack", "stack_trace") if k in last.meta}
        last.replace_all_uses_with(new)
        for node in reversed(shuffle.nodes):
            graph.erase_node(node)
    for node in reversed(graph.nodes) if done else ():  # sizes that were asked for them alone
        if not node.users and asks(node):
            graph.erase_node(node)
    return done


def _taken(shuffle: Shuffle, view: View, patterns: Selection) -> bool:
    """Whether the layer before, read by nobody else, or the only one after can take the permutation."""
    reads = shuffled(shuffle.channels, shuffle.groups)
    op = pointwise("select", "select", shuffle.spatial, shuffle.channels, reads=reads)
    node, reader, following = shuffle.source, shuffle.nodes[0], view.readers(shuffle.nodes[-1])
    after = view.affine.get(following[0]) if len(following) == 1 else None
    pairs = []
    while (before := view.affine.get(node)) is not None and before.kind == "unary" and view.readers(node) == [reader]:
        pairs.append((before.op, op))
        if before.op.kind not in ("scale", "identity", "select"):
            break
        reader, node = node, before.inputs[0][0]
    if after is not None and after.kind == "unary":
        pairs.append((op, after.op))
    for f, g in pairs:
        both = patterns.combine("chain", f, g) if f.weighted or g.weighted else None
        if both is not None and not isinstance(both, Refusal) and not isinstance(algebra.finish(both), Refusal):
            return True
    return False
