"""`x[:, self.order]`: channels taken by a constant tensor of indices, which a layer takes where it would take a list.

What such a tensor holds decides the plan, where other weights only decide numbers. So the graph it is written into
notes what it held (`Captured.held`), and whoever gives that graph new weights compares first.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from fxfuse.algebra.constants import Apply, Attr, Values, evaluate, leaves, model_values
from fxfuse.cost import CostFunction
from fxfuse.graph_edits import Edit, Editor
from fxfuse.names import is_aten, plain
from fxfuse.ops.index_lists import Pick, index_of, pick
from fxfuse.pattern import Selection
from fxfuse.reading.affine import Unknown, axis_layout
from fxfuse.reading.view import View
from fxfuse.rearranging.permutation_passing import Permutation
from fxfuse.rearranging.permutation_routes import Route, Routes

LONGEST = 1 << 14  # channels that are worth being read
Held = tuple[int, ...]


class Indexed(NamedTuple):
    """A selection by a constant tensor, what that is, and the entries it holds."""

    permutation: Permutation
    axis: int
    const: Attr | Apply
    entries: Held


def write_indices(view: View, patterns: Selection, price: CostFunction) -> Iterator[Edit]:
    """Those tensors to be written as lists, which a layer takes."""
    routes = Routes(view, patterns, price)
    for found in indexed(view):
        if isinstance(routes.find(found.permutation), Route):
            old = found.permutation.last
            yield Edit(frozenset((found.permutation.source, old, *old.users)), partial(_write, view, found))


def _write(view: View, found: Indexed, editor: Editor) -> None:
    old, index = found.permutation.last, index_of(found.axis, found.entries)
    new = editor.call(old, operator.getitem, (found.permutation.source, index), old, old)
    editor.replace(old, new, view.constants)
    view.captured.held[found.const] = found.entries


def indexed(view: View) -> Iterator[Indexed]:
    """All selections of channels by constant tensors of indices."""
    captured = view.captured
    values = model_values(captured.root, captured.constants)
    for node in captured.graph.nodes:
        read = None if node in view.constants else _read(node, view)
        if read is None:
            continue
        source, axis, const, signed = read
        entries = held(const, values)
        try:
            spatial, assumes = axis_layout(view.facts[source], axis)
        except Unknown:
            continue
        channels = view.facts[source].channels(spatial)
        reads = None if channels is None else Pick(axis, entries).reads(channels)
        if channels is not None and reads and spatial >= 0 and (signed or min(entries) >= 0):
            yield Indexed(Permutation((node,), source, reads, spatial, assumes, channels), axis, const, entries)


def held(const: Attr | Apply, values: Values) -> Held:
    """What a tensor of indices holds."""
    with torch.no_grad():
        return tuple(int(i) for i in evaluate(const, values).tolist())


def changed(known: Mapping[Attr | Apply, Held], values: Values) -> str | None:
    """A tensor that no longer holds what is known of it, by its path; None if there is none."""
    other = (c for c, entries in known.items() if held(c, values) != entries)
    const = next(other, None)
    return None if const is None else ", ".join(a.path for a in leaves(const))


def _read(node: Node, view: View) -> tuple[Node, int, Attr | Apply, bool] | None:
    """The tensor indexed, the axis, the constant that indexes it, and whether that may count from the end."""
    call, index = view.calls.get(node), None
    if call is not None and call.op == "index_select":
        index, signed = (call.args["dim"], call.args["index"]), False
    elif call is not None and call.op == "getitem" and isinstance(call.args["index"], tuple):
        index, signed = _only(call.args["index"], view), True
    elif is_aten(node) and plain(node.target) == "index" and len(node.args) == 2:
        items: Any = node.args[1]
        index, signed = _only(tuple(slice(None) if i is None else i for i in items), view), True
    source = node.args[0] if node.args else None
    if index is None or not isinstance(source, Node):
        return None
    axis, const = index
    plain_index = isinstance(const, (Attr, Apply)) and const.dtype in (torch.int64, torch.int32)
    if not plain_index or len(const.shape) != 1 or not 0 < const.shape[0] <= LONGEST or not isinstance(axis, int):
        return None
    return source, axis, const, signed


def _only(index: tuple[Any, ...], view: View) -> tuple[int, Any] | None:
    """The axis that one constant indexes while all others are whole, and the constant."""
    constants = [view.constants[i] for i in index if isinstance(i, Node) and i in view.constants]
    picked = pick(tuple([0] if isinstance(i, Node) else i for i in index))  # any list stands for a tensor
    return (picked.axis, constants[0]) if picked is not None and len(constants) == 1 else None
