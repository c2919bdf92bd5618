"""The calls of wide layers, with activations on their outputs, and the slices that their siblings take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

from fxfuse.graph_edits import provenance
from fxfuse.planning.sites import Fuse, Run, Siblings
from fxfuse.planning.slice_readers import RESHAPES
from fxfuse.rewriting.emitter import Emitter


class Wide:
    """Emits what `groups` of siblings share when the first of them is emitted."""

    def __init__(self, emitter: Emitter, groups: Iterable[Siblings]) -> None:
        self.emitter, self.graph, self.view = emitter, emitter.graph, emitter.view
        self.group_of = {f.exit: g for g in groups for f in g.members}
        self.slices: dict[Node, Node] = {}  # by the exit of a sibling
        self.cut: dict[Node, tuple[Any, ...]] = {}  # every slice: of what, along which axis, from where, how many
        self.widths: dict[Node, int] = {}  # channels of what is cut

    def slice_of(self, fuse: Fuse, source: Node) -> Node | None:
        """The slice of a wide layer on `source` that is the output of `fuse`; None where it is no sibling."""
        group = self.group_of.get(fuse.exit)
        if group is not None and fuse.exit not in self.slices:
            self._emit(group, source)
        return self.slices.get(fuse.exit)

    def _emit(self, group: Siblings, source: Node) -> None:
        position = self.view.effects.position
        first = min((self.emitter.place(f, f.exit) for f in group.members), key=position.__getitem__)
        with self.graph.inserting_before(first):
            wide = self.emitter.call(group.op, source)
            self.emitter.give_form(group.members[0], group.op)
            self.emitter.describe(wide, [n for f in group.members for n in f.nodes], group.op.path)
            start = 0
            for run in group.runs:
                start = self._run(run, group, wide, start)
        for node in group.reshaped:
            node.target = RESHAPES.get(node.target, node.target)

    def _run(self, run: Run, group: Siblings, wide: Node, start: int) -> int:
        """The slices of one run, which begins at channel `start`; the channel behind it."""
        members, axis = run.members, -(group.op.spatial or 0) - 1
        width = sum(f.op.out_channels for f in members)
        base, offset = wide, start
        if run.activation is not None:
            whole = width == group.op.out_channels
            if not whole:
                base = self.graph.call_function(torch.narrow, (wide, axis, start, width))
            inplace = whole and all(n in self.view.effects.writes for n in run.nodes)
            args, kwargs = run.activation.arguments(inplace)
            base, offset = self.graph.call_function(run.activation.function, (base, *args), kwargs), 0
            base.meta = provenance(run.nodes[0])
        self.widths[base] = group.op.out_channels if base is wide else width
        for number, fuse in enumerate(members):
            count = fuse.op.out_channels
            piece = base
            if len(members) > 1 or base is wide:
                piece = self._slice(base, axis, offset, count)
            self.slices[fuse.exit] = piece
            if run.nodes:
                self.emitter.stand_for(run.nodes[number], piece)
            offset += count
        return start + width

    def rejoin(self) -> None:
        """Concatenate what was sliced apart by one slice, or by none where it is the whole."""
        for node in list(self.graph.nodes) if self.cut else ():
            affine = self.view.affine.get(node)
            parts = node.args[0] if node.args and node.users else None
            if affine is None or affine.kind != "concat" or not isinstance(parts, (list, tuple)):
                continue
            inputs = self._united(parts, -(affine.spatial or 0) - 1, node)
            if len(inputs) < len(parts):
                node.args = (inputs, *node.args[1:])
                whole = inputs[0] in self.widths and [u for u in inputs[0].users if not self._gone(u)] == [node]
                if len(inputs) == 1 and whole:
                    self.emitter.stand_for(node, inputs[0])

    def _gone(self, node: Node) -> bool:
        """Whether a node will be erased."""
        return node in self.emitter.condemned and all(map(self._gone, node.users))

    def _united(self, parts: Iterable[Node], axis: int, before: Node) -> list[Node]:
        """Neighbouring slices of one tensor as one."""
        result = list[Node]()
        for part in parts:
            last, here = (self.cut.get(n) for n in (result[-1] if result else part, part))
            if result and last and here and last[1] == axis and here[:3] == (*last[:2], last[2] + last[3]):
                self.emitter.condemned.update((result.pop(), part))
                with self.graph.inserting_before(before):
                    part = self._slice(*last[:3], last[3] + here[3])
            result.append(part)
        return [self._all_of(n) for n in result]

    def _slice(self, *taken: Any) -> Node:
        piece = self.graph.call_function(torch.narrow, taken)
        self.cut[piece] = taken
        return piece

    def _all_of(self, piece: Node) -> Node:
        """What a slice is taken of, where it takes all of it."""
        base, _, start, count = self.cut.get(piece, (piece, 0, 0, 0))
        if (start, count) != (0, self.widths.get(base)):
            return piece
        self.emitter.condemned.add(piece)
        whole: Node = base
        return whole
