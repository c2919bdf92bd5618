"""The way of a permutation of channels to a layer that takes it into its weight, or why there is none.

Every value on the way is read by the next node alone. A permutation that would not vanish in the end stays where it
is, and so does one that would leave a batch norm or a factor to permute its numbers at every call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, islice
from typing import NamedTuple

from torch.fx import Node

from fxfuse.algebra import combine
from fxfuse.algebra.constants import Apply
from fxfuse.algebra.operator import Operator, pointwise
from fxfuse.cost import CostFunction
from fxfuse.names import place
from fxfuse.pattern import Selection
from fxfuse.reading.movable.permutations import Permutation, indexed, permutation_of
from fxfuse.reading.view import View
from fxfuse.rearranging.permutation_passing import Passed, passed
from fxfuse.refusal import Refusal

FAR = 64  # nodes on a way that are looked at: bounds a search that grows with the square of their number
NAMED = 3  # readers of a value that a refusal names
STRAIGHT = ("scale", "identity", "select", "pad")  # kinds that a layer takes in together with a permutation


class Route(NamedTuple):
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
        run = self.view.after(node) if forward else self.view.before(node, reader)
        for here, step in islice(run, FAR):
            layer = step.op
            if (here not in node.users) if forward else (reader not in here.users):
                break  # it reads a piece of it
            if permutation.groups is None and here in self.view.sized and not (forward and layer.weighted):
                return Refusal(f"the size of {place(here)} is asked for")
            both = self._chained(op, layer, forward)
            if layer.weighted:
                return self._pays(both, layer, here)
            if isinstance(both, Refusal) or layer.kind not in STRAIGHT:
                break
            op, node, reader = both, here, here
        return Refusal("")

    def _pays(self, both: Operator | Refusal, layer: Operator, node: Node) -> Refusal | None:
        """Why a layer does not take what it meets, None if it does at no more cost than its own."""
        one, two = combine.finish(layer), both if isinstance(both, Refusal) else combine.finish(both)
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
        for step in steps:
            if step.rows is not None and not self._held(permutation, nodes, step.node, forward):
                return Refusal(f"{place(step.node)} is in no layer, and would permute its numbers at every call")
        return None

    def _held(self, permutation: Permutation, way: Sequence[Node], node: Node, forward: bool) -> bool:
        """Whether the permuted numbers of a node on the way end up in a layer."""
        op = self.view.affine[node].op
        if op.weighted:
            return not isinstance(self.patterns.combine("alone", _computed(op), _computed(op)), Refusal)
        at, start = way.index(node), permutation.nodes[0]
        run = self.view.before(permutation.source, start) if forward else self.view.after(permutation.last)
        there = chain(way[:at][::-1], (n for n, _ in run))  # on the side on which the permutation is
        return self._absorbed(op, there, not forward) or self._absorbed(op, way[at + 1 :], forward)

    def _absorbed(self, op: Operator, nodes: Iterable[Node], forward: bool) -> bool:
        """Whether an operator and the `nodes` that come after it, or before it, are one layer."""
        for node in nodes:
            affine = self.view.affine.get(node)
            both = None if affine is None else self._chained(op, affine.op, forward)
            if affine is None or not isinstance(both, Operator) or both.framed:
                return False
            if affine.op.weighted:
                return not isinstance(combine.finish(both), Refusal)
            op = both
        return False

    def _chained(self, op: Operator, other: Operator, forward: bool) -> Operator | Refusal:
        """An operator and the one that comes after it, or before it, as one."""
        return self.patterns.combine("chain", *((op, other) if forward else (other, op)))


def permutations_left(view: View, patterns: Selection, price: CostFunction, fused: Set[Node]) -> list[Refusal]:
    """A refusal for each permutation in the view that is not `fused`."""
    routes, notes = Routes(view, patterns, price), list[Refusal]()
    single = [permutation_of(n, a) for n, a in view.affine.items() if n not in fused]
    by_tensor = [i.permutation for i in indexed(view) if i.permutation.whole]
    for permutation in (*filter(None, single), *by_tensor, *view.movable.shuffles):
        found, where = routes.find(permutation), place(permutation.last)
        if isinstance(found, Route):
            reason = "a permutation of channels stays: what it reads is written in place before a layer could take it"
            notes.append(Refusal(reason, where, "use the out-of-place form"))
            continue
        behind, ahead = found
        reason = "a permutation of channels stays: no layer before it or after it can take it into its weight"
        remedy = "a layer with groups=1 takes it, past activations and depthwise layers that nothing else reads"
        notes.append(Refusal(reason, where, remedy, f"before it {behind.reason}; after it {ahead.reason}"))
    return notes


def _computed(op: Operator) -> Operator:
    """`op` as it is with an expression for its weight."""
    weight = op.const("weight")
    expression = Apply("clone", (weight,), (), weight.shape, weight.dtype)
    return replace(op, consts=tuple((dict(op.consts) | {"weight": expression}).items()))
