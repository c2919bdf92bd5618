"""The ways of a factor to a layer that could absorb it: what lies on them, and factors that several layers share.

A factor moves up to the layer before it, where nobody else reads what lies between; or down to the layers after
it, where every reader down there absorbs a copy (`k(norm(x)), v(norm(x))`). Both are one pass over the graph that
notes for each value the axes along which a factor could move. After a join it moves up into every branch: its
channels of a concatenation into each, its factor into each summand and its shift into the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

from torch.fx import Node

from fxfuse.algebra.operator import Operator
from fxfuse.reading.affine import Affine
from fxfuse.reading.nodes import Nodes
from fxfuse.reading.runs import after

ANY = 0  # in a set of axes: what is the same on every channel passes
Axes = frozenset[int]


@dataclass(frozen=True)
class SplitFactors:
    """Factors in a row after a join, and by the last node of each branch its share of each of them.

    With `before`: factors before a join, and what the layer after it takes of them, to stand in front of that.
    """

    factors: tuple[Node, ...]
    shares: dict[Node, tuple[Operator, ...]]
    before: bool = False


def find_ways(
    steps: Mapping[Node, Affine], readers: Callable[[Node], list[Node]]
) -> tuple[set[Node], dict[Node, frozenset[Node]]]:
    """What commutes and lies on some factor's way; and for a factor that several layers share all nodes on its ways.

    `steps` are the nodes of one input, commuting ones among them, in execution order; `readers` read data.
    """
    read = {n: readers(n) for n in steps}
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
            while len(read[node]) == 1 and (node := read[node][0]) in steps and steps[node].op.kind == "carry":
                on_ways.add(node)  # it may undo what came before
        elif axis in down[affine.op.bias][node]:
            tree = _tree(node, steps, read)
            seen |= tree
            on_ways |= tree
            while source in steps and steps[source].op.kind == "carry" and len(read[source]) == 1:
                on_ways.add(source)
                source = steps[source].inputs[0][0]
            if any(len(read[n]) > 1 for n in tree):
                trees[node] = tree
    return {n for n in on_ways if steps[n].op.kind == "carry"}, trees


def factors_after(node: Node, nodes: Nodes) -> list[Node]:
    """The factors after a node, each read by the next alone."""
    run = takewhile(lambda s: s[1].op.kind == "scale", after(node, nodes.affine, nodes.readers))
    return [factor for factor, _ in run]


@dataclass(frozen=True, slots=True)
class _End:
    """The last node of a branch, its run of channels in the whole, and whether it takes the shift."""

    node: Node
    start: int
    width: int
    shift: bool


@dataclass(frozen=True)
class _Joins:
    """Joins taken apart."""

    nodes: Nodes

    def ends(self, join: Node, spatial: int | None, start: int, shift: bool) -> list[_End]:
        """What meets in a join, joins in it opened where possible; nothing where a branch has another reader."""
        affine, found = self.nodes.affine[join], list[_End]()
        if affine.kind == "concat" and spatial not in (None, affine.spatial):
            return []
        widths = [self.widths.get(node) for node, _ in affine.inputs]
        if affine.kind == "sum" and len(set(widths)) > 1:
            return []  # one that broadcasts
        for (node, _), width in zip(affine.inputs, widths, strict=True):
            if self.nodes.readers(node) != [join] or width is None:
                return []
            inner = self.nodes.affine.get(node)
            opened = self.ends(node, spatial, start, shift) if inner is not None and inner.kind != "unary" else []
            found += opened or [_End(node, start, width, shift)]
            start, shift = (start + width, shift) if affine.kind == "concat" else (start, False)
        return found if len({e.node for e in found}) == len(found) else []

    @cached_property
    def widths(self) -> dict[Node, int | None]:
        """Channels of what comes from layers: of one, of all that are summed, of those side by side together."""
        found = dict[Node, int | None]()
        for node, step in self.nodes.affine.items():  # in execution order
            parts = [found.get(source) for source, _ in step.inputs]
            known = [w for w in parts if w is not None]
            if step.kind == "unary":
                passing = parts[0] if step.op.kind in ("scale", "identity") else None
                found[node] = step.op.out_channels if step.op.weighted else passing
            elif step.kind == "concat":
                found[node] = sum(known) if len(known) == len(parts) else None
            else:
                found[node] = known[0] if len(set(known)) == 1 else None
        return found


def after_joins(nodes: Nodes) -> dict[Node, SplitFactors]:
    """By the first of them: factors that alone read a join of branches that nobody else reads."""
    found, joins = {}, _Joins(nodes)
    for node, join in nodes.affine.items():
        factors = factors_after(node, nodes) if join.kind != "unary" else []
        ops = [nodes.affine[f].op for f in factors]
        spatial = next((o.spatial for o in ops if o.spatial is not None), None)
        ends = joins.ends(node, spatial, 0, True) if factors else []
        whole = max((e.start + e.width for e in ends), default=0)
        if ends and all(o.spatial is None or (o.spatial, o.out_channels) == (spatial, whole) for o in ops):
            found[factors[0]] = SplitFactors(tuple(factors), {e.node: tuple(_share(o, e) for o in ops) for e in ends})
    return found


def _share(op: Operator, end: _End) -> Operator:
    """A run of the channels of a factor, with or without its shift."""
    rows = None if op.spatial is None else (end.start, end.start + end.width)
    consts, bias = (("rows", rows),), op.bias and end.shift
    return op.on_layout(op.spatial, end.width, law="portion", operands=(op,), consts=consts, bias=bias)


def passes(op: Operator) -> bool:
    """Whether a factor and shift a channel can move past `op`: its weights sum to one, or it is such a one itself."""
    return op.kind in ("scale", "identity", "carry") or (op.kind == "pool" and not op.pads)


def axes_of(op: Operator) -> dict[int, int] | None:
    """For each axis of a carry's output the axis of its input; None where all stay."""
    pairs = op.const("axes") if op.kind == "carry" else None
    return None if pairs is None else dict(pairs)


def _axis(op: Operator) -> int:
    return ANY if op.spatial is None else -op.spatial - 1


def _upward(steps: Mapping[Node, Affine], read: Mapping[Node, list[Node]]) -> dict[Node, Axes]:
    """Axes of each value along which a factor on it could move up into a layer."""
    up: dict[Node, Axes] = {}
    for node, affine in steps.items():
        op, source = affine.op, affine.inputs[0][0]
        if op.weighted:
            up[node] = frozenset((_axis(op), ANY))
        elif passes(op) and source in up and read[source] == [node]:
            here, axes = up[source], axes_of(op)
            if axes is not None:
                here = frozenset(o for o, i in axes.items() if i in here) | (here & {ANY})
            up[node] = here & {_axis(op), ANY} if _axis(op) != ANY else here
    return up


def _downward(steps: Mapping[Node, Affine], read: Mapping[Node, list[Node]], shift: bool) -> dict[Node, Axes]:
    """Axes of each value along which every reader would absorb a factor, with or without a shift."""
    down: dict[Node, Axes] = {}
    for node in reversed(list(steps)):
        accepted = [_accepted(node, r, steps, down, shift) for r in read[node]]
        down[node] = frozenset.intersection(*accepted) if accepted else frozenset()
    return down


def _accepted(node: Node, reader: Node, steps: Mapping[Node, Affine], down: Mapping[Node, Axes], shift: bool) -> Axes:
    affine = steps.get(reader)
    if affine is None or affine.inputs[0][0] is not node:
        return frozenset()
    op = affine.op
    if op.weighted:
        border = op.pads and op.padding_mode == "zeros" and (shift or op.pad_value != 0)  # it would change with them
        return frozenset() if border or op.transposed else frozenset((_axis(op), ANY))
    if not passes(op):
        return frozenset()
    here, axes = down[reader], axes_of(op)
    if axes is not None:
        here = frozenset(i for o, i in axes.items() if o in here) | (here & {ANY})
    return here & {_axis(op), ANY} if _axis(op) != ANY else here


def _tree(root: Node, steps: Mapping[Node, Affine], read: Mapping[Node, list[Node]]) -> frozenset[Node]:
    """Everything between a factor and the layers that absorb it, the factor included."""
    found, todo = set[Node](), [root]
    while todo:
        node = todo.pop()
        if node not in found and not steps[node].op.weighted:
            found.add(node)
            todo += read[node]
    return frozenset(found)
