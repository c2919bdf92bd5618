"""`x[:, self.order]`: channels taken by a constant tensor of indices, which a layer takes where it would take a list.

What such a tensor holds decides the plan, where other weights only decide numbers. So the graph it is written into
notes what it held (`Captured.held`), and whoever gives that graph new weights compares first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from fxfuse.algebra.constants import Apply, Attr, Held, held, model_values
from fxfuse.names import is_aten, plain
from fxfuse.ops.index_lists import Pick, pick
from fxfuse.reading.affine import Unknown, axis_layout
from fxfuse.reading.movable.permutation import Permutation
from fxfuse.reading.nodes import Nodes

LONGEST = 1 << 14  # channels that are worth being read


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
        read = None if node in nodes.constants else _read(node, nodes)
        if read is None:
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
