"""Layers of one value gathered into wide ones: a stage after the plan has decided what each layer is.

    y1 = relu(conv1(x));  y2 = relu(conv2(x))   =>   y = relu(conv(x));  y1 = y[:, :n1];  y2 = y[:, n1:]

The work is the same, so it pays where x is no longer read again and again and the slices are not too much: measured
on the layers of real models, with convolutions of one tap whose outputs together are no wider than the reads saved,
batch and map aside, and with linear layers that keep the width: query, key and value. A kernel of more taps gains
nothing: there the time goes into arithmetic.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby

from torch.fx import Node

from fxfuse.algebra.constants import Attr
from fxfuse.algebra.operator import Operator, sources
from fxfuse.ops.elementwise import Activation, read_activation
from fxfuse.planning.autocast_forms import autocast_form
from fxfuse.planning.conflicts import overwritten
from fxfuse.planning.fusing import Fusing
from fxfuse.planning.regions import Step
from fxfuse.planning.sites import Fuse, Plan, Run, Siblings, Site, fuses, layers
from fxfuse.planning.slice_readers import reshaped
from fxfuse.refusal import Refusal

REMEDY = 'patterns=["siblings!"] merges them all the same'


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


class Gather(Fusing):
    """The stage: `run` gives the plan with its siblings."""

    def run(self, plan: Plan) -> Plan:
        by_source, used = defaultdict[Node, list[_Member]](list), defaultdict[Attr, list[Node]](list)
        fused = plan.fused()
        for member in self._members(plan, fused):
            by_source[member.source].append(member)
        found = [s for members in by_source.values() for s in self._groups(members)]
        for node, affine in self.view.affine.items():
            for attr in sources(affine.op) if found and affine.op.weighted and node not in fused else ():
                used[attr].append(node)
        alike = defaultdict[Operator, set[Node]](set)
        for group in found:
            alike[group.op].update(f.exit for f in group.members)
        able = tuple(s for s in found if not self._twice(s, alike[s.op], used))
        return replace(plan, siblings=able, refusals=(*plan.refusals, *self.refusals))

    def _members(self, plan: Plan, fused: set[Node]) -> Iterator[_Member]:
        """All layers of the plan and those that it leaves alone, in the order in which they run."""
        found = [(source, fuse, False) for s in plan.sites for source, fuse in layers(s.source, s.segments)]
        for node, affine in self.view.affine.items():
            if node not in fused and affine.kind == "unary" and affine.op.weighted:
                found.append((affine.inputs[0][0], Fuse(affine.op, (Step(node, affine.op),)), True))
        for source, fuse, plain in sorted(found, key=lambda f: self.view.effects.position[f[1].exit]):
            # those of different channels read different values, and deformable ones read more than one
            if fuse.op.reads is None and fuse.op.kind == "conv":
                yield _Member(fuse, source, plain, *self._activation(fuse))

    def _activation(self, fuse: Fuse) -> tuple[Node | None, Activation | None]:
        """The activation that alone reads the layer's output."""
        users = list(fuse.exit.users)
        alone = fuse.pool is None and len(users) == 1 and users[0] not in self.view.inside_regions
        found = read_activation(users[0], self.view.captured.modules) if alone else None
        return (None if found is None else users[0]), found

    def _groups(self, members: list[_Member]) -> Iterator[Siblings]:
        """Layers of one value, gathered by their geometry."""
        groups, different = list[list[_Member]](), list[Refusal]()
        for member in members:
            for group in groups:
                both = self.combine("siblings", group[0].fuse.op, member.fuse.op)
                if autocast_form(self.view, group[0].fuse) != autocast_form(self.view, member.fuse):
                    both = Refusal("layers of one tensor, but under autocast they give different dtypes")
                if not isinstance(both, Refusal):
                    group.append(member)
                    break
                if self._joins(group[0]).isdisjoint(self._joins(member)):
                    different.append(both.at(member.fuse.op.path))
            else:
                groups.append([member])
        self.refusals += different[:1]
        return filter(None, [self._gathered(g) for g in groups if len(g) > 1])

    def _joins(self, member: _Member) -> set[Node]:
        """The sums and concatenations that read the layer's output: there it has been tried as a branch."""
        affine = self.view.affine
        return {u for u in member.fuse.exit.users if u in affine and affine[u].kind != "unary"}

    def _gathered(self, members: list[_Member]) -> Siblings | None:
        able, views = list[_Member](), list[Node]()
        for member in members:
            own = {*member.fuse.nodes, member.value}
            found = () if member.fuse.pool is not None else reshaped(member.value, self.view, own)
            if isinstance(found, Refusal):
                self.refusals.append(found.by("siblings").at(member.fuse.op.path))
            else:
                able.append(member)
                views += found
        if len(able) < 2:
            return None
        able = self._ordered(able)
        op = self.combined("siblings", [m.fuse.op for m in able])
        op = op if isinstance(op, Refusal) else self._blocked(able) or self._dear(op, able) or op
        if isinstance(op, Refusal):
            self.refusals.append(op.by("siblings").at(able[0].fuse.op.path))
            return None
        alone = tuple(Site(m.source, (m.fuse,)) for m in able if m.plain)
        return Siblings(op, tuple(_runs(able)), alone, tuple(views))

    def _ordered(self, members: list[_Member]) -> list[_Member]:
        """Equal activations side by side, and among them what meets in a concatenation, in its order."""
        kinds = list(dict.fromkeys(m.activation for m in members))
        position, affine = self.view.effects.position, self.view.affine

        def place(member: _Member) -> tuple[int, int, int, int]:
            concats = (u for u in member.value.users if u in affine and affine[u].kind == "concat")
            joins = ((position[u], [n for n, _ in affine[u].inputs].index(member.value)) for u in concats)
            return kinds.index(member.activation), *next(joins, (len(position), 0)), position[member.fuse.exit]

        return sorted(members, key=place)

    def _blocked(self, members: Sequence[_Member]) -> Refusal | None:
        """What stands in the way of running all of them where the first one runs."""
        if refusal := overwritten(self.view, members[0].source, [n for m in members for n in m.fuse.nodes]):
            return refusal
        trained = {any(map(self.view.captured.requires_grad, sources(m.fuse.op))) for m in members}
        if len(trained) > 1:
            return Refusal("some of their weights require gradients and some do not, which one weight cannot tell")
        return None

    def _dear(self, op: Operator, members: Sequence[_Member]) -> Refusal | None:
        """Why the wide layer does not pay."""
        if "siblings" in self.patterns.forced:
            return None
        one, count = Fraction(1), len(members)
        if self.cost(op, one) > sum(self.cost(m.fuse.op, one) for m in members):
            return Refusal("exact, but merged it would cost more", remedy=REMEDY)
        if any(k > 1 for k in op.kernel):
            reason = "layers of one tensor, but a kernel of several taps is no faster for being wide"
            return Refusal(reason, detail=op.describe(), remedy=REMEDY)
        saved = op.in_channels * (count - 1 if op.spatial else count)
        if op.out_channels > saved:
            reason = (
                "layers of one tensor, but the slices of a wide layer would cost more than not reading it again saves"
            )
            detail = f"{op.out_channels} channels of slices, {saved} of reading"
            return Refusal(reason, detail=detail, remedy=REMEDY)
        return None

    def _twice(self, group: Siblings, alike: set[Node], used: Mapping[Attr, list[Node]]) -> bool:
        """Whether the weight of a layer that would be left alone is needed elsewhere, not only in groups `alike`.

        `used` are the layers that use each weight as it is, not in something fused.
        """
        own = (a for site in group.alone for f in fuses(site.segments) for a in sources(f.op))
        other = next((n for a in own for n in used.get(a, ()) if n not in alike), None)
        if other is not None:
            reason = "layers of one tensor, but a weight is used at another place too: it would be stored twice"
            self.refusals.append(Refusal(reason, where=group.op.path, detail=f"by {other.name}", pattern="siblings"))
        return other is not None


def _runs(members: Sequence[_Member]) -> Iterator[Run]:
    """Members with one activation together, those without it one by one."""
    for _, group in groupby(enumerate(members), key=lambda m: m[1].activation or m[0]):
        run = [m for _, m in group]
        yield Run(tuple(m.fuse for m in run), run[0].activation, tuple(m.act for m in run if m.act is not None))
