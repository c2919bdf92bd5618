"""conv(cat([batch_norm(x), y]))  =>  conv'(cat([x, y]))      a factor on one part is one on a run of the channels

A factor and shift a channel on one part of a concatenation acts, as seen by the layer behind, on that run of its
channels and on no other: ones and zeros elsewhere. So that layer can absorb it, whatever the other parts are, where
nobody else reads the part or the concatenation. A layer that pads takes factors alone: a shift would need a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch.fx import Node

from fxfuse.algebra.operator import Operator
from fxfuse.facts.fact import Fact
from fxfuse.reading.affine import Affine
from fxfuse.reading.effects import Effects
from fxfuse.reading.movable.factor_ways import Division


@dataclass(frozen=True)
class Ahead:
    """Finds them; `readers` are those of a node's data."""

    affine: Mapping[Node, Affine]
    facts: Mapping[Node, Fact]
    effects: Effects
    readers: Callable[[Node], list[Node]]

    def divisions(self) -> dict[Node, Division]:
        """By the first of them: factors of one part, as what the layer behind the concatenation takes of them."""
        found = {}
        for join, affine in self.affine.items():
            following = self.readers(join)
            layer = self.affine.get(following[0]) if len(following) == 1 and affine.kind == "concat" else None
            spatial = affine.spatial
            if layer is None or layer.kind != "unary" or not layer.op.weighted or layer.op.spatial != spatial:
                continue
            start = 0
            for (part, _), width in zip(affine.inputs, self._widths(affine, layer.op), strict=True):
                if width is None:
                    break
                factors = self._factors(part, join, spatial)
                if factors and not (layer.op.pads and any(self.affine[f].op.bias for f in factors)):
                    ops = [placed(self.affine[f].op, start, width, layer.op) for f in factors]
                    found[factors[0]] = Division(tuple(factors), {following[0]: tuple(ops)}, before=True)
                start += width
        return found

    def _widths(self, join: Affine, layer: Operator) -> list[int | None]:
        """The channels of every part; of one that is not known otherwise, what the others leave of the layer's."""
        widths = [self.facts[part].channels(layer.spatial or 0) for part, _ in join.inputs]
        if widths.count(None) == 1:
            rest = layer.in_channels - sum(w for w in widths if w is not None)
            widths = [rest if w is None else w for w in widths]
        return widths

    def _factors(self, part: Node, join: Node, spatial: int | None) -> list[Node]:
        """The factors that a part ends in, after something that is no layer."""
        found, node, reader = list[Node](), part, join
        while (step := self.affine.get(node)) is not None and step.kind == "unary" and step.op.kind == "scale":
            if self.readers(node) != [reader] or step.op.spatial not in (None, spatial) or step.width is not None:
                return []
            found.insert(0, node)
            reader, node = node, step.inputs[0][0]
        if not found or node in self.affine or [p for p, _ in self.affine[join].inputs].count(part) > 1:
            return []
        position = self.effects.position
        written = self.effects.written_between(node, position[found[0]], position[join], found)
        return [] if written else found


def placed(op: Operator, start: int, width: int, layer: Operator) -> Operator:
    """A factor on `width` channels as one on all that `layer` reads, of which those are the ones from `start`."""
    spatial, total = layer.spatial or 0, layer.in_channels
    own = op.at(spatial, width)
    whole = replace(own, in_channels=total, out_channels=total, groups=total)
    return replace(whole, law="placed", operands=(own,), consts=(("start", start),))
