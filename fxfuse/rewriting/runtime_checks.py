"""Run-time checks of what was taken for granted: ranks and channels of the examples, a batch dim before an image's."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Graph, Node

from fxfuse.planning.regions import part_nodes, steps_of
from fxfuse.planning.sites import Fuse
from fxfuse.reading.view import View

GUARD = "fxfuse took the input here for a batch of {0} dims; optimize with example_inputs of the rank you use"

WIDTH = "fxfuse took the input here for a batch of {0} channels; optimize with example_inputs of the channels you use"


class RankChecks:
    """Puts the checks into `graph`, one for each tensor and rank; `current` gives what stands for a node by now."""

    def __init__(self, graph: Graph, view: View, current: Callable[[Node], Node]) -> None:
        self.graph, self.view, self.current = graph, view, current
        self.done: set[tuple[Node, int, int | None]] = set()

    def of_layer(self, source: Node, fuse: Fuse) -> None:
        """Check what a merge took for granted; the layer reads `source`."""
        affine = self.view.affine
        steps = [s for p in fuse.parts for s in steps_of(p)]
        moved = {s.node: affine[s.node].inputs[0][0] for s in steps if s.moved and s.node is not None}
        for node in (n for p in fuse.parts for n in part_nodes(p) if n in affine):
            where = moved.get(node)
            reads = source if where is None else self.current(where)
            self.check(reads, affine[node].assumes)
            if affine[node].width is not None:  # of what the layer reads, a run of which may be all that the factor met
                width = fuse.op.in_channels if where is None else affine[node].width
                self.check(reads, width, -(affine[node].op.spatial or 0) - 1)
            if where in affine and affine[where].kind != "unary":  # a join whose branches it has moved into
                self.check(self.current(where), affine[where].assumes)

    def check(self, source: Node, size: int | None, axis: int | None = None) -> None:
        """Check the rank of a tensor that was taken for granted, or its size along an axis, once."""
        if size is None or (source, size, axis) in self.done:
            return
        self.done.add((source, size, axis))
        with self.graph.inserting_after(source):
            message = (GUARD if axis is None else WIDTH).format(size)
            check = self.graph.call_function(torch._assert, (source, message))
        with self.graph.inserting_before(check):
            found = self.graph.call_method("dim", (source,)) if axis is None else None
            found = self.graph.call_method("size", (source, axis)) if found is None else found
            check.args = (self.graph.call_function(operator.eq, (found, size)), message)
