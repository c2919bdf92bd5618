"""The cheapest cover of a chain by stretches that become one operator and parts that stay, by dynamic programming.

As in matrix-chain multiplication, every contiguous stretch that the patterns can collapse exactly is a candidate. So a
step that costs more alone is taken where it pays in the end. A part that is a join is first covered itself: each of its
branches, and then the cheapest choice of branches to merge.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import pairwise

from fxfuse.algebra import combine
from fxfuse.algebra.operator import IDENTITY, Operator
from fxfuse.planning import refusals_between
from fxfuse.planning.branch_groups import FREE, Group, Price, cut, partition, plus
from fxfuse.planning.factor_orders import orders
from fxfuse.planning.fusing import STEPS, TOO_LONG, WINDOW, Fusing, Option, Result
from fxfuse.planning.regions import Chain, Join, Part
from fxfuse.planning.sites import Fuse, Refused, Rejoin, Segment
from fxfuse.refusal import Refusal

UNREACHED: Price = (10**9, Fraction(0), 0)
NOT_ABSORBED: Price = (10**6, Fraction(0), 0)  # a moved factor that no layer takes: its node stands elsewhere
_ORDER = ("warp", "conv", "pool", "pad", "select", "scale", "identity")  # in which the branches of a sum are merged


def best_of_chain(fusing: Fusing, chain: Chain, area: Fraction) -> Option:
    """Best cover of the parts in the order that allows the cheapest; `area` are positions before the chain."""
    every = (chain.parts, *orders(chain.parts, fusing.view))
    return min((_cover(fusing, replace(chain, parts=parts), area) for parts in every), key=lambda o: o.price)


def _cover(fusing: Fusing, chain: Chain, area: Fraction) -> Option:
    """Best cover of the parts, and the operator of them all where there is one."""
    areas, count = fusing.areas(chain.parts, area), len(chain.parts)
    options = [_option(fusing, part, before) for part, before in zip(chain.parts, areas, strict=False)]
    best: list[tuple[Price, int, Fuse | None]] = [(FREE, 0, None), *[(UNREACHED, 0, None)] * count]
    whole: Result = IDENTITY
    for i in range(count):
        here = best[i][0]
        keep = plus(here, options[i].price)
        if keep <= best[i + 1][0]:  # a tie leaves the part alone
            best[i + 1] = (keep, i, None)
        op, weighted = options[i].op, 0
        for j in range(i, count):
            part_op = options[j].op
            op = fusing.combine("chain", op, part_op) if j > i else op
            if isinstance(op, Refusal):
                break
            weighted += isinstance(part_op, Operator) and part_op.weighted
            if weighted > WINDOW or j - i >= STEPS:
                op = TOO_LONG
                break
            fused = fusing.fused(op, chain.parts[i : j + 1], areas[j + 1])
            if not isinstance(fused, Refusal) and (total := plus(here, fused[0])) < best[j + 1][0]:
                best[j + 1] = (total, i, fused[1])
        whole = op if i == 0 else whole
    ends = [count]
    while ends[-1] > 0:
        ends.append(best[ends[-1]][1])
    cuts = list(pairwise(reversed(ends)))
    segments, refused = list[Segment](), list[Refused]()
    for start, end in cuts:
        fuse = best[end][2]
        segments += options[start].segments if fuse is None else [fuse]
        refused += options[start].refused if fuse is None else []
    refused += refusals_between.in_chain(fusing, chain, [o.op for o in options], cuts, areas)
    return Option(best[count][0], tuple(segments), whole, tuple(refused))


def _option(fusing: Fusing, part: Part, area: Fraction) -> Option:
    if isinstance(part, Join):
        branches = [best_of_chain(fusing, b, area) for b in part.branches]
        return _best_of_join(fusing, part, branches, fusing.area_after(part, area))
    executed = int(part.node is not None) + part.op.computed + combine.FRAME * part.op.framed
    price = fusing.price(part.op, fusing.area(part.node, area, part.op), executed, part.node)
    return Option(NOT_ABSORBED if part.moved else price, (part,), part.op)


def _best_of_join(fusing: Fusing, join: Join, branches: list[Option], area: Fraction) -> Option:
    """The join with those `branches` merged that pay; `area` are its output positions."""

    @cache
    def merged(group: Group) -> Result:
        if len(group) > STEPS:
            return Refusal("the branches are too many to be tried as one operator")
        ops = [branches[i].op for i in group]
        if join.kind == "sum":
            ranked = sorted(ops, key=lambda op: -1 if isinstance(op, Refusal) else _ORDER.index(op.kind))
            return fusing.combined("sum", ranked)
        return ops[0] if len(ops) == 1 else fusing.combine("concat", merged(group[:-1]), ops[-1])

    @cache
    def best(group: Group) -> Option | None:
        if len(group) == 1:
            return branches[group[0]]
        op, part = _on_axis(join, merged(group)), replace(join, branches=tuple(join.branches[i] for i in group))
        found = fusing.fused(op, [part], area)
        return None if isinstance(found, Refusal) else Option(found[0], (found[1],), op)

    def price(group: Group) -> Price | None:
        return None if (option := best(group)) is None else option.price

    count = len(branches)
    groups = partition(count, price) if join.kind == "sum" else cut(count, price, STEPS)
    options = [o for o in map(best, groups) if o is not None]
    whole = _on_axis(join, merged(tuple(range(count))))
    joins = len(groups) - 1 if join.kind == "sum" else int(len(groups) > 1)
    total = plus(*(o.price for o in options), (0, Fraction(0), joins))
    refused = [r for o in options for r in o.refused]
    if len(groups) > 1:
        refused += refusals_between.in_join(fusing, join, [o.op for o in options], whole, area)
    elif isinstance(only := options[0].segments[0], Fuse):
        return Option(total, (replace(only, parts=(join,)),), whole, tuple(refused))
    return Option(total, (Rejoin(join, tuple(o.segments for o in options)),), whole, tuple(refused))


def _on_axis(join: Join, op: Result) -> Result:
    if isinstance(op, Refusal) or join.spatial in (None, op.spatial):
        return op
    return Refusal("the concatenated axis is not the channel axis of its inputs")
