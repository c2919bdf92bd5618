"""Layers of one value gathered into wide ones: a stage after the plan has decided what each layer is.

    y1 = relu(conv1(x));  y2 = relu(conv2(x))   =>   y = relu(conv(x));  y1 = y[:, :n1];  y2 = y[:, n1:]

The work is the same, so it pays where x is no longer read again and again and the slices are not too much: measured
on the layers of real models, with convolutions of one tap whose outputs together are no wider than the reads saved,
batch and map aside, and with linear layers that keep the width: query, key and value. A kernel of more taps gains
nothing: there the time goes into arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import groupby

from torch.fx import Node

from fxfuse.algebra.constants import Attr
from fxfuse.algebra.operator import Operator, sources
from fxfuse.cost import CostFunction
from fxfuse.ops.elementwise import Activation, read_activation
from fxfuse.pattern import Selection
from fxfuse.planning.overwritten import overwritten
from fxfuse.planning.regions import Step, part_nodes
from fxfuse.planning.sites import Fuse, Plan, Run, Siblings, Site, fuses
from fxfuse.planning.slice_readers import reshaped
from fxfuse.reading.modes import inside_regions
from fxfuse.reading.view import View
from fxfuse.refusal import Refusal


@dataclass(frozen=True, slots=True)
class _Member:
    """One layer: `plain` where the plan leaves it as it is; its own activation, `act`, where nobody else reads it."""

    fuse: Fuse
    source: Node
    plain: bool
    act: Node | None = None
    activation: Activation | None = None

    @property
    def value(self) -> Node:
        """The node that becomes a slice; of a layer before a pool, the pool reads it."""
        return self.act or self.fuse.exit


@dataclass
class Gather:
    """The stage: `run` gives the plan with its siblings."""

    view: View
    patterns: Selection
    price: CostFunction
    refusals: list[Refusal] = field(default_factory=list)
    regions: set[Node] = field(default_factory=set)

    def run(self, plan: Plan) -> Plan:
        by_source = dict[Node, list[_Member]]()
        self.regions = set(inside_regions(self.view.captured.graph))
        for member in self._members(plan):
            by_source.setdefault(member.source, []).append(member)
        found = list[Siblings]()
        for members in by_source.values():
            found += self._groups(members) if len(members) > 1 else []
        used = self._used(plan.fused()) if any(s.alone for s in found) else {}
        alike = dict[Operator, set[Node]]()
        for group in found:
            alike.setdefault(group.op, set()).update(f.exit for f in group.members)
        found = [s for s in found if not self._twice(s, alike[s.op], used)]
        return replace(plan, siblings=tuple(found), refusals=tuple(dict.fromkeys((*plan.refusals, *self.refusals))))

    def _members(self, plan: Plan) -> list[_Member]:
        """All layers of the plan and those that it leaves alone, in the order in which they run."""
        fused, found = plan.fused(), [(source, fuse, False) for source, fuse in plan.layers()]
        for node, affine in self.view.affine.items():
            if node not in fused and affine.kind == "unary" and affine.op.weighted:
                found.append((affine.inputs[0][0], Fuse(affine.op, (Step(node, affine.op),)), True))
        position = self.view.effects.position
        found.sort(key=lambda f: position[f[1].exit])
        # those of different channels read different values, and deformable ones read more than one
        whole = [f for f in found if f[1].op.reads is None and f[1].op.kind == "conv"]
        return [_Member(fuse, source, plain, *self._activation(fuse)) for source, fuse, plain in whole]

    def _activation(self, fuse: Fuse) -> tuple[Node | None, Activation | None]:
        """The activation that alone reads the layer's output."""
        users = list(fuse.exit.users)
        alone = fuse.pool is None and len(users) == 1 and users[0] not in self.regions
        found = read_activation(users[0], self.view.captured.modules) if alone else None
        return (None if found is None else users[0]), found

    def _groups(self, members: list[_Member]) -> list[Siblings]:
        """Layers of one value, gathered by their geometry."""
        groups, different = list[list[_Member]](), list[Refusal]()
        for member in members:
            for group in groups:
                both = self.patterns.combine("siblings", group[0].fuse.op, member.fuse.op)
                if not isinstance(both, Refusal):
                    group.append(member)
                    break
                if self._joins(group[0]).isdisjoint(self._joins(member)):
                    different.append(both.at(member.fuse.op.path))
            else:
                groups.append([member])
        self.refusals += different[:1]
        return [g for g in (self._gathered(g) for g in groups if len(g) > 1) if g is not None]

    def _joins(self, member: _Member) -> set[Node]:
        """The sums and concatenations that read the layer's output: there it has been tried as a branch."""
        affine = self.view.affine
        return {u for u in member.fuse.exit.users if u in affine and affine[u].kind != "unary"}

    def _gathered(self, members: list[_Member]) -> Siblings | None:
        able, views = list[_Member](), list[Node]()
        for member in members:
            own = {n for p in member.fuse.parts for n in part_nodes(p)}
            own |= set() if member.act is None else {member.act}
            found = () if member.fuse.pool is not None else reshaped(member.value, self.view, own)
            if isinstance(found, Refusal):
                self.refusals.append(found.by("siblings").at(member.fuse.op.path))
            else:
                able.append(member)
                views += found
        if len(able) < 2:
            return None
        able = self._ordered(able)
        op: Operator | Refusal = able[0].fuse.op
        for member in able[1:]:
            op = op if isinstance(op, Refusal) else self.patterns.combine("siblings", op, member.fuse.op)
        op = op if isinstance(op, Refusal) else self._blocked(able) or self._dear(op, able) or op
        if isinstance(op, Refusal):
            self.refusals.append(op.by("siblings").at(able[0].fuse.op.path))
            return None
        alone = tuple(Site(m.source, (m.fuse,)) for m in able if m.plain)
        return Siblings(op, tuple(m.fuse for m in able), _runs(able), alone, tuple(views))

    def _ordered(self, members: list[_Member]) -> list[_Member]:
        """Equal activations side by side, and among them what meets in a concatenation, in its order."""
        kinds = list(dict.fromkeys(m.activation for m in members))
        position = self.view.effects.position

        def place(member: _Member) -> tuple[int, int, int, int]:
            kind, here = kinds.index(member.activation), position[member.fuse.exit]
            for user in member.value.users:
                affine = self.view.affine.get(user)
                if affine is not None and affine.kind == "concat":
                    inputs = [n for n, _ in affine.inputs]
                    return kind, position[user], inputs.index(member.value), here
            return kind, len(position), 0, here

        return sorted(members, key=place)

    def _blocked(self, members: Sequence[_Member]) -> Refusal | None:
        """What stands in the way of running all of them where the first one runs."""
        nodes = [n for m in members for p in m.fuse.parts for n in part_nodes(p)]
        if refusal := overwritten(self.view, members[0].source, nodes):
            return refusal
        trained = {any(map(self.view.captured.requires_grad, sources(m.fuse.op))) for m in members}
        if len(trained) > 1:
            return Refusal("some of their weights require gradients and some do not, which one weight cannot tell")
        return None

    def _dear(self, op: Operator, members: Sequence[_Member]) -> Refusal | None:
        """Why the wide layer does not pay."""
        if "siblings" in self.patterns.forced:
            return None
        one, ops = Fraction(1), [m.fuse.op for m in members]
        remedy = 'patterns=["siblings!"] merges them all the same'
        if self.price(op, one) > sum(self.price(o, one) for o in ops):
            return Refusal("exact, but merged it would cost more", remedy=remedy)
        if any(k > 1 for k in op.kernel):
            reason = "layers of one tensor, but a kernel of several taps is no faster for being wide"
            return Refusal(reason, detail=op.describe(), remedy=remedy)
        saved = op.in_channels * (len(ops) - 1 if op.spatial else len(ops))
        if op.out_channels > saved:
            return Refusal(
                "layers of one tensor, but the slices of a wide layer would cost more than not reading it again saves",
                detail=f"{op.out_channels} channels of slices, {saved} of reading",
                remedy=remedy,
            )
        return None

    def _used(self, fused: set[Node]) -> dict[Attr, list[Node]]:
        """The layers that use each weight as it is, not in something `fused`."""
        used = dict[Attr, list[Node]]()
        for node, affine in self.view.affine.items():
            for attr in sources(affine.op) if affine.op.weighted and node not in fused else ():
                used.setdefault(attr, []).append(node)
        return used

    def _twice(self, group: Siblings, alike: set[Node], used: dict[Attr, list[Node]]) -> bool:
        """Whether the weight of a layer that would be left alone is needed elsewhere, not only in groups `alike`."""
        own = (a for site in group.alone for f in fuses(site.segments) for a in sources(f.op))
        other = next((n for a in own for n in used.get(a, ()) if n not in alike), None)
        if other is None:
            return False
        reason = "layers of one tensor, but a weight is used at another place too: it would be stored twice"
        self.refusals.append(Refusal(reason, where=group.op.path, detail=f"by {other.name}", pattern="siblings"))
        return True


def _runs(members: Sequence[_Member]) -> tuple[Run, ...]:
    """Members with one activation together, those without it one by one."""
    runs = list[Run]()
    for _, group in groupby(range(len(members)), key=lambda i: members[i].activation or i):
        numbers = [*group]
        first, acts = numbers[0], (members[i].act for i in numbers)
        runs.append(Run(first, numbers[-1] + 1, members[first].activation, tuple(a for a in acts if a is not None)))
    return tuple(runs)
