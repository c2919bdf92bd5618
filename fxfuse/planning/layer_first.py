"""avg_pool -> 1x1 conv  =>  1x1 conv -> avg_pool      the layer first, where it leaves fewer channels to average

A stage after the plan: where a pool has stayed in front of a pointwise layer, the layer, with all that is folded into
it, changes places with the pool. So it reads what the pool read, and may be a sibling of other layers there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction

from torch.fx import Node

from fxfuse.algebra.operator import Operator
from fxfuse.cost import CostFunction
from fxfuse.pattern import Selection
from fxfuse.planning.overwritten import overwritten
from fxfuse.planning.regions import Join, Step, part_nodes
from fxfuse.planning.sites import Fuse, Keep, Plan, Rejoin, Segment, Site, joined
from fxfuse.planning.size_answers import answers
from fxfuse.reading.view import View
from fxfuse.refusal import Refusal


@dataclass
class LayerFirst:
    """The stage: `run` gives the plan with pools behind layers."""

    view: View
    patterns: Selection
    price: CostFunction
    refusals: list[Refusal] = field(default_factory=list)

    def run(self, plan: Plan) -> Plan:
        if not any(a.op.law == "pool" for a in self.view.affine.values()):
            return plan
        sites = [replace(s, segments=self._segments(s.segments)) for s in plan.sites]
        fused = {n for s in sites for n in s.nodes()}
        alone = [s for node in self.view.affine if node not in fused and (s := self._alone(node)) is not None]
        every = joined(sites, alone, self.view.effects.position)
        return replace(plan, sites=tuple(every), refusals=tuple(dict.fromkeys((*plan.refusals, *self.refusals))))

    def _segments(self, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
        """`segments` with layers moved before pools."""
        result = list[Segment]()
        for segment in segments:
            if isinstance(segment, Rejoin):
                segment = replace(segment, pieces=tuple(map(self._segments, segment.pieces)))
            elif result and isinstance(before := result[-1], Keep) and before.step.op.law == "pool":
                fuse = segment if isinstance(segment, Fuse) else Fuse(segment.step.op, (segment.step,))
                found = self._swapped(before.step, fuse)
                while found is not None:
                    segment = found
                    result.pop()
                    found = self._absorbing(result[-1], found) if result else None
            result.append(segment)
        return tuple(result)

    def _alone(self, node: Node) -> Site | None:
        """A layer that nothing fuses with, moved before the pool it reads."""
        affine, source = self.view.affine[node], self.view.affine[node].inputs[0][0]
        pool = self.view.affine.get(source)
        if affine.kind != "unary" or pool is None or pool.op.law != "pool" or self.view.readers(source) != [node]:
            return None
        found = self._swapped(Step(source, pool.op), Fuse(affine.op, (Step(node, affine.op),)))
        return None if found is None else Site(pool.inputs[0][0], (found,))

    def _swapped(self, step: Step, fuse: Fuse) -> Fuse | None:
        """The layer before the pool of `step`, with the pool and the bias to come after it."""
        pool, op, parts = step.op, fuse.op, (step, *fuse.parts)
        if op.kind != "conv" or not op.pointwise or any(s != 1 for s in pool.stride) or step.node is None:
            return None
        layer = self.patterns.combine("swap", pool, op)
        refusal = layer if isinstance(layer, Refusal) else self._dear(pool, op) or self._blocked(parts)
        if refusal is not None:
            self.refusals.append(refusal.by("pool_swap").at(op.path))
            return None
        assert isinstance(layer, Operator)
        return Fuse(layer, parts, pool=step.node, shift=op if op.bias and not layer.bias else None)

    def _absorbing(self, before: Segment, fuse: Fuse) -> Fuse | None:
        """The layer with a factor that the pool stood behind; the bias to come after the pool stays what it is."""
        if not isinstance(before, Keep) or before.step.node is None or before.step.op.kind != "scale":
            return None
        op, parts = self.patterns.combine("chain", before.step.op, fuse.op), (before.step, *fuse.parts)
        if isinstance(op, Refusal) or self._blocked(parts) or (self.view.sized.keys() & {before.step.node}):
            return None
        return replace(fuse, op=op, parts=parts)

    def _dear(self, pool: Operator, op: Operator) -> Refusal | None:
        if "pool_swap" in self.patterns.forced:
            return None
        if op.out_channels >= op.in_channels:
            detail = f"{op.out_channels} instead of {op.in_channels}"
            return Refusal("exact, but the pool would have more channels to average behind the layer", detail=detail)
        reach = zip(pool.padding, pool.dilation, pool.kernel, strict=True)
        shrinks = any(sum(p) < d * (k - 1) for p, d, k in reach)
        if shrinks and self.price(op, Fraction(2)) > self.price(op, Fraction(1)):
            reason = "exact, but before the pool the layer would have more positions to work on"
            return Refusal(reason, remedy='patterns=["pool_swap!"] swaps them all the same')
        return None

    def _blocked(self, parts: tuple[Step | Join, ...]) -> Refusal | None:
        """What stands in the way of running the layer before the pool."""
        nodes = [n for p in parts for n in part_nodes(p)]
        if self.view.sized and answers(parts, self.view.sized) is None:
            return Refusal("somebody asks for the size of a value between the pool and the layer")
        return overwritten(self.view, self.view.affine[nodes[0]].inputs[0][0], nodes)
