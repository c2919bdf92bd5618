"""A permutation of channels: which nodes it is, and which channels it takes."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from fxfuse.algebra.operator import Ints
from fxfuse.reading.affine import Affine


@dataclass(frozen=True)
class Permutation:
    """The nodes of a permutation in order, what they read, and the channels they take.

    `assumes` is the rank it takes for granted, `channels` the number of those it takes from, where it takes some or
    some again. `plain` says that it is one operation on the channels already.
    """

    nodes: tuple[Node, ...]
    source: Node
    reads: Ints
    spatial: int
    assumes: int | None = None
    channels: int | None = None
    plain: bool = True

    @property
    def whole(self) -> bool:
        """Whether it takes every channel once."""
        return self.channels in (None, len(self.reads)) and len(set(self.reads)) == len(self.reads)

    @property
    def last(self) -> Node:
        return self.nodes[-1]


def permutation_of(node: Node, affine: Affine) -> Permutation | None:
    """The permutation that a node is, if it is one and moves anything."""
    if affine.kind != "unary" or affine.op.kind != "select" or affine.op.law != "select":
        return None
    op, reads = affine.op, affine.op.reads
    every = range(op.in_channels)
    if reads is None or op.spatial is None or sorted(reads) != list(every) or reads == tuple(every):
        return None
    return Permutation((node,), affine.inputs[0][0], reads, op.spatial, affine.assumes)
