"""The plan: which stretches of every chain become one operator, which layers run before a pool, and which side by side.

Costs compare as (forced patterns, cost, executed nodes), and what is only as good as the original is left alone.
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
from fxfuse.planning.conflicts import chain_overwritten
from fxfuse.planning.fusing import Fusing
from fxfuse.planning.layer_first import LayerFirst
from fxfuse.planning.refusals_alone import Alone
from fxfuse.planning.regions import Join, Step, find, nodes_of, steps_of
from fxfuse.planning.siblings import Gather
from fxfuse.planning.sites import Plan, Refused, Site, fuses, opened
from fxfuse.reading.view import View


def make_plan(view: View, patterns: Selection, price: CostFunction) -> Plan:
    """The whole plan of one graph; no weight is read and nothing is changed."""
    plan = Planner(view, patterns, price).run()
    plan = LayerFirst(view, patterns, price).run(plan)
    return Gather(view, patterns, price).run(plan)


@dataclass
class Planner(Fusing):
    """The sites of one view; `became`, `joined` and `refused` are those of its last round."""

    became: dict[Node, Operator] = field(default_factory=dict)
    joined: set[Node] = field(default_factory=set)
    refused: list[Refused] = field(default_factory=list)

    def run(self) -> Plan:
        """Rounds until every factor that moves is taken by all the layers that it moves to."""
        sites, _ = self._round(frozenset(), frozenset())
        trees, fused = self.view.movable.trees.keys(), self.became.keys()
        split = frozenset(f for f, d in self.view.movable.split.items() if not fused >= {*d.factors})
        shared = frozenset(trees - fused - split)
        left = shared | split
        while left:  # factors that every layer before or after them takes, or none
            sites, left = self._round(shared, split)
            shared, split = (shared - left) | (split & left & trees), split - left
        told = {n for r in self.refused for n in r.nodes}
        alone = Alone(self, self.joined, self.became, told).refusals()
        return Plan(tuple(sites), (*(r.refusal for r in self.refused), *alone))

    def _round(self, shared: frozenset[Node], split: frozenset[Node]) -> tuple[list[Site], frozenset[Node]]:
        """All sites with something to fuse, and those `shared` or `split` factors that a layer does not take."""
        chains, sites, left = find(self.view, shared, split), list[Site](), set[Node]()
        self.refused, self.became = [], {}
        self.joined = {n for c in chains for p in c.parts if isinstance(p, Join) for n in nodes_of(p)}
        roots = {n: first for first in shared for n in self.view.movable.trees[first]}
        absorbed = Counter[Node | None]()  # by the layers, each factor as often as it has moved
        for chain in chains:
            if refusal := chain_overwritten(self.view, chain):
                stay = set(nodes_of(*chain.parts))
                self.refused.append(Refused(refusal, tuple(stay)))
            else:
                best = best_of_chain(self, chain, Fraction(1))
                self.refused.extend(best.refused)
                kept = (s for s in opened(best.segments) if isinstance(s, Step) and s.op.kind == "scale")
                stay = {s.node for s in kept if s.node is not None}
                taken = list(fuses(best.segments))
                absorbed.update(s.node for f in taken for s in steps_of(*f.parts) if s.moved)
                sites += [Site(chain.source, best.segments)] if taken else []
                self.became |= {n: f.op for f in taken for n in f.nodes}
            left |= {roots[n] for n in stay & roots.keys()}
        factors = {first: self.view.movable.split[first] for first in split}
        left |= {first for first, d in factors.items() if min(absorbed[f] for f in d.factors) < len(d.shares)}
        return sites, frozenset(left)
