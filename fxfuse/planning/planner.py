"""The plan: which stretches of every chain become one operator, chosen by dynamic programming.

On a chain, as in matrix-chain multiplication, every contiguous stretch that the patterns can
collapse exactly is a candidate and the cheapest cover wins; on a join, every set of branches that
can be merged. So a step that costs more alone is taken where it pays in the end. Costs compare as
(forced patterns, cost, executed nodes), and what is only as good as the original is left alone.
No weight is touched here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache, reduce

import torch
from torch.fx import Node

from fxfuse.algebra import combine
from fxfuse.algebra.operator import IDENTITY, Operator
from fxfuse.cost import CostFunction
from fxfuse.pattern import Selection
from fxfuse.planning.branch_groups import FREE, Group, Price, cut, partition, plus
from fxfuse.planning.factor_orders import orders
from fxfuse.planning.regions import Chain, Join, Step, exit_of, find, part_nodes, steps_of
from fxfuse.planning.sites import Fuse, Keep, Plan, Rejoin, Segment, Site, fuses, kept
from fxfuse.planning.size_answers import answers
from fxfuse.planning.why_apart import Apart
from fxfuse.reading.view import View
from fxfuse.refusal import Refusal
from fxfuse.reporting.why_left import left_over

UNREACHED: Price = (10**9, Fraction(0), 0)
STRANDED: Price = (10**6, Fraction(0), 0)  # a moved factor that no layer takes: its node stands elsewhere
WINDOW = 64  # convolutions in one stretch: bounds a search that grows with the square of their number,
STEPS = 2 * WINDOW  # and all steps, each of which is an operator inside the next one


@dataclass(frozen=True, slots=True)
class _Option:
    """The best known form of a part: segments and their price; `op` when it can be one operator."""

    price: Price
    segments: tuple[Segment, ...]
    op: Operator | Refusal
    notes: tuple[Refusal, ...] = ()


@dataclass
class Planner:
    """Dynamic programming over the chains of one view."""

    view: View
    patterns: Selection
    cost: CostFunction
    refusals: list[Refusal] = field(default_factory=list)
    joined: set[Node] = field(default_factory=set)
    fused: set[Node] = field(default_factory=set)

    @property
    def _apart(self) -> Apart:
        return Apart(self._combine, self._price)

    def run(self) -> Plan:
        sites, _ = self._sites(frozenset(), frozenset())
        trees = self.view.passage.trees.keys()
        divided = frozenset(f for f, d in self.view.passage.divisions.items() if not self.fused.issuperset(d.factors))
        shared = frozenset(trees - self.fused - divided)
        while shared or divided:  # factors that every layer before or after them takes, or none
            sites, left = self._sites(shared, divided)
            if not left:
                break
            shared, divided = (shared - left) | (divided & left & trees), divided - left
            if not shared and not divided:
                sites, _ = self._sites(shared, divided)
        notes = left_over(self.view, self.patterns, self.cost, self.joined, self.fused)
        return Plan(tuple(sites), tuple(dict.fromkeys((*self.refusals, *notes))))

    def _sites(self, shared: frozenset[Node], divided: frozenset[Node]) -> tuple[list[Site], set[Node]]:
        """All sites with something to fuse, and those `shared` or `divided` factors that a layer does not take."""
        chains, sites, left = find(self.view, shared, divided), list[Site](), set[Node]()
        self.refusals, self.fused = [], set()
        self.joined = {n for c in chains for p in c.parts if isinstance(p, Join) for n in part_nodes(p)}
        divisions = self.view.passage.divisions
        roots = {n: first for first in shared for n in self.view.passage.trees[first]}
        placed = Counter[Node]()
        for chain in chains:
            if refusal := self._overwritten(chain):
                self.refusals.append(refusal)
                stay = {n for p in chain.parts for n in part_nodes(p)}
            else:
                best = self._chain(chain, Fraction(1))
                self.refusals.extend(best.notes)
                stay = {s.node for s in kept(best.segments) if s.node is not None and s.op.kind == "scale"}
                taken = {n for f in fuses(best.segments) for p in f.parts for n in part_nodes(p)}
                placed.update(_moved(best.segments))
                sites += [Site(chain.source, best.segments)] if taken else []
                self.fused |= taken
            left |= {roots[n] for n in stay & roots.keys()}
        left |= {d for d in divided if min(placed[f] for f in divisions[d].factors) < len(divisions[d].portions)}
        return sites, left

    def _overwritten(self, chain: Chain) -> Refusal | None:
        effects = self.view.effects
        if not effects.writes:
            return None
        nodes = [n for p in chain.parts for n in part_nodes(p)]
        own = {*nodes, *(w for n in nodes for w in self.view.affine[n].extra)}
        at = [effects.position[n] for n in nodes]
        last = chain.parts[-1]
        if isinstance(last, Step) and last.op.kind == "select" and (writer := effects.writes_itself(nodes[-1])):
            # whether PyTorch takes a write over memory that overlaps depends on the strides, and these would change
            return Refusal(
                "its slice is written in place by an operation that also reads the same memory by another name",
                where=nodes[-1].name,
                detail=f"written by {writer.name}",
                remedy="use the out-of-place form",
            )
        writer = effects.written_between(chain.source, min(at), max(at), own)
        for join in (p for p in chain.parts if isinstance(p, Join)):  # where one branch may stay, and another move
            others = own - {s.node for s in steps_of(join) if s.node is not None}
            writer = writer or effects.written_between(join.branches[0].source, min(at), max(at), others)
        if writer is None:
            return None
        return Refusal(
            "its input is overwritten in place before the last layer of the site has run",
            where=nodes[-1].name,
            detail=f"written by {writer.name}",
            remedy="use the out-of-place form",
        )

    def _area(self, node: Node | None, before: Fraction, op: Operator) -> Fraction:
        """Output positions of an operator: counted from known shapes, else relative to the entry."""
        counted = self._positions(node, op.spatial)
        return before * op.pixels if counted is None else counted

    def _positions(self, node: Node | None, spatial: int | None) -> Fraction | None:
        """Elements of a known shape for each channel, the batch included."""
        shape = self.view.shapes.get(node) if node is not None else None
        if shape is None or spatial is None or len(shape) <= spatial or not shape[-spatial - 1]:
            return None
        return Fraction(shape.numel(), shape[-spatial - 1])

    def _price(self, op: Operator, area: Fraction, executed: int = 1, node: Node | None = None) -> Price:
        forced = sum(name in self.patterns.forced for name in op.applied)
        if op.kind == "identity":
            return (0, Fraction(0), executed)
        cost = Fraction(self.cost(op, area))
        if op.framed:  # one map for all samples at `node`
            shape = self.view.shapes.get(node, torch.Size()) if node is not None else torch.Size()
            batch = shape[: -(op.spatial or 0) - 1].numel() if op.spatial and shape else 1
            cost += Fraction(self.cost(op.frame_conv, area / (batch or 1)))
        return (-forced, cost, executed)

    def _chain(self, chain: Chain, area: Fraction) -> _Option:
        """Best cover of the parts in the order that allows the cheapest."""
        best = self._cover(chain, area)
        for order in orders(chain.parts, self._free):
            other = self._cover(replace(chain, parts=order), area)
            best = other if other.price < best.price else best
        return best

    def _free(self, node: Node, settled: bool = True) -> bool:
        """Whether a node may vanish: no rank was taken for granted, and its order in memory is nobody's concern."""
        affine = self.view.affine
        layers = all(u in affine and affine[u].op.weighted for u in self.view.readers(node))
        return affine[node].assumes is None and (settled or layers)

    def _cover(self, chain: Chain, area: Fraction) -> _Option:
        """Best cover of the parts, and the operator of them all where there is one."""
        options: list[_Option] = []
        areas = [area]
        for part in chain.parts:
            option = self._part(part, areas[-1])
            options.append(option)
            areas.append(self._after(part, areas[-1]))
        count = len(options)
        best: list[tuple[Price, int, Fuse | None]] = [(FREE, 0, None), *[(UNREACHED, 0, None)] * count]
        whole: Operator | Refusal = IDENTITY
        for i in range(count):
            here = best[i][0]
            keep = plus(here, options[i].price)
            if keep <= best[i + 1][0]:  # a tie leaves the part alone
                best[i + 1] = (keep, i, None)
            op = options[i].op
            weighted = 0
            for j in range(i, count):
                if j > i:
                    op = self._combine("chain", op, options[j].op)
                if isinstance(op, Refusal):
                    break
                part_op = options[j].op
                weighted += isinstance(part_op, Operator) and part_op.weighted
                if weighted > WINDOW or j - i >= STEPS:
                    op = Refusal("the chain is too long to be tried as one operator")
                    break
                fused = self._fusable(op, chain.parts[i : j + 1], areas[j + 1])
                if fused is not None:
                    total = plus(here, fused[0])
                    if total < best[j + 1][0]:
                        best[j + 1] = (total, i, fused[1])
            if i == 0:
                whole = op
        segments: list[Segment] = []
        cuts, end = [], count
        while end > 0:
            _, start, fuse = best[end]
            cuts.append((start, end))
            segments[:0] = [fuse] if fuse is not None else options[start].segments
            end = start
        cuts.reverse()
        notes = [n for (i, j) in cuts if j == i + 1 and best[j][2] is None for n in options[i].notes]
        notes += self._apart.in_chain(chain, [o.op for o in options], cuts, areas)
        return _Option(best[count][0], tuple(segments), whole, tuple(notes))

    def _after(self, part: Step | Join, before: Fraction) -> Fraction:
        """Output positions after a part."""
        if isinstance(part, Step):
            return before if part.moved else self._area(part.node, before, part.op)
        spatial = next((s.op.spatial for s in steps_of(part) if s.op.spatial is not None), None)
        counted = self._positions(part.node, spatial)
        if counted is not None:
            return counted
        for step in part.branches[0].parts:
            before = self._after(step, before)
        return before

    def _part(self, part: Step | Join, area: Fraction) -> _Option:
        if isinstance(part, Step):
            executed = int(part.node is not None) + part.op.computed + combine.FRAME * part.op.framed
            price = self._price(part.op, self._area(part.node, area, part.op), executed, part.node)
            price = STRANDED if part.moved else price
            return _Option(price, (Keep(part),), part.op)
        branches = [self._chain(b, area) for b in part.branches]
        return self._sum(part, branches, area) if part.kind == "sum" else self._concat(part, branches, area)

    def _combine(self, relation: str, f: Operator | Refusal, g: Operator | Refusal) -> Operator | Refusal:
        if isinstance(f, Refusal):
            return f
        if isinstance(g, Refusal) or "carry" not in (f.kind, g.kind):
            return g if isinstance(g, Refusal) else self.patterns.combine(relation, f, g)
        return Refusal("a reshape, permutation or average stands between")

    def _fusable(
        self, op: Operator | Refusal, parts: Sequence[Step | Join], area: Fraction
    ) -> tuple[Price, Fuse] | None:
        """The price of running the parts as one operator; None where that is no change or impossible."""
        if isinstance(op, Refusal):
            return None
        real = sum(not (isinstance(p, Step) and p.op.kind == "identity") for p in parts)
        if real < 2 and not any(isinstance(p, Join) for p in parts):
            single = self.patterns.combine("alone", op, op)
            if isinstance(single, Refusal):
                return None
            op = single
        ready = combine.finish(op)
        if isinstance(ready, Refusal):
            return None
        if self.view.sized and answers(parts, self.view.sized) is None:
            return None  # somebody asks for the size of a value that would be gone
        op, executed = ready
        return self._price(op, area, executed, exit_of(parts)), Fuse(op, tuple(parts))

    def _merge(self, kind: str, ops: Sequence[Operator | Refusal]) -> Operator | Refusal:
        if len(ops) > STEPS:
            return Refusal("the branches are too many to be tried as one operator")
        ranked = sorted(ops, key=_rank) if kind == "sum" else ops
        return reduce(lambda f, g: self._combine(kind, f, g), ranked)

    def _sum(self, join: Join, branches: list[_Option], area: Fraction) -> _Option:
        """Cheapest partition of the branches into merged groups (exact up to EXACT branches)."""
        after = self._after(join, area)
        groups = self._partition(branches, join, after)
        return self._joined(join, branches, groups, after)

    def _partition(self, branches: list[_Option], join: Join, area: Fraction) -> list[Group]:
        @cache
        def price(group: Group) -> Price | None:
            if len(group) == 1:
                return branches[group[0]].price
            fused = self._group(join, branches, group, area)
            return None if fused is None else fused[0]

        return partition(len(branches), price)

    def _group(
        self, join: Join, branches: list[_Option], group: tuple[int, ...], area: Fraction
    ) -> tuple[Price, Fuse] | None:
        op = _on_axis(join, self._merge(join.kind, [branches[i].op for i in group]))
        part = replace(join, branches=tuple(join.branches[i] for i in group))
        return self._fusable(op, [part], area)

    def _concat(self, join: Join, branches: list[_Option], area: Fraction) -> _Option:
        """Cheapest cut of the branches into merged runs."""
        after = self._after(join, area)

        @cache
        def merged(i: int, j: int) -> Operator | Refusal:
            return branches[i].op if i == j else self._combine("concat", merged(i, j - 1), branches[j].op)

        def price(i: int, j: int) -> Price | None:
            if i == j or j - i >= STEPS:
                return branches[i].price if i == j else None
            part = replace(join, branches=join.branches[i : j + 1])
            fused = self._fusable(_on_axis(join, merged(i, j)), [part], after)
            return None if fused is None else fused[0]

        return self._joined(join, branches, cut(len(branches), price), after)

    def _joined(self, join: Join, branches: list[_Option], groups: list[tuple[int, ...]], area: Fraction) -> _Option:
        """The option of a join whose branches are merged by `groups`."""
        whole = _on_axis(join, self._merge(join.kind, [b.op for b in branches]))
        price, pieces, notes = FREE, list[tuple[Segment, ...]](), list[Refusal]()
        for group in groups:
            fused = self._group(join, branches, group, area) if len(group) > 1 else None
            if fused is not None:
                price = plus(price, fused[0])
                pieces.append((fused[1],))
            else:
                price = plus(price, branches[group[0]].price)
                pieces.append(branches[group[0]].segments)
                notes.extend(branches[group[0]].notes)
        joins = len(groups) - 1 if join.kind == "sum" else int(len(groups) > 1)
        price = plus(price, (0, Fraction(0), joins))
        if len(groups) > 1:
            merged = [self._merge(join.kind, [branches[i].op for i in g]) for g in groups]
            notes.extend(self._apart.in_join(join, merged, whole, area))
        if len(groups) == 1 and isinstance(pieces[0][0], Fuse):
            return _Option(price, (replace(pieces[0][0], parts=(join,)),), whole, tuple(notes))
        rejoin = Rejoin(join, tuple(pieces), merged=len(groups) < len(branches))
        return _Option(price, (rejoin,), whole, tuple(notes))


def _on_axis(join: Join, op: Operator | Refusal) -> Operator | Refusal:
    if isinstance(op, Refusal) or join.spatial in (None, op.spatial):
        return op
    return Refusal("the concatenated axis is not the channel axis of its inputs")


def _moved(segments: tuple[Segment, ...]) -> Iterator[Node]:
    """Factors that have moved into fused stretches, each as often as it has."""
    for step in (s for f in fuses(segments) for p in f.parts for s in steps_of(p)):
        if step.moved and step.node is not None:
            yield step.node


def _rank(op: Operator | Refusal) -> int:
    kinds = ("warp", "conv", "pool", "pad", "select", "scale", "identity")
    return kinds.index(op.kind) if isinstance(op, Operator) else -1
