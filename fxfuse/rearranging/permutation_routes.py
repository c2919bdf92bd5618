"""The way of a permutation of channels to a layer that takes it into its weight, past what lies between.

Every value on the way is read by the next node alone. A permutation that would not vanish in the end stays where it
is, and so does one that would leave a batch norm or a factor to permute its numbers at every call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice

from torch.fx import Node

from fxfuse.algebra import combine
from fxfuse.algebra.constants import Apply
from fxfuse.algebra.operator import Operator, pointwise
from fxfuse.cost import CostFunction
from fxfuse.names import place
from fxfuse.pattern import Selection
from fxfuse.reading.affine import Affine
from fxfuse.reading.movable.permutation import Permutation
from fxfuse.reading.runs import after, before
from fxfuse.reading.view import View
from fxfuse.rearranging.permutation_passing import Passed, passed
from fxfuse.refusal import Refusal

FAR = 64  # nodes on a way that are looked at: bounds a search that grows with the square of their number
NAMED = 3  # readers of a value that a refusal names
STRAIGHT = ("scale", "identity", "select", "pad")  # kinds that a layer takes in together with a permutation


@dataclass(frozen=True, slots=True)
class Route:
    """The nodes that a permutation passes, the first one first; `forward` if the layer comes after them."""

    steps: tuple[Passed, ...]
    forward: bool


@dataclass(frozen=True)
class Routes:
    """Finds routes in one view."""

    view: View
    patterns: Selection
    price: CostFunction

    def find(self, permutation: Permutation) -> Route | tuple[Refusal, Refusal]:
        """The shorter route, or what stands in the way before the permutation and after it."""
        ahead, behind = self._walk(permutation, True), self._walk(permutation, False)
        if isinstance(ahead, Refusal) and isinstance(behind, Refusal):
            return behind, ahead
        return min((r for r in (ahead, behind) if isinstance(r, Route)), key=lambda r: len(r.steps))

    def _walk(self, permutation: Permutation, forward: bool) -> Route | Refusal:
        node, reader = (permutation.last if forward else permutation.source), permutation.nodes[0]
        reads, steps = permutation.reads, list[Passed]()
        while len(steps) < FAR:
            wide = len(reads) if steps else permutation.channels or len(reads)
            op = pointwise("select", "select", permutation.spatial, len(reads), reads=reads, in_channels=wide)
            layer = self._taken(op, node, reader, permutation, forward)
            if layer is None:
                return self._blocked(permutation, steps, forward) or Route(tuple(steps), forward)
            following = self.view.readers(node)
            if len(following) != 1 or following[0] not in node.users:
                told = ", ".join(place(n) for n in following[:NAMED])
                return Refusal(f"{place(node)} is read by {told or 'nobody'}")
            node = following[0] if forward else node
            step = passed(node, self.view, permutation, reads, forward)
            if isinstance(step, Refusal):
                return step if step.reason else layer
            steps.append(step)
            reads = step.reads
            if not forward:
                reader, node = node, self.view.source(node)
        return Refusal(f"no layer is among the next {FAR} operations")

    def _taken(self, op: Operator, node: Node, reader: Node, permutation: Permutation, forward: bool) -> Refusal | None:
        """None where the next layer takes a permutation that stands after `node`, else why it does not, "" if none."""
        affine, readers = self.view.affine, self.view.readers
        run = after(node, affine, readers) if forward else before(node, reader, affine, readers)
        for here, step in islice(run, FAR):
            layer = step.op
            if (here not in node.users) if forward else (reader not in here.users):
                break  # it reads a piece of it
            if permutation.plain and here in self.view.sized and not (forward and layer.weighted):
                return Refusal(f"the size of {place(here)} is asked for")
            both = self.patterns.combine("chain", *((op, layer) if forward else (layer, op)))
            if layer.weighted:
                return self._pays(both, layer, here)
            if isinstance(both, Refusal) or layer.kind not in STRAIGHT:
                break
            op, node, reader = both, here, here
        return Refusal("")

    def _pays(self, both: Operator | Refusal, layer: Operator, node: Node) -> Refusal | None:
        """Why a layer does not take what it meets, None if it does at no more cost than its own."""
        if isinstance(both, Refusal):
            return Refusal(f"{place(node)} cannot take it: {both.reason}")
        one, two = combine.finish(layer), combine.finish(both)
        if isinstance(one, Refusal) or isinstance(two, Refusal):
            why = two.reason if isinstance(two, Refusal) else ""
            return Refusal(f"{place(node)} cannot take it: {why}")
        if two[1] > one[1] or self.price(two[0], Fraction(1)) > self.price(one[0], Fraction(1)):
            return Refusal(f"{place(node)} has groups, and would cost more without them")
        return None

    def _blocked(self, permutation: Permutation, steps: Sequence[Passed], forward: bool) -> Refusal | None:
        """What else forbids that the permutation passes `steps`, after which a layer takes it."""
        if not steps:
            return None
        effects, nodes = self.view.effects, [s.node for s in steps]
        own = {*nodes, *permutation.nodes}
        at = [effects.position[n] for n in (*own, *(self.view.readers(nodes[-1]) if forward else ()))]
        writer = effects.written_between(permutation.source, min(at), max(at), own)
        for node in (n for n in nodes if n in effects.writes):
            mine = effects.private_write(node) and (not forward or effects.private(permutation.source, node))
            writer = writer or (None if mine else node)
        if writer is not None:
            return Refusal(f"{place(writer)} writes in place what others read")
        for number, step in enumerate(steps):
            if step.rows is not None and not self._held(permutation, steps, number, forward):
                return Refusal(f"{place(step.node)} is in no layer, and would permute its numbers at every call")
        return None

    def _held(self, permutation: Permutation, steps: Sequence[Passed], number: int, forward: bool) -> bool:
        """Whether the permuted numbers of a step end up in a layer."""
        affine = self.view.affine
        op = affine[steps[number].node].op
        if op.weighted:
            return not isinstance(self.patterns.combine("alone", _computed(op), _computed(op)), Refusal)
        ordered = steps if forward else steps[::-1]
        middle = [a.op if (a := affine.get(s.node)) is not None else None for s in ordered]
        readers, start = self.view.readers, permutation.nodes[0]
        first = _to_layer(before(permutation.source, start, affine, readers))[::-1] if forward else []
        last = [] if forward else _to_layer(after(permutation.last, affine, readers))
        row = [*first, *middle, *last]
        where = len(first) + (number if forward else len(steps) - 1 - number)
        return any(self._absorbed(row, where, way) for way in (-1, 1))

    def _absorbed(self, row: Sequence[Operator | None], where: int, way: int) -> bool:
        """Whether the operator at `where` and those next to it on one side are one layer."""
        whole, there = row[where], where + way
        while 0 <= there < len(row) and (other := row[there]) is not None and whole is not None:
            both = self.patterns.combine("chain", *((whole, other) if way > 0 else (other, whole)))
            if isinstance(both, Refusal) or both.framed:
                return False
            if other.weighted:
                return not isinstance(combine.finish(both), Refusal)
            whole, there = both, there + way
        return False


def _to_layer(run: Iterator[tuple[Node, Affine]]) -> list[Operator]:
    """The operators of a run up to a layer."""
    found = list[Operator]()
    for _, step in run:
        found.append(step.op)
        if step.op.weighted:
            break
    return found


def _computed(op: Operator) -> Operator:
    """`op` as it is with an expression for its weight."""
    weight = op.const("weight")
    expression = Apply("clone", (weight,), (), weight.shape, weight.dtype)
    return replace(op, consts=tuple((k, expression if k == "weight" else c) for k, c in op.consts))
