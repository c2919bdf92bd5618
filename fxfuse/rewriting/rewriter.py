"""The rewriter carries a plan out, segment by segment: fused stretches as layers, joins of what was merged anew."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch.fx import Node

from fxfuse.algebra.constants import model_values
from fxfuse.graph_edits import insert_check
from fxfuse.planning.conflicts import answers
from fxfuse.planning.regions import Step, steps_of
from fxfuse.planning.sites import Fuse, Plan, Rejoin, Segment, some_branches
from fxfuse.planning.slice_readers import RESHAPES
from fxfuse.reading.view import View
from fxfuse.rewriting.assemble import Rewritten
from fxfuse.rewriting.emitter import Emitter
from fxfuse.rewriting.feasible import feasible
from fxfuse.rewriting.sweep import redirect_readers, sweep, write_numbers
from fxfuse.rewriting.wide_layers import Wide


def rewrite(view: View, plan: Plan, weights: bool = True) -> tuple[Plan, Rewritten]:
    """Change the captured graph as a plan says; returns the plan as carried out, sites whose weights failed left out.

    Without `weights` the layers have shapes but no numbers, and there is nothing to build.
    """
    captured = view.captured
    able, built = feasible(plan, view, model_values(captured.root, captured.constants) if weights else None)
    emitter = Emitter(view, built, able.sites, write_numbers(view.constants) if able.sites else set())
    rewriter = _Rewriter(emitter, Wide(emitter, able.siblings))
    for site in able.sites:
        rewriter.emit(emitter.current(site.source), site.segments)
    rewriter.wide.rejoin()
    redirect_readers(rewriter.emitted, emitter.current)
    sweep(view, emitter.condemned)
    return able, Rewritten(captured, emitter.layers, emitter.names)


class _Rewriter:
    """Emits segments; `emitted` are the calls of new layers so far, each with its stretch and what it reads."""

    def __init__(self, emitter: Emitter, wide: Wide) -> None:
        self.emitter, self.graph, self.view, self.wide = emitter, emitter.graph, emitter.view, wide
        self.check = cache(partial(insert_check, self.graph))  # each once
        self.emitted: dict[Node, tuple[Fuse, Node]] = {}

    def emit(self, value: Node, segments: tuple[Segment, ...]) -> tuple[Node, float]:
        """Emit segments on `value`; the node of the result and a coefficient left to its join."""
        coefficient = 1.0
        for segment in segments:
            if isinstance(segment, Rejoin):
                value = self._rejoin(segment, value)
            elif isinstance(segment, Fuse):
                new = self._layer_call(segment, value, segment.exit)
                new.meta["fxfuse_exit"] = segment.exit.name
                self.emitter.replace(segment.exit, new)
                self._let_through(segment)
                value = new
            elif segment.node is None:
                coefficient *= float(segment.op.const("factor"))
            else:
                self._keep_commuting(segment.node, segments)
                value = self.emitter.current(segment.node)
        return value, coefficient

    def _keep_commuting(self, node: Node, segments: tuple[Segment, ...]) -> None:
        """If a factor has moved past this node, check the rank of what it reads, which may lie in any order now."""
        affine = self.view.affine[node]
        moved = any(isinstance(p, Step) and p.moved for s in segments if isinstance(s, Fuse) for p in s.parts)
        if affine.op.kind == "commuting" and moved:
            node.target = RESHAPES.get(node.target, node.target)
            self.check(self.emitter.current(affine.inputs[0][0]), affine.assumes)

    def _rejoin(self, segment: Rejoin, source: Node) -> Node:
        """The join of what its pieces became; the same node where none of them was merged."""
        join = segment.join
        results, together = list[tuple[Node, float]](), list[Fuse]()
        for piece in segment.pieces:
            first = piece[0] if piece else None
            if isinstance(first, Fuse) and some_branches(piece, join):
                results.append((self._layer_call(first, source, join.node), 1.0))
                together.append(first)
            else:
                results.append(self.emit(source, piece))
        stretches = (s for piece in segment.pieces for s in piece if isinstance(s, Fuse))
        if not segment.merged and all(p.node is not None for s in stretches for p in s.parts):
            return join.node  # no coefficient of the join went into a layer either
        with self.graph.inserting_before(join.node):
            if join.kind == "concat":
                new = self.graph.call_function(torch.cat, ([n for n, _ in results], -(join.spatial or 0) - 1))
            else:
                new = self._summed(results)
        new.meta = dict(join.node.meta)
        self.emitter.condemned.update(join.nodes)
        self.emitter.replace(join.node, new)
        for fuse in together:
            self._let_through(fuse)
        return new

    def _summed(self, results: list[tuple[Node, float]]) -> Node:
        """The sum of nodes with coefficients, one without a coefficient first where there is one."""
        results = sorted(results, key=lambda r: r[1] != 1)
        total, coefficient = results[0]
        if coefficient != 1:
            total = self.graph.call_function(torch.mul, (total, coefficient))
        for node, coefficient in results[1:]:
            kwargs: dict[str, Any] = {} if coefficient == 1 else {"alpha": coefficient}
            total = self.graph.call_function(torch.add, (total, node), kwargs)
        return total

    def _layer_call(self, fuse: Fuse, source: Node, before: Node) -> Node:
        """Call the layer of a fused stretch on `source`, right before node `before`."""
        op, nodes, emitter = fuse.op, fuse.nodes, self.emitter
        self._check_layer(source, fuse)
        before = emitter.place(fuse, before)
        x = self.wide.slice_of(fuse, source)
        with self.graph.inserting_before(before):
            if x is None:
                x = emitter.call(op, source, emitter.beside(fuse)[1:])
                emitter.give_form(fuse, op)
            x = x if fuse.pool is None else self._pooled(x, fuse, fuse.pool)
            norm = any(self.view.calls[n].op == "batch_norm" for n in nodes if n in self.view.calls)
            if norm and op.transposed and op.spatial == 1:
                # Of a sequence of length 1 it gives a tensor in another order, which the batch norm would mend.
                x = self.graph.call_method("contiguous", (x,))
        self.emitted[x] = (fuse, source)
        for node, by_input in (answers(fuse.parts, self.view.sized) or {}).items():
            for user in self.view.sized[node]:
                user.replace_input_with(node, source if by_input else x)
        emitter.describe(x, nodes, op.path)
        emitter.condemned.update(nodes, *(self.view.affine[n].extra for n in nodes if n in self.view.affine))
        return x

    def _check_layer(self, source: Node, fuse: Fuse) -> None:
        """Check when the model runs what a merge took for granted: ranks, and channels; the layer reads `source`."""
        affine, current = self.view.affine, self.emitter.current
        steps = [s for p in fuse.parts for s in steps_of(p)]
        moved = {s.node: affine[s.node].inputs[0][0] for s in steps if s.moved and s.node is not None}
        for node in (n for n in fuse.nodes if n in affine):
            where = moved.get(node)
            reads = source if where is None else current(where)
            self.check(reads, affine[node].assumes)
            if affine[node].width is not None:  # of what the layer reads, a run of which may be all that the factor met
                width = fuse.op.in_channels if where is None else affine[node].width
                self.check(reads, width, -(affine[node].op.spatial or 0) - 1)
            if where in affine and affine[where].kind != "unary":  # a join whose branches it has moved into
                self.check(current(where), affine[where].assumes)

    def _pooled(self, x: Node, fuse: Fuse, pool: Node) -> Node:
        """What `pool` makes of `x` instead of its own input, and the bias added to it."""
        read = self.view.source(pool)
        pooled = self.graph.node_copy(pool, lambda n: x if n in (read, self.emitter.current(read)) else n)
        if fuse.shift is None:
            return pooled
        bias = self.graph.get_attr(f"{self.emitter.name(fuse.shift)}.bias")
        shape = (-1, *(1,) * (fuse.shift.spatial or 0))
        bias = self.graph.call_function(torch.reshape, (bias, shape))
        bias = self.graph.call_method("type_as", (bias, pooled))  # which autocast may have made narrower
        return self.graph.call_function(torch.add, (pooled, bias))

    def _let_through(self, fuse: Fuse) -> None:
        """Let those that read a factor which has moved elsewhere read its input."""
        for step in steps_of(*fuse.parts):
            if step.moved and step.node is not None:
                value = self.emitter.current(self.view.source(step.node))
                if step.contiguous and step.node.users:
                    with self.graph.inserting_before(step.node):
                        value = self.graph.call_method("contiguous", (value,))
                    self.emitter.condemned.add(value)  # if nobody reads it in the end
                self.emitter.replace(step.node, value)
