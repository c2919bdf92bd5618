"""avg_pool -> 1x1 conv  =>  1x1 conv -> avg_pool      the layer first, where it leaves fewer channels to average

A stage after the plan: where a pool has stayed in front of a pointwise layer, the layer, with all that is folded into
it, changes places with the pool. So it reads what the pool read, and may be a sibling of other layers there.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from torch.fx import Node

from fxfuse.algebra.operator import Operator
from fxfuse.planning.conflicts import answers, overwritten
from fxfuse.planning.fusing import Fusing
from fxfuse.planning.regions import Part, Step, nodes_of
from fxfuse.planning.sites import Fuse, Plan, Rejoin, Segment, Site, joined
from fxfuse.refusal import Refusal


class LayerFirst(Fusing):
    """The stage: `run` gives the plan with pools behind layers."""

    def run(self, plan: Plan) -> Plan:
        if not any(a.op.law == "pool" for a in self.view.affine.values()):
            return plan
        plan = replace(plan, sites=tuple(replace(s, segments=self._segments(s.segments)) for s in plan.sites))
        fused = plan.fused()
        alone = [s for node in self.view.affine if node not in fused and (s := self._alone(node)) is not None]
        every = joined(plan.sites, alone, self.view.effects.position)
        return replace(plan, sites=tuple(every), refusals=(*plan.refusals, *self.refusals))

    def _segments(self, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
        """`segments` with layers moved before pools."""
        result = list[Segment]()
        for segment in segments:
            if isinstance(segment, Rejoin):
                segment = replace(segment, pieces=tuple(map(self._segments, segment.pieces)))
            elif result and isinstance(before := result[-1], Step) and before.op.law == "pool":
                found = self._swapped(before, segment if isinstance(segment, Fuse) else Fuse(segment.op, (segment,)))
                while found is not None:
                    segment = found
                    result.pop()
                    found = self._absorbing(result[-1], found) if result else None
            result.append(segment)
        return tuple(result)

    def _alone(self, node: Node) -> Site | None:
        """A layer that nothing fuses with, moved before the pool it reads."""
        affine, source = self.view.affine[node], self.view.source(node)
        pool = self.view.affine.get(source)
        if affine.kind != "unary" or pool is None or pool.op.law != "pool" or self.view.readers(source) != [node]:
            return None
        found = self._swapped(Step(source, pool.op), Fuse(affine.op, (Step(node, affine.op),)))
        return None if found is None else Site(self.view.source(source), (found,))

    def _swapped(self, step: Step, fuse: Fuse) -> Fuse | None:
        """The layer before the pool of `step`, with the pool and the bias to come after it."""
        pool, op, parts = step.op, fuse.op, (step, *fuse.parts)
        if op.kind != "conv" or not op.pointwise or any(s != 1 for s in pool.stride):
            return None
        layer = self.combine("swap", pool, op)
        layer = layer if isinstance(layer, Refusal) else self._dear(pool, op) or self._blocked(parts) or layer
        if isinstance(layer, Refusal):
            self.refusals.append(layer.by("pool_swap").at(op.path))
            return None
        return Fuse(layer, parts, pool=step.node, shift=op if op.bias and not layer.bias else None)

    def _absorbing(self, before: Segment, fuse: Fuse) -> Fuse | None:
        """The layer with a factor that the pool stood behind; the bias to come after the pool stays what it is."""
        if not isinstance(before, Step) or before.node is None or before.op.kind != "scale":
            return None
        op, parts = self.combine("chain", before.op, fuse.op), (before, *fuse.parts)
        if isinstance(op, Refusal) or self._blocked(parts) or before.node in self.view.sized:
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
        if shrinks and self.cost(op, Fraction(2)) > self.cost(op, Fraction(1)):
            reason = "exact, but before the pool the layer would have more positions to work on"
            return Refusal(reason, remedy='patterns=["pool_swap!"] swaps them all the same')
        return None

    def _blocked(self, parts: tuple[Part, ...]) -> Refusal | None:
        """What stands in the way of running the layer before the pool."""
        if answers(parts, self.view.sized) is None:
            return Refusal("somebody asks for the size of a value between the pool and the layer")
        nodes = list(nodes_of(*parts))
        return overwritten(self.view, self.view.source(nodes[0]), nodes)
