"""Whether the parts of a stretch can be one operator, and what that operator costs.

All that the search over chains and joins asks: how operators combine, on how many positions they work, what they
cost, and what forbids to run them as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import reduce
from itertools import accumulate

import torch
from torch.fx import Node

from fxfuse.algebra import combine
from fxfuse.algebra.operator import Operator
from fxfuse.cost import CostFunction
from fxfuse.pattern import Selection
from fxfuse.planning.branch_groups import Price
from fxfuse.planning.conflicts import answers
from fxfuse.planning.regions import Join, Part, Step, exit_of, steps_of
from fxfuse.planning.sites import Fuse, Refused, Segment
from fxfuse.reading.view import View
from fxfuse.refusal import Refusal

Result = Operator | Refusal
WINDOW = 64  # convolutions in one stretch: bounds a search that grows with the square of their number,
STEPS = 2 * WINDOW  # and all steps, each of which is an operator inside the next one
TOO_LONG = Refusal("the chain is too long to be tried as one operator")


@dataclass(frozen=True, slots=True)
class Option:
    """The best known form of a part: segments and their price; `op` when it can be one operator."""

    price: Price
    segments: tuple[Segment, ...]
    op: Result
    refused: tuple[Refused, ...] = ()


@dataclass
class Fusing:
    """What the patterns and the cost say of the operators of one view: the base of every stage of a plan.

    `refusals` are those that a stage after the first has met.
    """

    view: View
    patterns: Selection
    cost: CostFunction
    refusals: list[Refusal] = field(default_factory=list)

    def area(self, node: Node | None, before: Fraction, op: Operator) -> Fraction:
        """Output positions of an operator: counted from known shapes, else relative to the entry."""
        counted = self._positions(node, op.spatial)
        return before * op.pixels if counted is None else counted

    def areas(self, parts: Sequence[Part], before: Fraction) -> list[Fraction]:
        """Output positions before each part and after all."""
        return list(accumulate(parts, lambda area, part: self.area_after(part, area), initial=before))

    def area_after(self, part: Part, before: Fraction) -> Fraction:
        """Output positions after a part."""
        if isinstance(part, Step):
            return before if part.moved else self.area(part.node, before, part.op)
        spatial = next((s.op.spatial for s in steps_of(part) if s.op.spatial is not None), None)
        counted = self._positions(part.node, spatial)
        return self.areas(part.branches[0].parts, before)[-1] if counted is None else counted

    def _positions(self, node: Node | None, spatial: int | None) -> Fraction | None:
        """Elements of a known shape for each channel, the batch included."""
        shape = self.view.shapes.get(node) if node is not None else None
        if shape is None or spatial is None or len(shape) <= spatial or not shape[-spatial - 1]:
            return None
        return Fraction(shape.numel(), shape[-spatial - 1])

    def price(self, op: Operator, area: Fraction, executed: int = 1, node: Node | None = None) -> Price:
        forced = sum(name in self.patterns.forced for name in op.applied)
        if op.kind == "identity":
            return (0, Fraction(0), executed)
        cost = Fraction(self.cost(op, area))
        if op.framed:  # one map for all samples at `node`
            shape = self.view.shapes.get(node, torch.Size()) if node is not None else torch.Size()
            batch = shape[: -(op.spatial or 0) - 1].numel() if op.spatial and shape else 1
            cost += Fraction(self.cost(op.frame_conv, area / (batch or 1)))
        return (-forced, cost, executed)

    def combine(self, relation: str, f: Result, g: Result) -> Result:
        """What `f` and `g` become in a relation; refused where either already is."""
        if isinstance(f, Refusal):
            return f
        if isinstance(g, Refusal) or "commuting" not in (f.kind, g.kind):
            return g if isinstance(g, Refusal) else self.patterns.combine(relation, f, g)
        return Refusal("a reshape, permutation or average stands between")

    def combined(self, relation: str, ops: Sequence[Result]) -> Result:
        """All of the operators as one, from the first on."""
        return reduce(lambda f, g: self.combine(relation, f, g), ops)

    def fused(self, op: Result, parts: Sequence[Part], area: Fraction) -> tuple[Price, Fuse] | Refusal:
        """The parts run as one operator and its price; refused where that is no change or impossible."""
        if isinstance(op, Refusal):
            return op
        real = sum(not (isinstance(p, Step) and p.op.kind == "identity") for p in parts)
        if real < 2 and not any(isinstance(p, Join) for p in parts):
            op = self.patterns.combine("alone", op, op)
        ready = op if isinstance(op, Refusal) else combine.finish(op)
        if isinstance(ready, Refusal):
            return ready
        if answers(parts, self.view.sized) is None:
            return Refusal("somebody asks for the size of a value that would be gone, and no other value has that size")
        op, executed = ready
        return self.price(op, area, executed, exit_of(parts)), Fuse(op, tuple(parts))
