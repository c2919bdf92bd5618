"""Run-time checks of what was taken for granted: ranks and channels of the examples, a batch dim before an image's."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from fxfuse.graph_edits import insert_check
from fxfuse.planning.regions import steps_of
from fxfuse.planning.sites import Fuse
from fxfuse.reading.view import View


class RankChecks:
    """Puts checks into a view's graph, one for each tensor and rank; `current` gives what stands for a node by now."""

    def __init__(self, view: View, current: Callable[[Node], Node]) -> None:
        self.view, self.current = view, current
        self.done: set[tuple[Node, int, int | None]] = set()

    def of_layer(self, source: Node, fuse: Fuse) -> None:
        """Check what a merge took for granted; the layer reads `source`."""
        affine = self.view.affine
        steps = [s for p in fuse.parts for s in steps_of(p)]
        moved = {s.node: affine[s.node].inputs[0][0] for s in steps if s.moved and s.node is not None}
        for node in (n for n in fuse.nodes if n in affine):
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
        if size is not None and (source, size, axis) not in self.done:
            self.done.add((source, size, axis))
            insert_check(self.view.captured.graph, source, size, axis)
