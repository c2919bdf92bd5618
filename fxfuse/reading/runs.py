"""Runs of unary steps that are each read by the next alone: the one walk along a graph that many stages need.

`steps` says what each node does; `readers` gives who reads the data of a node. Where a run is to end sooner, the
caller leaves the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch.fx import Node

from fxfuse.reading.affine import Affine

Readers = Callable[[Node], Sequence[Node]]


def before(node: Node, reader: Node, steps: Mapping[Node, Affine], readers: Readers) -> Iterator[tuple[Node, Affine]]:
    """`node` and what comes before it, upward: each a unary step that only the one after it reads, `reader` the last.

    Whoever comes before the last one given has another reader, or is no unary step.
    """
    while (step := steps.get(node)) is not None and step.kind == "unary" and readers(node) == [reader]:
        yield node, step
        reader, node = node, step.inputs[0][0]


def after(node: Node, steps: Mapping[Node, Affine], readers: Readers) -> Iterator[tuple[Node, Affine]]:
    """What comes after `node`, downward: each a unary step that is the only one to read the one before it."""
    while len(following := readers(node)) == 1 and (step := steps.get(following[0])) is not None:
        if step.kind != "unary" or step.inputs[0][0] is not node:
            return
        node = following[0]
        yield node, step
