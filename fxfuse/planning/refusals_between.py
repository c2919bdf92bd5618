"""Why neighbours were not merged: what stands in the way, or what the merge would cost.

Asked of the finished cover of a chain or join, about stretches that lie side by side in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

from fxfuse.algebra.chain import product
from fxfuse.algebra.operator import Operator
from fxfuse.planning.fusing import STEPS, TOO_LONG, WINDOW, Fusing, Result
from fxfuse.planning.regions import Chain, Join, Part, exit_of, nodes_of
from fxfuse.planning.sites import Refused
from fxfuse.refusal import Refusal

NO_LAYER = "exact, but there is no convolution or linear layer to absorb it, and a new one would cost more"


def in_chain(
    fusing: Fusing, chain: Chain, ops: Sequence[Result], cuts: Sequence[tuple[int, int]], areas: Sequence[Fraction]
) -> list[Refused]:
    """For each two neighbouring stretches of a chain; `areas` are positions before each part and after all."""
    found = []
    stretches = [fusing.combined("chain", ops[i:j]) for i, j in cuts]
    for ((start, middle), (_, end)), (f, g) in zip(pairwise(cuts), pairwise(stretches), strict=True):
        if isinstance(f, Refusal) or isinstance(g, Refusal) or not (f.weighted or g.weighted):
            continue
        if {"identity", "commuting"} & {f.kind, g.kind}:
            continue
        parts, tried, area = chain.parts[start:end], ops[start:end], areas[end]
        refusal, apart = fusing.combine("chain", f, g), ((f, areas[middle]), (g, area))
        if len(parts) > STEPS or sum(isinstance(o, Operator) and o.weighted for o in tried) > WINDOW:
            refusal = TOO_LONG
        elif isinstance(refusal, Operator):
            refusal = unfused(fusing, refusal, apart, parts)
        elif _multipliable(f, g):
            numbers = unfused(fusing, product(f, g), apart, parts).detail
            refusal = replace(refusal, detail="; merged, ".join(filter(None, (refusal.detail, numbers))))
        refusal = refusal.at(g.path or f.path or str(chain.parts[middle].node))
        found.append(Refused(refusal, tuple(nodes_of(*chain.parts[middle:end]))))
    return found


def in_join(fusing: Fusing, join: Join, groups: Sequence[Result], whole: Result, area: Fraction) -> list[Refused]:
    """For the groups that remain of the branches of a join."""
    ops = [(o, area) for o in groups if isinstance(o, Operator)]
    path = next((o.path for o, _ in ops if o.path), str(join.node))
    if isinstance(whole, Refusal):
        refusal = whole.at(str(join.node))
    elif any(o.weighted for o, _ in ops):
        refusal = unfused(fusing, whole, ops, [join]).at(path)
    elif any(o.kind == "pool" for o, _ in ops):
        refusal = Refusal(NO_LAYER, where=path)
    else:
        return []
    single = (b.parts[0] for b in join.branches if len(b.parts) == 1)  # those that nothing else could be said of
    return [Refused(refusal, (*join.nodes, *nodes_of(*single)))]


def unfused(
    fusing: Fusing, both: Operator, apart: Sequence[tuple[Operator, Fraction]], parts: Sequence[Part]
) -> Refusal:
    """What forbids a merge that the patterns allow, or else that it does not pay, with its two numbers.

    `apart` are the operators as they are, each with its output positions.
    """
    before = [a for op, _ in apart for a in op.applied]
    pattern = both.applied[-1] if len(set(both.applied)) == 1 else ""
    pattern = next((a for a in both.applied if a not in before), pattern)
    area, end = apart[-1][1], exit_of(parts)
    found, unit = fusing.fused(both, parts, area), area or Fraction(1)
    if isinstance(found, Refusal):
        return found.by(pattern)
    together = found[0][1] / unit
    single = sum((fusing.price(o, a, 1, end)[1] for o, a in apart), Fraction(0)) / unit
    border = together - fusing.price(replace(found[1].op, framed=False), area, 1, end)[1] / unit
    of_border = f", {_number(border)} of it for the border" if found[1].op.framed else ""
    return Refusal(
        "exact, but merged it would cost more",
        detail=f"{_number(together)} instead of {_number(single)} per output position{of_border}",
        remedy=f'patterns=["{pattern}!"] merges it all the same' if pattern else "",
        pattern=pattern,
    )


def _multipliable(f: Operator, g: Operator) -> bool:
    """Whether the two are convolutions whose product has a cost to compare."""
    meet = f.spatial == g.spatial and f.out_channels == g.in_channels
    return meet and f.weighted and g.weighted and not (f.transposed or g.transposed)


def _number(value: Fraction) -> str:
    return f"{float(value):,.0f}" if value >= 1000 else f"{float(value):,.6g}"
