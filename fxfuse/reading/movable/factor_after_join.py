"""batch_norm(cat([f(x), g(y)]))  =>  cat([batch_norm'(f(x)), batch_norm"(g(y))])      a share of it on each branch

After a join a factor and shift a channel moves up into every branch: its channels of a concatenation into each, its
factor into each summand and its shift into the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile

from torch.fx import Node

from fxfuse.algebra.operator import Operator
from fxfuse.reading.nodes import Nodes
from fxfuse.reading.runs import after


@dataclass(frozen=True)
class SplitFactors:
    """Factors in a row after a join, and by the last node of each branch its share of each of them.

    With `before`: factors before a join, and what the layer after it takes of them, to stand in front of that.
    """

    factors: tuple[Node, ...]
    shares: dict[Node, tuple[Operator, ...]]
    before: bool = False


@dataclass(frozen=True, slots=True)
class _End:
    """The last node of a branch, its run of channels in the whole, and whether it takes the shift."""

    node: Node
    start: int
    width: int
    shift: bool


def factors_after(node: Node, nodes: Nodes) -> list[Node]:
    """The factors after a node, each read by the next alone."""
    run = takewhile(lambda s: s[1].op.kind == "scale", after(node, nodes.affine, nodes.readers))
    return [factor for factor, _ in run]


def after_joins(nodes: Nodes) -> dict[Node, SplitFactors]:
    """By the first of them: factors that alone read a join of branches that nobody else reads."""
    found, widths = {}, _widths(nodes)
    for node, join in nodes.affine.items():
        factors = factors_after(node, nodes) if join.kind != "unary" else []
        ops = [nodes.affine[f].op for f in factors]
        spatial = next((o.spatial for o in ops if o.spatial is not None), None)
        ends = _ends(nodes, widths, node, spatial) if factors else []
        whole = max((e.start + e.width for e in ends), default=0)
        if ends and all(o.spatial is None or (o.spatial, o.out_channels) == (spatial, whole) for o in ops):
            found[factors[0]] = SplitFactors(tuple(factors), {e.node: tuple(_share(o, e) for o in ops) for e in ends})
    return found


def _widths(nodes: Nodes) -> dict[Node, int | None]:
    """Channels of what comes from layers: of one, of all that are summed, of those side by side together."""
    found = dict[Node, int | None]()
    for node, step in nodes.affine.items():  # in execution order
        parts = [found.get(source) for source, _ in step.inputs]
        if step.kind == "unary":
            passing = parts[0] if step.op.kind in ("scale", "identity") else None
            found[node] = step.op.out_channels if step.op.weighted else passing
        else:
            known = [w for w in parts if w is not None]
            whole = len(known) == len(parts) if step.kind == "concat" else len(set(known)) == 1
            found[node] = None if not whole else sum(known) if step.kind == "concat" else known[0]
    return found


def _ends(
    nodes: Nodes,
    widths: Mapping[Node, int | None],
    join: Node,
    spatial: int | None,
    start: int = 0,
    shift: bool = True,
) -> list[_End]:
    """What meets in a join, joins in it opened where possible; nothing where a branch has another reader."""
    affine, found = nodes.affine[join], list[_End]()
    sizes = [widths.get(node) for node, _ in affine.inputs]
    if affine.kind == "concat" and spatial not in (None, affine.spatial):
        return []
    if affine.kind == "sum" and len(set(sizes)) > 1:
        return []  # one that broadcasts
    for (node, _), width in zip(affine.inputs, sizes, strict=True):
        if nodes.readers(node) != [join] or width is None:
            return []
        inner = nodes.affine.get(node)
        opened = inner is not None and inner.kind != "unary" and _ends(nodes, widths, node, spatial, start, shift)
        found += opened or [_End(node, start, width, shift)]
        start, shift = (start + width, shift) if affine.kind == "concat" else (start, False)
    return found if len({e.node for e in found}) == len(found) else []


def _share(op: Operator, end: _End) -> Operator:
    """A run of the channels of a factor, with or without its shift."""
    consts, bias = (("start", 0 if op.spatial is None else end.start), ("each", 1)), op.bias and end.shift
    return op.on_layout(op.spatial, end.width, law="share", operands=(op,), consts=consts, bias=bias)
