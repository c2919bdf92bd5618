"""Why neighbours stayed apart: what stands in the way of a merge, or what it would cost.

Asked of the finished cover of a chain or join, about stretches that lie side by side in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import reduce
from itertools import pairwise

from torch.fx import Node

from fxfuse.algebra import combine
from fxfuse.algebra.operator import Operator
from fxfuse.planning.branch_groups import Price
from fxfuse.planning.regions import Chain, Join, exit_of
from fxfuse.refusal import Refusal

Result = Operator | Refusal
NO_LAYER = "exact, but there is no convolution or linear layer to absorb it, and a new one would cost more"


@dataclass(frozen=True, slots=True)
class Apart:
    """`combine` and `price` are the planner's."""

    combine: Callable[[str, Result, Result], Result]
    price: Callable[[Operator, Fraction, int, Node | None], Price]

    def in_chain(
        self, chain: Chain, ops: Sequence[Result], cuts: Sequence[tuple[int, int]], areas: Sequence[Fraction]
    ) -> list[Refusal]:
        """For each two neighbouring stretches of a chain; `areas` are positions before each part and after all."""
        notes = []
        stretches = [reduce(lambda f, g: self.combine("chain", f, g), ops[i:j]) for i, j in cuts]
        for (left, right), (f, g) in zip(pairwise(cuts), pairwise(stretches), strict=True):
            if isinstance(f, Refusal) or isinstance(g, Refusal):
                continue
            if not (f.weighted or g.weighted) or {"identity", "carry"} & {f.kind, g.kind}:
                continue
            last = chain.parts[right[0]]
            both = self.combine("chain", f, g)
            apart, end = ((f, areas[left[1]]), (g, areas[right[1]])), exit_of(chain.parts[left[0] : right[1]])
            if isinstance(both, Operator):
                refusal = self._dear(both, apart, areas[right[1]], end)
            elif _multipliable(f, g):
                numbers = self._dear(combine.product(f, g), apart, areas[right[1]], end).detail
                refusal = replace(both, detail=f"{both.detail}; merged, {numbers}" if both.detail else numbers)
            else:
                refusal = both
            notes.append(refusal.at(g.path or f.path or str(last.node)))
        return notes

    def in_join(self, join: Join, groups: Sequence[Result], whole: Result, area: Fraction) -> list[Refusal]:
        """For the groups that remain of the branches of a join."""
        if isinstance(whole, Refusal):
            return [whole.at(str(join.node))]
        ops = [(o, area) for o in groups if isinstance(o, Operator)]
        path = next((o.path for o, _ in ops if o.path), str(join.node))
        if any(o.weighted for o, _ in ops):
            return [self._dear(whole, ops, area, join.node).at(path)]
        return [Refusal(NO_LAYER, where=path)] if any(o.kind == "pool" for o, _ in ops) else []

    def _dear(self, both: Operator, apart: Sequence[tuple[Operator, Fraction]], area: Fraction, end: Node) -> Refusal:
        """The refusal of a merge that is exact but does not pay, with its two numbers."""
        ready = combine.finish(both)
        pattern = both.applied[-1] if len(set(both.applied)) == 1 else ""
        new = [a for a in both.applied if a not in [x for op, _ in apart for x in op.applied]]
        pattern = new[0] if new else pattern
        if isinstance(ready, Refusal):
            return ready.by(pattern)
        together = self.price(ready[0], area, 1, end)[1]
        before = sum((self.price(o, a, 1, end)[1] for o, a in apart), Fraction(0))
        unit = area if area else Fraction(1)
        plain = self.price(replace(ready[0], framed=False), area, 1, end)[1]
        of_border = f", {_number((together - plain) / unit)} of it for the border" if ready[0].framed else ""
        return Refusal(
            "exact, but merged it would cost more",
            detail=f"{_number(together / unit)} instead of {_number(before / unit)} per output position{of_border}",
            remedy=f'patterns=["{pattern}!"] merges it all the same' if pattern else "",
            pattern=pattern,
        )


def _multipliable(f: Operator, g: Operator) -> bool:
    """Whether the two are convolutions whose product has a cost to compare."""
    meet = f.spatial == g.spatial and f.out_channels == g.in_channels
    return meet and f.weighted and g.weighted and not (f.transposed or g.transposed)


def _number(value: Fraction) -> str:
    return f"{float(value):,.0f}" if value >= 1000 else f"{float(value):,.6g}"
