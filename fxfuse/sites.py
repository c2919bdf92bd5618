"""What a plan is made of: sites, each a chain cut into stretches that fuse or stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch.fx import Node

from .record import Operator
from .refusal import Refusal
from .regions import Join, Step, part_nodes


@dataclass(frozen=True, slots=True)
class Fuse:
    """A stretch that becomes one operator."""

    op: Operator
    parts: tuple[Step | Join, ...]


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

    def operators(self) -> list[Operator]:
        """Operators of all fused stretches, in order."""
        return [f.op for f in fuses(self.segments)]

    def nodes(self) -> list[Node]:
        """Nodes of all fused stretches."""
        return [n for f in fuses(self.segments) for p in f.parts for n in part_nodes(p)]


@dataclass(frozen=True)
class Plan:
    """All sites with something to fuse, and every refusal met on the way."""

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]


def kept(segments: Iterable[Segment]) -> Iterator[Step]:
    """Every step that stays, those inside a join that stays included, in order."""
    for segment in segments:
        if isinstance(segment, Keep):
            yield segment.step
        elif isinstance(segment, Rejoin):
            for piece in segment.pieces:
                yield from kept(piece)


def fuses(segments: Iterable[Segment]) -> Iterator[Fuse]:
    """Every fused stretch, those inside a join that stays included, in order."""
    for segment in segments:
        if isinstance(segment, Fuse):
            yield segment
        elif isinstance(segment, Rejoin):
            for piece in segment.pieces:
                yield from fuses(piece)
