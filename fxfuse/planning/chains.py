"""The cheapest cover of a chain by stretches that become one operator and parts that stay, by dynamic programming.

As in matrix-chain multiplication, every contiguous stretch that the patterns can collapse exactly is a candidate. So a
step that costs more alone is taken where it pays in the end.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

from fxfuse.algebra import combine
from fxfuse.algebra.operator import IDENTITY, Operator
from fxfuse.planning import refusals_between
from fxfuse.planning.branch_groups import FREE, Price, plus
from fxfuse.planning.factor_orders import orders
from fxfuse.planning.fusing import STEPS, TOO_LONG, WINDOW, Fusing, Option, Result
from fxfuse.planning.joins import best_of_join
from fxfuse.planning.regions import Chain, Join, Step
from fxfuse.planning.sites import Fuse, Keep, Refused, Segment
from fxfuse.refusal import Refusal

UNREACHED: Price = (10**9, Fraction(0), 0)
NOT_ABSORBED: Price = (10**6, Fraction(0), 0)  # a moved factor that no layer takes: its node stands elsewhere


def best_of_chain(fusing: Fusing, chain: Chain, area: Fraction) -> Option:
    """Best cover of the parts in the order that allows the cheapest; `area` are positions before the chain."""
    every = (chain.parts, *orders(chain.parts, fusing.view))
    return min((_cover(fusing, replace(chain, parts=parts), area) for parts in every), key=lambda o: o.price)


def _cover(fusing: Fusing, chain: Chain, area: Fraction) -> Option:
    """Best cover of the parts, and the operator of them all where there is one."""
    options, areas = list[Option](), [area]
    for part in chain.parts:
        options.append(_option(fusing, part, areas[-1]))
        areas.append(fusing.area_after(part, areas[-1]))
    count = len(options)
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


def _option(fusing: Fusing, part: Step | Join, area: Fraction) -> Option:
    if isinstance(part, Join):
        branches = [best_of_chain(fusing, b, area) for b in part.branches]
        return best_of_join(fusing, part, branches, fusing.area_after(part, area))
    executed = int(part.node is not None) + part.op.computed + combine.FRAME * part.op.framed
    price = fusing.price(part.op, fusing.area(part.node, area, part.op), executed, part.node)
    return Option(NOT_ABSORBED if part.moved else price, (Keep(part),), part.op)
