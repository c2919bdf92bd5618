"""What a plan is made of: sites, each a chain cut into stretches that fuse or stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch.fx import Node

from fxfuse.algebra.operator import Operator
from fxfuse.ops.elementwise import Activation
from fxfuse.planning.regions import Join, Part, Step, exit_of, nodes_of
from fxfuse.refusal import Refusal


@dataclass(frozen=True, slots=True)
class Fuse:
    """A stretch that becomes one operator.

    With `pool`, the average pool at the beginning of the stretch runs after the operator instead, and then the bias
    of `shift` is added where there is one.
    """

    op: Operator
    parts: tuple[Part, ...]
    pool: Node | None = None
    shift: Operator | None = None

    @property
    def exit(self) -> Node:
        """The node whose value the stretch gives."""
        return exit_of(self.parts)

    @property
    def nodes(self) -> list[Node]:
        """The nodes that it replaces."""
        return list(nodes_of(*self.parts))


@dataclass(frozen=True, slots=True)
class Rejoin:
    """A join that stays, over fewer or cheaper branches."""

    join: Join
    pieces: tuple[tuple[Segment, ...], ...]

    @property
    def merged(self) -> bool:
        """Whether it must be emitted anew, as some of its branches are one now."""
        return len(self.pieces) < len(self.join.branches)


Segment = Fuse | Rejoin | Step  # a step stays as it is


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
    """Neighbouring siblings of one group, and the activation that all of them have.

    `nodes` are the calls of that activation, one a sibling; without one each sibling is a run of its own.
    """

    members: tuple[Fuse, ...]
    activation: Activation | None = None
    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Siblings:
    """Layers that read one value and run as one wide layer, each taking a slice of its channels.

    `alone` are sites of their own for those that nothing else fuses with. `reshaped` are views of slices, which are to
    reshape them.
    """

    op: Operator
    runs: tuple[Run, ...]
    alone: tuple[Site, ...] = ()
    reshaped: tuple[Node, ...] = ()

    @property
    def members(self) -> list[Fuse]:
        """Stretches of the plan's sites, in the order of their channels."""
        return [f for r in self.runs for f in r.members]


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


def joined(sites: Iterable[Site], more: Iterable[Site], position: Mapping[Node, int]) -> list[Site]:
    """`sites` with `more`, each where its layer runs."""
    return sorted([*sites, *more], key=lambda s: max(position[n] for n in map(_value, s.segments) if n is not None))


def _value(segment: Segment) -> Node | None:
    """The node whose value a segment gives; None for a coefficient of a join."""
    if isinstance(segment, Fuse):
        return segment.exit
    return segment.join.node if isinstance(segment, Rejoin) else segment.node


def layers(source: Node, segments: tuple[Segment, ...]) -> Iterator[tuple[Node, Fuse]]:
    """Every fused stretch that stands for a node of its own, with the node whose value it reads."""
    for segment in segments:
        if isinstance(segment, Fuse):
            yield source, segment
        elif isinstance(segment, Rejoin):
            for piece in segment.pieces:
                if not some_branches(piece, segment.join):
                    yield from layers(source, piece)
        source = _value(segment) or source


def some_branches(piece: tuple[Segment, ...], join: Join) -> bool:
    """Whether a piece is several branches of the join, merged: no node gives its value."""
    first = piece[0].parts[0] if len(piece) == 1 and isinstance(piece[0], Fuse) else None
    return isinstance(first, Join) and first.node is join.node


def fuses(segments: Iterable[Segment]) -> Iterator[Fuse]:
    """Every fused stretch, those inside a join that stays included, in order."""
    return (s for s in opened(segments) if isinstance(s, Fuse))


def opened(segments: Iterable[Segment]) -> Iterator[Fuse | Step]:
    """Every segment, of a join that stays those inside it, in order."""
    for segment in segments:
        if isinstance(segment, Rejoin):
            for piece in segment.pieces:
                yield from opened(piece)
        else:
            yield segment
