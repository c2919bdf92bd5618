"""The plan: which stretches of every chain become one operator, chosen by dynamic programming.

On a chain, as in matrix-chain multiplication, every contiguous stretch that the patterns can
collapse exactly is a candidate and the cheapest cover wins; on a join, every set of branches that
can be merged. So a step that costs more alone is taken where it pays in the end. Costs compare as
(forced patterns, cost, executed nodes), and what is only as good as the original is left alone.
No weight is touched here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache, reduce
from itertools import pairwise

from torch.fx import Node

from . import algebra
from .cost import CostFunction
from .explain import left_over
from .partition import FREE, Group, Price, cut, partition, plus
from .pattern import Selection
from .record import IDENTITY, Operator
from .refusal import Refusal
from .regions import Chain, Join, Step, find, part_nodes
from .view import View

UNREACHED: Price = (10**9, Fraction(0), 0)
WINDOW = 64  # convolutions in one stretch: bounds a search that grows with the square of their number


@dataclass(frozen=True, slots=True)
class Fuse:
    """A stretch that becomes one operator."""

    op: Operator
    parts: tuple[Step | Join, ...]


@dataclass(frozen=True, slots=True)
class Keep:
    """A node that stays as it is."""

    step: Step


@dataclass(frozen=True, slots=True)
class Rejoin:
    """A join that stays, over fewer or cheaper branches; `merged` where it must be emitted anew."""

    join: Join
    pieces: tuple[tuple[Segment, ...], ...]
    merged: bool


Segment = Fuse | Keep | Rejoin


@dataclass(frozen=True, slots=True)
class Site:
    """One chain and what becomes of it."""

    source: Node
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Plan:
    """All sites with something to fuse, and every refusal met on the way."""

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]


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

    def run(self) -> Plan:
        sites = []
        chains = find(self.view)
        self.joined = {n for c in chains for p in c.parts if isinstance(p, Join) for n in part_nodes(p)}
        for chain in chains:
            if refusal := self._overwritten(chain):
                self.refusals.append(refusal)
                continue
            best = self._chain(chain, Fraction(1))
            self.refusals.extend(best.notes)
            stretches = list(fuses(best.segments))
            if stretches:
                sites.append(Site(chain.source, best.segments))
                self.fused.update(n for f in stretches for p in f.parts for n in part_nodes(p))
        return Plan(
            tuple(sites),
            tuple(dict.fromkeys((*self.refusals, *left_over(self.view, self.patterns, self.joined, self.fused)))),
        )

    def _overwritten(self, chain: Chain) -> Refusal | None:
        effects = self.view.effects
        if not effects.writes:
            return None
        nodes = [n for p in chain.parts for n in part_nodes(p)]
        own = {*nodes, *(w for n in nodes for w in self.view.affine[n].extra)}
        at = [effects.position[n] for n in nodes]
        writer = effects.written_between(chain.source, min(at), max(at), own)
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

    def _price(self, op: Operator, area: Fraction, executed: int = 1) -> Price:
        forced = sum(name in self.patterns.forced for name in op.applied)
        if op.kind == "identity":
            return (0, Fraction(0), executed)
        return (-forced, Fraction(self.cost(op, area)), executed)

    def _chain(self, chain: Chain, area: Fraction) -> _Option:
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
                if weighted > WINDOW:
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
        notes += self._chain_notes(chain, options, cuts, areas)
        return _Option(best[count][0], tuple(segments), whole, tuple(notes))

    def _after(self, part: Step | Join, before: Fraction) -> Fraction:
        """Output positions after a part."""
        if isinstance(part, Step):
            return self._area(part.node, before, part.op)
        spatial = next((s.op.spatial for s in _steps(part) if s.op.spatial is not None), None)
        counted = self._positions(part.node, spatial)
        if counted is not None:
            return counted
        for step in part.branches[0].parts:
            before = self._after(step, before)
        return before

    def _part(self, part: Step | Join, area: Fraction) -> _Option:
        if isinstance(part, Step):
            price = self._price(part.op, self._area(part.node, area, part.op), int(part.node is not None))
            return _Option(price, (Keep(part),), part.op)
        branches = [self._chain(b, area) for b in part.branches]
        return self._sum(part, branches, area) if part.kind == "sum" else self._concat(part, branches, area)

    def _combine(self, relation: str, f: Operator | Refusal, g: Operator | Refusal) -> Operator | Refusal:
        if isinstance(f, Refusal):
            return f
        return g if isinstance(g, Refusal) else self.patterns.combine(relation, f, g)

    def _fusable(
        self, op: Operator | Refusal, parts: Sequence[Step | Join], area: Fraction
    ) -> tuple[Price, Fuse] | None:
        """The price of running the parts as one operator; None where that is no change or impossible."""
        if isinstance(op, Refusal):
            return None
        real = sum(not (isinstance(p, Step) and p.op.kind == "identity") for p in parts)
        if real < 2 and not any(isinstance(p, Join) for p in parts):
            return None
        ready = algebra.finish(op)
        if isinstance(ready, Refusal):
            return None
        op, executed = ready
        return self._price(op, area, executed), Fuse(op, tuple(parts))

    def _merge(self, kind: str, ops: Sequence[Operator | Refusal]) -> Operator | Refusal:
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
            if i == j:
                return branches[i].price
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
            notes.extend(self._join_notes(join, branches, groups, whole, area))
        if len(groups) == 1 and isinstance(pieces[0][0], Fuse):
            return _Option(price, (replace(pieces[0][0], parts=(join,)),), whole, tuple(notes))
        merged = len(groups) < len(branches)
        return _Option(price, (Rejoin(join, tuple(pieces), merged),), whole, tuple(notes))

    def _chain_notes(
        self, chain: Chain, options: list[_Option], cuts: list[tuple[int, int]], areas: list[Fraction]
    ) -> list[Refusal]:
        """Why neighbouring stretches of the final cover stayed apart."""
        notes = []
        stretches = [reduce(lambda f, g: self._combine("chain", f, g), [o.op for o in options[i:j]]) for i, j in cuts]
        for (left, right), (f, g) in zip(pairwise(cuts), pairwise(stretches), strict=True):
            if isinstance(f, Refusal) or isinstance(g, Refusal):
                continue
            if not (f.weighted or g.weighted) or "identity" in (f.kind, g.kind):
                continue
            last = chain.parts[right[0]]
            where = g.path or f.path or str(last.node)
            both = self._combine("chain", f, g)
            apart = ((f, areas[left[1]]), (g, areas[right[1]]))
            if isinstance(both, Operator):
                refusal = self._dear(both, apart, areas[right[1]])
            elif _multipliable(f, g):
                numbers = self._dear(algebra.product(f, g), apart, areas[right[1]]).detail
                refusal = replace(both, detail=f"{both.detail}; merged, {numbers}" if both.detail else numbers)
            else:
                refusal = both
            notes.append(refusal.at(where))
        return notes

    def _join_notes(
        self,
        join: Join,
        branches: list[_Option],
        groups: list[tuple[int, ...]],
        whole: Operator | Refusal,
        area: Fraction,
    ) -> list[Refusal]:
        if isinstance(whole, Refusal):
            return [whole.at(str(join.node))]
        singles = [self._merge(join.kind, [branches[i].op for i in g]) for g in groups]
        ops = [(o, area) for o in singles if isinstance(o, Operator)]
        if not any(o.weighted for o, _ in ops):
            return []
        return [self._dear(whole, ops, area).at(ops[0][0].path or str(join.node))]

    def _dear(self, both: Operator, apart: Sequence[tuple[Operator, Fraction]], area: Fraction) -> Refusal:
        """The refusal of a merge that is exact but does not pay, with its two numbers."""
        ready = algebra.finish(both)
        pattern = both.applied[-1] if len(set(both.applied)) == 1 else ""
        new = [a for a in both.applied if a not in [x for op, _ in apart for x in op.applied]]
        pattern = new[0] if new else pattern
        if isinstance(ready, Refusal):
            return ready.by(pattern)
        together = self._price(ready[0], area)[1]
        before = sum((self._price(o, a)[1] for o, a in apart), Fraction(0))
        unit = area if area else Fraction(1)
        return Refusal(
            "exact, but merged it would cost more",
            detail=f"{_number(together / unit)} instead of {_number(before / unit)} per output position",
            remedy=f'patterns=["{pattern}!"] merges it all the same' if pattern else "",
            pattern=pattern,
        )


def _on_axis(join: Join, op: Operator | Refusal) -> Operator | Refusal:
    if isinstance(op, Refusal) or join.spatial in (None, op.spatial):
        return op
    return Refusal("the concatenated axis is not the channel axis of its inputs")


def _steps(join: Join) -> Iterator[Step]:
    """Every step below a join, branch by branch."""
    for part in (p for b in join.branches for p in b.parts):
        yield from (part,) if isinstance(part, Step) else _steps(part)


def _multipliable(f: Operator, g: Operator) -> bool:
    """Whether the two are convolutions whose product has a cost to compare."""
    meet = f.spatial == g.spatial and f.out_channels == g.in_channels
    return meet and f.weighted and g.weighted and not (f.transposed or g.transposed)


def _rank(op: Operator | Refusal) -> int:
    kinds = ("conv", "pool", "pad", "select", "scale", "identity")
    return kinds.index(op.kind) if isinstance(op, Operator) else -1


def _number(value: Fraction) -> str:
    return f"{float(value):,.0f}" if value >= 1000 else f"{float(value):,.6g}"


def fuses(segments: Iterable[Segment]) -> Iterator[Fuse]:
    """Every fused stretch, those inside a join that stays included, in order."""
    for segment in segments:
        if isinstance(segment, Fuse):
            yield segment
        elif isinstance(segment, Rejoin):
            for piece in segment.pieces:
                yield from fuses(piece)
