"""The plan: which stretches of every chain become one operator, which layers run before a pool, and which side by side.

Costs compare as (forced patterns, cost, executed nodes), and what is only as good as the original is left alone. No
weight is touched here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction

from torch.fx import Node

from fxfuse.algebra.operator import Operator
from fxfuse.cost import CostFunction
from fxfuse.pattern import Selection
from fxfuse.planning.chains import best_of_chain
from fxfuse.planning.fusing import Fusing
from fxfuse.planning.layer_first import LayerFirst
from fxfuse.planning.overwritten import chain_overwritten
from fxfuse.planning.refusals_alone import Alone
from fxfuse.planning.regions import Join, find, part_nodes, steps_of
from fxfuse.planning.siblings import Gather
from fxfuse.planning.sites import Plan, Refused, Site, fuses, kept
from fxfuse.reading.view import View


def make_plan(view: View, patterns: Selection, price: CostFunction) -> Plan:
    """The whole plan of one graph; no weight is read and nothing is changed."""
    plan = Planner(view, Fusing(view, patterns, price)).run()
    plan = LayerFirst(view, patterns, price).run(plan)
    return Gather(view, patterns, price).run(plan)


@dataclass
class Planner:
    """The sites of one view; `fused`, `joined` and `refused` are those of its last round."""

    view: View
    fusing: Fusing
    fused: dict[Node, Operator] = field(default_factory=dict)
    joined: set[Node] = field(default_factory=set)
    refused: list[Refused] = field(default_factory=list)

    def run(self) -> Plan:
        """Rounds until every factor that moves is taken by all the layers that it moves to."""
        sites, _ = self._round(frozenset(), frozenset())
        trees, fused = self.view.movable.trees.keys(), self.fused.keys()
        split = frozenset(f for f, d in self.view.movable.split.items() if not fused >= {*d.factors})
        shared = frozenset(trees - fused - split)
        left = shared | split
        while left:  # factors that every layer before or after them takes, or none
            sites, left = self._round(shared, split)
            shared, split = (shared - left) | (split & left & trees), split - left
        told = {n for r in self.refused for n in r.nodes}
        alone = Alone(self.fusing, self.joined, self.fused, told).refusals()
        return Plan(tuple(sites), tuple(dict.fromkeys((*(r.refusal for r in self.refused), *alone))))

    def _round(self, shared: frozenset[Node], split: frozenset[Node]) -> tuple[list[Site], frozenset[Node]]:
        """All sites with something to fuse, and those `shared` or `split` factors that a layer does not take."""
        chains, sites, left = find(self.view, shared, split), list[Site](), set[Node]()
        self.refused, self.fused = [], {}
        self.joined = {n for c in chains for p in c.parts if isinstance(p, Join) for n in part_nodes(p)}
        split_factors = self.view.movable.split
        roots = {n: first for first in shared for n in self.view.movable.trees[first]}
        absorbed = Counter[Node | None]()  # by the layers, each factor as often as it has moved
        for chain in chains:
            if refusal := chain_overwritten(self.view, chain):
                stay = {n for p in chain.parts for n in part_nodes(p)}
                self.refused.append(Refused(refusal, tuple(stay)))
            else:
                best = best_of_chain(self.fusing, chain, Fraction(1))
                self.refused.extend(best.refused)
                stay = {s.node for s in kept(best.segments) if s.node is not None and s.op.kind == "scale"}
                taken = {n: f.op for f in fuses(best.segments) for p in f.parts for n in part_nodes(p)}
                steps = [s for f in fuses(best.segments) for p in f.parts for s in steps_of(p)]
                absorbed.update(s.node for s in steps if s.moved)
                sites += [Site(chain.source, best.segments)] if taken else []
                self.fused |= taken
            left |= {roots[n] for n in stay & roots.keys()}
        left |= {d for d in split if min(absorbed[f] for f in split_factors[d].factors) < len(split_factors[d].shares)}
        return sites, frozenset(left)
