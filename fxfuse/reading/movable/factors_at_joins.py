"""batch_norm(cat([f(x), g(y)]))  =>  cat([batch_norm'(f(x)), batch_norm"(g(y))])      a share of it on each branch

After a join a factor and shift a channel moves up into every branch: its channels of a concatenation into each, its
factor into each summand and its shift into the first.

conv(cat([batch_norm(x), y]))  =>  conv'(cat([x, y]))      a factor on one part is one on a run of the channels

A factor and shift a channel on one part of a concatenation acts, as seen by the layer behind, on that run of its
channels and on no other: ones and zeros elsewhere. So that layer can absorb it, whatever the other parts are, where
nobody else reads the part or the concatenation. A layer that pads takes factors alone: a shift would need a frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from torch.fx import Node

from fxfuse.algebra.operator import Operator
from fxfuse.reading.affine import Affine
from fxfuse.reading.nodes import Nodes, Run


@dataclass(frozen=True)
class SplitFactors:
    """Factors in a row after a join, and by the last node of each branch its share of each of them.

    With `before`: factors before a join, and what the layer after it takes of them, to stand in front of that.
    """

    factors: tuple[Node, ...]
    shares: dict[Node, tuple[Operator, ...]]
    before: bool = False


class _End(NamedTuple):
    """The last node of a branch, its run of channels in the whole, and whether it takes the shift."""

    node: Node
    start: int
    width: int
    shift: bool


def factors_of(run: Run) -> dict[Node, Affine]:
    """The factors that a run begins with."""
    return dict(takewhile(lambda s: s[1].op.kind == "scale", run))


def after_joins(nodes: Nodes) -> Iterator[SplitFactors]:
    """Factors that alone read a join of branches that nobody else reads."""
    widths = _widths(nodes)
    for node, join in nodes.affine.items():
        factors = factors_of(nodes.after(node)) if join.kind != "unary" else {}
        ops = [factor.op for factor in factors.values()]
        spatial = next((o.spatial for o in ops if o.spatial is not None), None)
        ends = _ends(nodes, widths, node, spatial) if factors else []
        whole = max((e.start + e.width for e in ends), default=0)
        if ends and all(o.spatial is None or (o.spatial, o.out_channels) == (spatial, whole) for o in ops):
            yield SplitFactors(tuple(factors), {e.node: tuple(_share(o, e) for o in ops) for e in ends})


def _widths(nodes: Nodes) -> dict[Node, int | None]:
    """Channels of what comes from layers: of one, of all that are summed, of those side by side together."""
    found = dict[Node, int | None]()
    for node, step in nodes.affine.items():  # in execution order
        parts = [found.get(source) for source, _ in step.inputs]
        known = [w for w in parts if w is not None]
        if step.kind == "concat":
            found[node] = sum(known) if len(known) == len(parts) else None
        elif step.kind == "sum":
            found[node] = known[0] if len(set(known)) == 1 else None
        else:
            passing = parts[0] if step.op.kind in ("scale", "identity") else None
            found[node] = step.op.out_channels if step.op.weighted else passing
    return found


def _ends(
    nodes: Nodes, widths: Mapping[Node, int | None], join: Node, spatial: int | None, start: int = 0, shift: bool = True
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


def before_concats(nodes: Nodes) -> Iterator[SplitFactors]:
    """Factors of one part, as what the layer behind the concatenation takes of them."""
    for join, affine in nodes.affine.items():
        following = nodes.readers(join) if affine.kind == "concat" else []
        layer = nodes.affine.get(following[0]) if len(following) == 1 else None
        if layer is None or layer.kind != "unary" or not layer.op.weighted or layer.op.spatial != affine.spatial:
            continue
        start = 0
        for (part, _), width in zip(affine.inputs, _part_widths(nodes, affine, layer.op), strict=True):
            if width is None:
                break
            factors = _part_factors(nodes, part, join, affine)
            ops = [nodes.affine[f].op for f in factors]
            if factors and not (layer.op.pads and any(o.bias for o in ops)):
                shares = tuple(_embedded(o, start, width, layer.op) for o in ops)
                yield SplitFactors(tuple(factors), {following[0]: shares}, before=True)
            start += width


def _part_widths(nodes: Nodes, join: Affine, layer: Operator) -> list[int | None]:
    """The channels of every part; of one that is not known otherwise, what the others leave of the layer's."""
    widths = [nodes.facts[part].channels(layer.spatial or 0) for part, _ in join.inputs]
    rest = layer.in_channels - sum(w for w in widths if w is not None)
    return [rest if w is None else w for w in widths] if widths.count(None) == 1 else widths


def _part_factors(nodes: Nodes, part: Node, join: Node, affine: Affine) -> list[Node]:
    """The factors that a part ends in, in order, after something that is no layer."""
    steps = factors_of(nodes.before(part, join))
    found = list(steps)[::-1]
    if any(s.op.spatial not in (None, affine.spatial) or s.width is not None for s in steps.values()) or not found:
        return []
    source, position = nodes.source(found[0]), nodes.effects.position
    if source in nodes.affine or [p for p, _ in affine.inputs].count(part) > 1:
        return []
    return [] if nodes.effects.written_between(source, position[found[0]], position[join], found) else found


def _embedded(op: Operator, start: int, width: int, layer: Operator) -> Operator:
    """A factor on `width` channels as one on all that `layer` reads, of which those are the ones from `start`."""
    own = op.at(layer.spatial or 0, width)
    return own.on_layout(own.spatial, layer.in_channels, law="embedded", operands=(own,), consts=(("start", start),))
