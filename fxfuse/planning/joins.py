"""Which branches of a sum or concatenation become one operator: the cheapest choice, given the best of each branch."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import cache

from fxfuse.planning import refusals_between
from fxfuse.planning.branch_groups import FREE, Group, Price, cut, partition, plus
from fxfuse.planning.fusing import STEPS, Fusing, Option, Result, on_axis
from fxfuse.planning.regions import Join
from fxfuse.planning.sites import Fuse, Refused, Rejoin, Segment
from fxfuse.refusal import Refusal


def best_of_join(fusing: Fusing, join: Join, branches: list[Option], area: Fraction) -> Option:
    """The join with those `branches` merged that pay; `area` are its output positions."""
    ops = [b.op for b in branches]

    def fused(group: Group, op: Result) -> tuple[Price, Fuse] | Refusal:
        part = replace(join, branches=tuple(join.branches[i] for i in group))
        return fusing.fused(op, [part], area)

    @cache
    def of_sum(group: Group) -> Price | None:
        if len(group) == 1:
            return branches[group[0]].price
        found = fused(group, fusing.merged(join, [ops[i] for i in group]))
        return None if isinstance(found, Refusal) else found[0]

    @cache
    def run(i: int, j: int) -> Result:
        return ops[i] if i == j else fusing.combine("concat", run(i, j - 1), ops[j])

    def of_run(i: int, j: int) -> Price | None:
        if i == j or j - i >= STEPS:
            return branches[i].price if i == j else None
        found = fused(tuple(range(i, j + 1)), on_axis(join, run(i, j)))
        return None if isinstance(found, Refusal) else found[0]

    groups = partition(len(branches), of_sum) if join.kind == "sum" else cut(len(branches), of_run)
    price, pieces, refused = FREE, list[tuple[Segment, ...]](), list[Refused]()
    merged = [ops[g[0]] if len(g) == 1 else fusing.merged(join, [ops[i] for i in g]) for g in groups]
    for group, op in zip(groups, merged, strict=True):
        found = fused(group, op) if len(group) > 1 else None
        if found is None or isinstance(found, Refusal):
            alone = branches[group[0]]
            price = plus(price, alone.price)
            pieces.append(alone.segments)
            refused += alone.refused
        else:
            price = plus(price, found[0])
            pieces.append((found[1],))
    whole = fusing.merged(join, ops)
    joins = len(groups) - 1 if join.kind == "sum" else int(len(groups) > 1)
    price = plus(price, (0, Fraction(0), joins))
    if len(groups) > 1:
        refused += refusals_between.in_join(fusing, join, merged, whole, area)
    elif isinstance(only := pieces[0][0], Fuse):
        return Option(price, (replace(only, parts=(join,)),), whole, tuple(refused))
    rejoin = Rejoin(join, tuple(pieces), merged=len(groups) < len(branches))
    return Option(price, (rejoin,), whole, tuple(refused))
