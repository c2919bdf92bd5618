"""The ways of a factor to a layer that could absorb it: what lies on them, and factors that several layers share.

A factor moves up to the layer before it, where nobody else reads what lies between; or down to the layers after
it, where every reader down there absorbs a copy (`k(norm(x)), v(norm(x))`). Both are one pass over the graph that
notes for each value the axes along which a factor could move.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from fxfuse.algebra.operator import Operator
from fxfuse.reading.affine import Affine
from fxfuse.reading.nodes import Nodes

ANY = 0  # in a set of axes: what is the same on every channel passes
Axes = frozenset[int]


def find_ways(steps: Mapping[Node, Affine], nodes: Nodes) -> tuple[set[Node], dict[Node, frozenset[Node]]]:
    """What commutes and lies on some factor's way; and for a factor that several layers share all nodes on its ways.

    `steps` are those of `nodes` with one input, commuting ones among them, in execution order.
    """
    read = {n: nodes.readers(n) for n in steps}
    up, down = _upward(steps, read), {shift: _downward(steps, read, shift) for shift in (False, True)}
    on_ways, trees, seen = set[Node](), dict[Node, frozenset[Node]](), set[Node]()
    for node, affine in steps.items():
        if affine.op.kind != "scale" or node in seen:
            continue
        axis, source = _axis(affine.op), affine.inputs[0][0]
        if axis in up.get(source, ()) and read[source] == [node]:
            while source in steps and not steps[source].op.weighted and source not in seen:
                seen.add(source)
                on_ways.add(source)
                source = steps[source].inputs[0][0]
            while len(read[node]) == 1 and (node := read[node][0]) in steps and steps[node].op.kind == "commuting":
                on_ways.add(node)  # it may undo what came before
        elif axis in down[affine.op.bias][node]:
            tree = _tree(node, steps, read)
            seen |= tree
            on_ways |= tree
            while source in steps and steps[source].op.kind == "commuting" and len(read[source]) == 1:
                on_ways.add(source)
                source = steps[source].inputs[0][0]
            if any(len(read[n]) > 1 for n in tree):
                trees[node] = tree
    return {n for n in on_ways if steps[n].op.kind == "commuting"}, trees


def passes(op: Operator) -> bool:
    """Whether a factor and shift a channel can move past `op`: its weights sum to one, or it is such a one itself."""
    return op.kind in ("scale", "identity", "commuting") or (op.kind == "pool" and not op.pads)


def _axis(op: Operator) -> int:
    return ANY if op.spatial is None else -op.spatial - 1


def axes_past(op: Operator, axes: Axes, up: bool) -> Axes:
    """The axes of what `op` gives for those of what it reads, if factors move `up` past it; else the other way."""
    pairs = op.const("axes") if op.kind == "commuting" else None
    if pairs is not None:
        axes = frozenset(o if up else i for o, i in pairs if (i if up else o) in axes) | (axes & {ANY})
    return axes & {_axis(op), ANY} if _axis(op) != ANY else axes


def _upward(steps: Mapping[Node, Affine], read: Mapping[Node, list[Node]]) -> dict[Node, Axes]:
    """Axes of each value along which a factor on it could move up into a layer."""
    up: dict[Node, Axes] = {}
    for node, affine in steps.items():
        op, source = affine.op, affine.inputs[0][0]
        if op.weighted:
            up[node] = frozenset((_axis(op), ANY))
        elif passes(op) and source in up and read[source] == [node]:
            up[node] = axes_past(op, up[source], up=True)
    return up


def _downward(steps: Mapping[Node, Affine], read: Mapping[Node, list[Node]], shift: bool) -> dict[Node, Axes]:
    """Axes of each value along which every reader would absorb a factor, with or without a shift."""
    down: dict[Node, Axes] = {}

    def accepted(node: Node, reader: Node) -> Axes:
        affine = steps.get(reader)
        if affine is None or affine.inputs[0][0] is not node:
            return frozenset()
        op = affine.op
        if op.weighted:
            # its border would change with them
            border = op.pads and op.padding_mode == "zeros" and (shift or op.pad_value != 0)
            return frozenset() if border or op.transposed else frozenset((_axis(op), ANY))
        return axes_past(op, down[reader], up=False) if passes(op) else frozenset()

    for node in reversed(list(steps)):
        found = [accepted(node, r) for r in read[node]]
        down[node] = frozenset.intersection(*found) if found else frozenset()
    return down


def _tree(root: Node, steps: Mapping[Node, Affine], read: Mapping[Node, list[Node]]) -> frozenset[Node]:
    """Everything between a factor and the layers that absorb it, the factor included."""
    found, todo = set[Node](), [root]
    while todo:
        node = todo.pop()
        if node not in found and not steps[node].op.weighted:
            found.add(node)
            todo += read[node]
    return frozenset(found)
