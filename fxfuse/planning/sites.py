"""What a plan is made of: sites, each a chain cut into stretches that fuse or stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch.fx import Node

from fxfuse.algebra.operator import Operator
from fxfuse.ops.elementwise import Activation
from fxfuse.planning.regions import Join, Step, exit_of, part_nodes
from fxfuse.refusal import Refusal


@dataclass(frozen=True, slots=True)
class Fuse:
    """A stretch that becomes one operator.

    With `pool`, the average pool at the beginning of the stretch runs after the operator instead, and then the bias
    of `shift` is added where there is one.
    """

    op: Operator
    parts: tuple[Step | Join, ...]
    pool: Node | None = None
    shift: Operator | None = None

    @property
    def exit(self) -> Node:
        """The node whose value the stretch gives."""
        return exit_of(self.parts)

    @property
    def nodes(self) -> list[Node]:
        """The nodes that it replaces."""
        return [n for p in self.parts for n in part_nodes(p)]


@dataclass(frozen=True, slots=True)
class Keep:
    """A node that stays as it is."""

    step: Step


@dataclass(frozen=True, slots=True)
class Rejoin:
    """A join that stays, over fewer or cheaper branches; `merged` where it must be emitted anew."""

    join: Join
    pieces: tuple[tuple[Segment, ...], ...]
    merged: bool


Segment = Fuse | Keep | Rejoin


@dataclass(frozen=True, slots=True)
class Site:
    """One chain and what becomes of it."""

    source: Node
    segments: tuple[Segment, ...]

    def nodes(self) -> list[Node]:
        """Nodes of all fused stretches."""
        return [n for f in fuses(self.segments) for n in f.nodes]


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring siblings of one group, from `start` to before `stop`, and the activation that all of them have.

    `nodes` are the calls of that activation, one a sibling; without one each sibling is a run of its own.
    """

    start: int
    stop: int
    activation: Activation | None = None
    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Siblings:
    """Layers that read one value and run as one wide layer, each taking a slice of its channels.

    `members` are stretches of the plan's sites, in the order of their channels; `alone` are sites of their own for
    those that nothing else fuses with. `reshaped` are views of slices, which are to reshape them.
    """

    op: Operator
    members: tuple[Fuse, ...]
    runs: tuple[Run, ...]
    alone: tuple[Site, ...] = ()
    reshaped: tuple[Node, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """Why something stays as it is, and the nodes of which that has been said."""

    refusal: Refusal
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Plan:
    """All sites with something to fuse, siblings among their layers, and every refusal met on the way."""

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]
    siblings: tuple[Siblings, ...] = ()

    def fused(self) -> set[Node]:
        """Nodes of all fused stretches."""
        return {n for site in self.sites for n in site.nodes()}

    def layers(self) -> Iterator[tuple[Node, Fuse]]:
        """Every fused stretch that stands for a node of its own, with the node whose value it reads."""
        for site in self.sites:
            yield from _layers(site.source, site.segments)


def joined(sites: Iterable[Site], more: Iterable[Site], position: Mapping[Node, int]) -> list[Site]:
    """`sites` with `more`, each where its layer runs."""
    return sorted([*sites, *more], key=lambda s: max(position[n] for n in map(_value, s.segments) if n is not None))


def _value(segment: Segment) -> Node | None:
    """The node whose value a segment gives; None for a coefficient of a join."""
    if isinstance(segment, Keep):
        return segment.step.node
    return segment.join.node if isinstance(segment, Rejoin) else segment.exit


def _layers(source: Node, segments: tuple[Segment, ...]) -> Iterator[tuple[Node, Fuse]]:
    for segment in segments:
        if isinstance(segment, Fuse):
            yield source, segment
        elif isinstance(segment, Rejoin):
            for piece in segment.pieces:
                if not some_branches(piece, segment.join):
                    yield from _layers(source, piece)
        source = _value(segment) or source


def some_branches(piece: tuple[Segment, ...], join: Join) -> bool:
    """Whether a piece is several branches of the join, merged: no node gives its value."""
    first = piece[0].parts[0] if len(piece) == 1 and isinstance(piece[0], Fuse) else None
    return isinstance(first, Join) and first.node is join.node


def kept(segments: Iterable[Segment]) -> Iterator[Step]:
    """Every step that stays, those inside a join that stays included, in order."""
    return (s.step for s in _inside(segments) if isinstance(s, Keep))


def fuses(segments: Iterable[Segment]) -> Iterator[Fuse]:
    """Every fused stretch, those inside a join that stays included, in order."""
    return (s for s in _inside(segments) if isinstance(s, Fuse))


def _inside(segments: Iterable[Segment]) -> Iterator[Fuse | Keep]:
    for segment in segments:
        if isinstance(segment, Rejoin):
            for piece in segment.pieces:
                yield from _inside(piece)
        else:
            yield segment
