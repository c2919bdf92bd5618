"""conv(cat([batch_norm(x), y]))  =>  conv'(cat([x, y]))      a factor on one part is one on a run of the channels

A factor and shift a channel on one part of a concatenation acts, as seen by the layer behind, on that run of its
channels and on no other: ones and zeros elsewhere. So that layer can absorb it, whatever the other parts are, where
nobody else reads the part or the concatenation. A layer that pads takes factors alone: a shift would need a frame.
"""

from __future__ import annotations

from itertools import takewhile

from torch.fx import Node

from fxfuse.algebra.operator import Operator
from fxfuse.reading.affine import Affine
from fxfuse.reading.movable.factor_after_join import SplitFactors
from fxfuse.reading.nodes import Nodes
from fxfuse.reading.runs import before


def before_concats(nodes: Nodes) -> dict[Node, SplitFactors]:
    """By the first of them: factors of one part, as what the layer behind the concatenation takes of them."""
    found = {}
    for join, affine in nodes.affine.items():
        following = nodes.readers(join) if affine.kind == "concat" else []
        layer = nodes.affine.get(following[0]) if len(following) == 1 else None
        if layer is None or layer.kind != "unary" or not layer.op.weighted or layer.op.spatial != affine.spatial:
            continue
        start = 0
        for (part, _), width in zip(affine.inputs, _widths(nodes, affine, layer.op), strict=True):
            if width is None:
                break
            factors = _factors(nodes, part, join, affine)
            ops = [nodes.affine[f].op for f in factors]
            if factors and not (layer.op.pads and any(o.bias for o in ops)):
                shares = tuple(_embedded(o, start, width, layer.op) for o in ops)
                found[factors[0]] = SplitFactors(tuple(factors), {following[0]: shares}, before=True)
            start += width
    return found


def _widths(nodes: Nodes, join: Affine, layer: Operator) -> list[int | None]:
    """The channels of every part; of one that is not known otherwise, what the others leave of the layer's."""
    widths = [nodes.facts[part].channels(layer.spatial or 0) for part, _ in join.inputs]
    rest = layer.in_channels - sum(w for w in widths if w is not None)
    return [rest if w is None else w for w in widths] if widths.count(None) == 1 else widths


def _factors(nodes: Nodes, part: Node, join: Node, affine: Affine) -> list[Node]:
    """The factors that a part ends in, in order, after something that is no layer."""
    run = takewhile(lambda s: s[1].op.kind == "scale", before(part, join, nodes.affine, nodes.readers))
    steps = dict(run)
    if any(s.op.spatial not in (None, affine.spatial) or s.width is not None for s in steps.values()):
        return []
    found = list(steps)[::-1]
    source = steps[found[0]].inputs[0][0] if found else part
    if not found or source in nodes.affine or [p for p, _ in affine.inputs].count(part) > 1:
        return []
    position = nodes.effects.position
    return [] if nodes.effects.written_between(source, position[found[0]], position[join], found) else found


def _embedded(op: Operator, start: int, width: int, layer: Operator) -> Operator:
    """A factor on `width` channels as one on all that `layer` reads, of which those are the ones from `start`."""
    own = op.at(layer.spatial or 0, width)
    consts = (("start", start),)
    return own.on_layout(own.spatial, layer.in_channels, law="embedded", operands=(own,), consts=consts)
