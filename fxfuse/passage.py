"""Which carries lie between a factor and a layer that could absorb it, and which factors several layers share.

A factor moves up to the layer before it, where nobody else reads what lies between; or down to the layers after
it, where every reader down there absorbs a copy (`k(norm(x)), v(norm(x))`). Both are one pass over the graph that
notes for each value the axes along which a factor could move. After a join it moves up into every branch: its
channels of a concatenation into each, its factor into each summand and its shift into the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import Node

from .arguments import Affine
from .record import Operator

ANY = 0  # in a set of axes: what is the same on every channel passes
Axes = frozenset[int]


@dataclass(frozen=True)
class Division:
    """Factors in a row after a join, and by the last node of each branch its portion of each of them."""

    factors: tuple[Node, ...]
    portions: dict[Node, tuple[Operator, ...]]


@dataclass(frozen=True)
class Passage:
    """`carries` on some factor's way; `trees`: for a factor that several layers share, all nodes on its ways.

    `divisions`: factors after a join by the first of them, and what of them goes to each branch.
    """

    carries: frozenset[Node] = frozenset()
    trees: dict[Node, frozenset[Node]] = field(default_factory=dict)
    divisions: dict[Node, Division] = field(default_factory=dict)


def find_passage(steps: Mapping[Node, Affine], readers: Callable[[Node], list[Node]]) -> Passage:
    """`steps` are the nodes of one input, carries among them, in execution order; `readers` read data."""
    read = {n: readers(n) for n in steps}
    up, down = _upward(steps, read), _downward(steps, read)
    carries, trees, seen = set[Node](), dict[Node, frozenset[Node]](), set[Node]()
    for node, affine in steps.items():
        if affine.op.kind != "scale" or node in seen:
            continue
        axis, source = _axis(affine.op), affine.inputs[0][0]
        if axis in up.get(source, ()) and read[source] == [node]:
            while source in steps and not steps[source].op.weighted and source not in seen:
                seen.add(source)
                carries |= {source} if steps[source].op.kind == "carry" else set()
                source = steps[source].inputs[0][0]
            while len(read[node]) == 1 and (node := read[node][0]) in steps and steps[node].op.kind == "carry":
                carries.add(node)  # it may undo what came before
        elif axis in down[node]:
            tree = _tree(node, steps, read)
            seen |= tree
            carries |= {n for n in tree if steps[n].op.kind == "carry"}
            while source in steps and steps[source].op.kind == "carry" and len(read[source]) == 1:
                carries.add(source)
                source = steps[source].inputs[0][0]
            if any(len(read[n]) > 1 for n in tree):
                trees[node] = tree
    return Passage(frozenset(carries), trees)


def find_divisions(affine: Mapping[Node, Affine], readers: Callable[[Node], list[Node]]) -> dict[Node, Division]:
    """By the first of them: factors that alone read a join of layers that nobody else reads."""
    found = {}
    for node, join in affine.items():
        factors = _factors(node, affine, readers) if join.kind != "unary" else []
        if not factors:
            continue
        ends = _branches(node, affine, readers)
        layers = [a for n in ends if (a := _layer(n, affine, readers)) is not None]
        portions = [_portions(affine[f].op, join, layers) for f in factors]
        if ends and len(layers) == len(ends) and all(portions):
            found[factors[0]] = Division(tuple(factors), dict(zip(ends, zip(*portions, strict=True), strict=True)))
    return found


def _branches(join: Node, affine: Mapping[Node, Affine], readers: Callable[[Node], list[Node]]) -> list[Node]:
    """What a join reads and nobody else does, sums inside a sum opened; nothing where there is another reader."""
    ends = list[Node]()
    for node, _ in affine[join].inputs:
        inner = affine.get(node)
        opened = inner is not None and inner.kind == affine[join].kind == "sum"
        more = _branches(node, affine, readers) if opened else [node]
        if readers(node) != [join] or not more or not set(ends).isdisjoint(more):
            return []
        ends += more
    return ends


def _factors(join: Node, affine: Mapping[Node, Affine], readers: Callable[[Node], list[Node]]) -> list[Node]:
    """The factors after a join, each read by the next alone."""
    found, node = list[Node](), join
    while len(following := readers(node)) == 1 and (step := affine.get(following[0])) is not None:
        if step.kind != "unary" or step.op.kind != "scale" or step.inputs[0][0] is not node:
            break
        node = following[0]
        found.append(node)
    return found


def _layer(node: Node, affine: Mapping[Node, Affine], readers: Callable[[Node], list[Node]]) -> Operator | None:
    """The layer whose output reaches `node` through factors alone, read by nobody else."""
    step = affine.get(node)
    while step is not None and step.kind == "unary" and step.op.kind in ("scale", "identity"):
        source = step.inputs[0][0]
        step = affine.get(source) if readers(source) == [node] else None
        node = source
    return step.op if step is not None and step.kind == "unary" and step.op.weighted else None


def _portions(op: Operator, join: Affine, layers: list[Operator]) -> tuple[Operator, ...]:
    """What of `op` goes to each branch of a join; nothing where their channels are not its own, side by side or all."""
    widths = [a.out_channels for a in layers]
    whole = sum(widths) == op.out_channels if join.kind == "concat" else set(widths) == {op.out_channels}
    if op.spatial is not None and not (whole and all(a.spatial == op.spatial for a in layers)):
        return ()
    if join.kind == "sum":
        return tuple(_portion(op, 0, op.out_channels, shift=number == 0) for number in range(len(layers)))
    if join.spatial != op.spatial and op.spatial is not None:
        return ()
    starts = [sum(widths[:i]) for i in range(len(widths))]
    return tuple(_portion(op, start, count, shift=True) for start, count in zip(starts, widths, strict=True))


def _portion(op: Operator, start: int, count: int, shift: bool) -> Operator:
    """A run of the channels of a factor, with or without its shift."""
    rows = None if op.spatial is None else (start, start + count)
    fields: dict[str, Any] = {}
    if rows is not None:
        fields = {"in_channels": count, "out_channels": count, "groups": count}
    consts = (("rows", rows),)
    return replace(op, law="portion", operands=(op,), consts=consts, bias=op.bias and shift, **fields)


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


def _downward(steps: Mapping[Node, Affine], read: Mapping[Node, list[Node]]) -> dict[Node, Axes]:
    """Axes of each value along which every reader would absorb a factor."""
    down: dict[Node, Axes] = {}
    for node in reversed(list(steps)):
        accepted = [_accepted(node, r, steps, down) for r in read[node]]
        down[node] = frozenset.intersection(*accepted) if accepted else frozenset()
    return down


def _accepted(node: Node, reader: Node, steps: Mapping[Node, Affine], down: Mapping[Node, Axes]) -> Axes:
    affine = steps.get(reader)
    if affine is None or affine.inputs[0][0] is not node:
        return frozenset()
    op = affine.op
    if op.weighted:
        return frozenset() if op.pads or op.transposed else frozenset((_axis(op), ANY))
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
