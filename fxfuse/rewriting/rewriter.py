"""The rewriter: the only place that changes a graph. It carries a plan out and keeps provenance."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Node

from fxfuse.algebra.combine import needs_pad
from fxfuse.algebra.constants import model_values
from fxfuse.algebra.operator import Operator
from fxfuse.attributes import attribute
from fxfuse.names import above, is_aten
from fxfuse.ops import schema
from fxfuse.ops.call import SEVERAL
from fxfuse.ops.questions import rank_check, shape_reader
from fxfuse.ops.value_kinds import is_number
from fxfuse.planning.regions import Join, Step, part_nodes, steps_of
from fxfuse.planning.sites import Fuse, Keep, Plan, Rejoin, Segment, Site
from fxfuse.planning.size_answers import answers
from fxfuse.planning.slice_readers import RESHAPES
from fxfuse.reading.view import View
from fxfuse.rewriting.assemble import assemble, spelled
from fxfuse.rewriting.feasible import feasible
from fxfuse.rewriting.literals import write_numbers
from fxfuse.rewriting.runtime_checks import RankChecks
from fxfuse.rewriting.wide_layers import Wide


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one fused layer is computed: the submodule it lives in and its operator."""

    target: str
    op: Operator


class Rewriter:
    """Applies a plan to the captured graph and builds the resulting GraphModule.

    In a dry run the layers have shapes but no numbers, and there is nothing to build.
    """

    def __init__(self, view: View, dry_run: bool = False) -> None:
        self.view = view
        self.dry_run = dry_run
        self.graph: Graph = view.captured.graph
        self.values = model_values(view.captured.root, view.captured.constants)
        self.built: dict[Operator, nn.Module | nn.Parameter] = {}
        self.names: dict[Operator, str] = {}
        self.layers: dict[str, nn.Module | nn.Parameter] = {}
        self.condemned: set[Node] = set()
        self.replaced: dict[Node, Node] = {}
        self.ranks = RankChecks(self.graph, view, self._current)
        self.emitted: dict[Node, tuple[Fuse, Node]] = {}  # by the call of the new layer, with what it reads
        self.taken: set[str] = set()  # names in use, and everything above them
        self.opened: set[str] = set()

    def apply(self, plan: Plan) -> tuple[Plan, tuple[Recipe, ...]]:
        """Emit every site; returns the plan as carried out (sites whose weights failed left out)."""
        able, self.built = feasible(plan, self.view, None if self.dry_run else self.values)
        done = able.sites
        if done:
            self.condemned |= write_numbers(self.view.constants)
        self._release(done)
        self.wide = Wide(self, able.siblings)
        for site in done:
            self._emit(self._current(site.source), site.segments)
        self.wide.rejoin()
        self._redirect_readers()
        self._sweep()
        recipes = tuple(Recipe(name, op) for op, name in self.names.items())
        return able, recipes

    def _release(self, sites: Iterable[Site]) -> None:
        """Free the names of modules and attributes that only the fused sites use."""
        fused = {n for s in sites for n in s.nodes()} | self.condemned
        for node in reversed(self.graph.nodes):  # with what only they read of the weights
            if node in self.view.constants and node.users and fused.issuperset(node.users):
                fused.add(node)
        kept = {str(n.target) for n in self.graph.nodes if n.op in ("call_module", "get_attr") and n not in fused}
        self.taken = kept
        self.opened = {a for name in kept for a in above(name)}

    def _name(self, op: Operator) -> str:
        """Path of the layer for `op`: that of the weight it replaces, made unique if still in use."""
        if op not in self.names:
            base = spelled(self.view.captured.root, op.path or "fused")
            name, count = base, 0
            while name in self.taken or name in self.opened or not self.taken.isdisjoint(above(name)):
                count += 1
                name = f"{base}_{count}"
            self.names[op] = name
            self.taken.add(name)
            self.opened.update(above(name))
            built = self.built[op]
            self.layers[name if isinstance(built, nn.Module) else f"{name}.bias"] = built
        return self.names[op]

    def _emit(self, value: Node, segments: tuple[Segment, ...]) -> tuple[Node, float]:
        """Emit segments on `value`; the node of the result and a coefficient left to its join."""
        coefficient = 1.0
        for segment in segments:
            if isinstance(segment, Keep):
                if segment.step.node is None:
                    coefficient *= float(segment.step.op.const("factor"))
                else:
                    self._keep_carry(segment.step.node, segments)
                    value = self._current(segment.step.node)
            elif isinstance(segment, Fuse):
                end = segment.exit
                new = self._layer_call(segment, value, end)
                self._condemn(segment)
                new.meta["fxfuse_exit"] = end.name
                self._replace(end, new)
                self._let_through(segment)
                value = new
            else:
                value = self._rejoin(segment, value)
        return value, coefficient

    def _rejoin(self, segment: Rejoin, source: Node) -> Node:
        join = segment.join
        results, together = list[tuple[Node, float]](), list[Fuse]()
        for piece in segment.pieces:
            first = piece[0] if piece else None
            if isinstance(first, Fuse) and len(piece) == 1 and first.parts and first.parts[0] is not join:
                part = first.parts[0]
                if isinstance(part, Join) and part.node is join.node:  # some of the branches, merged
                    results.append((self._layer_call(first, source, join.node), 1.0))
                    self._condemn(first)
                    together.append(first)
                    continue
            results.append(self._emit(source, piece))
        absorbed = any(_ends_in_coefficient(p) for p in segment.pieces)
        if not segment.merged and not absorbed:
            return join.node
        with self.graph.inserting_before(join.node):
            new = self._joined(join, results)
        new.meta = dict(join.node.meta)
        self.condemned.update(join.nodes)
        self._replace(join.node, new)
        for fuse in together:
            self._let_through(fuse)
        return new

    def _replace(self, old: Node, new: Node) -> None:
        old.replace_all_uses_with(new)
        self.replaced[old] = new

    def stand_for(self, old: Node, new: Node) -> None:
        """Replace a node that is to go by another."""
        self._replace(old, new)
        self.condemned.add(old)

    def _let_through(self, fuse: Fuse) -> None:
        """Let those that read a factor which has moved elsewhere read its input."""
        for step in (s for p in fuse.parts for s in steps_of(p)):
            if step.moved and step.node is not None:
                value = self._current(self.view.affine[step.node].inputs[0][0])
                if step.lay and step.node.users:
                    with self.graph.inserting_before(step.node):
                        value = self.graph.call_method("contiguous", (value,))
                    self.condemned.add(value)  # if nobody reads it in the end
                self._replace(step.node, value)

    def _current(self, node: Node) -> Node:
        """What stands for a node of the plan now: sites that read it are emitted after its own."""
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def _joined(self, join: Join, results: list[tuple[Node, float]]) -> Node:
        if join.kind == "concat":
            axis = -(join.spatial or 0) - 1
            return self.graph.call_function(torch.cat, ([n for n, _ in results], axis))
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
        op, nodes = fuse.op, [n for p in fuse.parts for n in part_nodes(p)]
        self.ranks.of_layer(source, fuse)
        asked = answers(fuse.parts, self.view.sized) or {}
        before = self.place(fuse, before)
        x = self.wide.slice_of(fuse, source)
        with self.graph.inserting_before(before):
            x = self.call(op, source, self._beside(nodes)[1:] if op.kind == "warp" else ()) if x is None else x
            x = x if fuse.pool is None else self._pooled(x, fuse, fuse.pool)
            if op.transposed and op.spatial == 1 and any(self._is_norm(n) for n in nodes):
                # Of a sequence of length 1 it gives a tensor in another order, which the batch norm would mend.
                x = self.graph.call_method("contiguous", (x,))
        self.emitted[x] = (fuse, source)
        for node, by_input in asked.items():
            for user in self.view.sized[node]:
                user.replace_input_with(node, source if by_input else x)
        affine = self.view.affine
        heaviest = next((n for n in nodes if n in affine and affine[n].op.path == op.path), nodes[-1])
        x.meta = {k: heaviest.meta[k] for k in ("nn_module_stack", "stack_trace") if k in heaviest.meta}
        x.meta["fxfuse"] = tuple(dict.fromkeys(n.name for n in nodes))
        return x

    def place(self, fuse: Fuse, before: Node) -> Node:
        """The node before which a fused layer has to stand: `before`, or one that asks for a size it gives."""
        asked = answers(fuse.parts, self.view.sized) or {}
        later = [u for n, by_input in asked.items() if not by_input for u in self.view.sized[n]]
        beside = self._beside([n for p in fuse.parts for n in part_nodes(p)])[:1] if fuse.op.kind == "warp" else ()
        places: list[Node] = [before, *later, *beside]
        return min(places, key=self.view.effects.position.__getitem__)

    def call(self, op: Operator, source: Node, beside: Sequence[Node] = ()) -> Node:
        """Call the layer of `op` on `source` and what it reads `beside` it, where the graph is inserting."""
        name, x, spatial = self._name(op), source, op.spatial or 0
        if op.reads is not None:
            x = self.graph.call_function(torch.narrow, (x, -spatial - 1, op.reads[0], len(op.reads)))
        if needs_pad(op):
            amounts = [a for low, high in op.padding[::-1] for a in (low, high)]
            mode = "constant" if op.padding_mode == "zeros" else op.padding_mode
            value: Any = op.pad_value if mode == "constant" else None
            x = self.graph.call_function(F.pad, (x, amounts, mode, value))
        return self.graph.call_module(name, (x, *beside))

    def _pooled(self, x: Node, fuse: Fuse, pool: Node) -> Node:
        """What `pool` makes of `x` instead of its own input, and the bias added to it."""
        read = self.view.affine[pool].inputs[0][0]
        pooled = self.graph.node_copy(pool, lambda n: x if n is read or n is self._current(read) else n)
        if fuse.shift is None:
            return pooled
        bias = self.graph.get_attr(f"{self._name(fuse.shift)}.bias")
        shape = (-1, *(1,) * (fuse.shift.spatial or 0))
        bias = self.graph.call_function(torch.reshape, (bias, shape))
        bias = self.graph.call_method("type_as", (bias, pooled))  # which autocast may have made narrower
        return self.graph.call_function(torch.add, (pooled, bias))

    def _is_norm(self, node: Node) -> bool:
        call = self.view.calls.get(node)
        return call is not None and call.op == "batch_norm"

    def _beside(self, nodes: list[Node]) -> list[Node]:
        """A deformable convolution, and what it reads beside its input: offsets, and a mask if it has one."""
        node = next(n for n in nodes if (c := self.view.calls.get(n)) is not None and c.op == "deform")
        read = (self.view.calls[node].args[n] for n in ("offset", "mask"))
        return [node, *(self._current(n) for n in read if n is not None)]

    def _keep_carry(self, node: Node, segments: tuple[Segment, ...]) -> None:
        """If a factor has moved past a carry, check the rank of what it reads, which may lie in any order now."""
        affine = self.view.affine[node]
        moved = any(isinstance(p, Step) and p.moved for s in segments if isinstance(s, Fuse) for p in s.parts)
        if affine.op.kind == "carry" and moved:
            node.target = RESHAPES.get(node.target, node.target)
            if affine.assumes is not None:
                self.ranks.check(self._current(affine.inputs[0][0]), affine.assumes)

    def _condemn(self, fuse: Fuse) -> None:
        for part in fuse.parts:
            for node in part_nodes(part):
                self.condemned.add(node)
                if node in self.view.affine:
                    self.condemned.update(self.view.affine[node].extra)

    def _redirect_readers(self) -> None:
        """Let those that ask a vanishing tensor for its rank or dtype ask what the layer reads instead."""
        for fuse, source in self.emitted.values():
            while (source := self._current(source)) in self.emitted:
                source = self.emitted[source][1]  # a layer keeps both
            for node in (n for p in fuse.parts for n in part_nodes(p)):
                for user in list(node.users):
                    if shape_reader(user) in ("rank", "dtype"):
                        user.replace_input_with(node, source)

    def _sweep(self) -> None:
        """Erase what the sites replaced, and what nobody reads because of it."""
        asserted: set[Any] = set()
        for node in list(self.graph.nodes):  # one check of a rank per tensor is enough
            key = rank_check(node)
            if key is not None:
                if key in asserted:
                    self.condemned.add(node)
                asserted.add(key)
        for node in reversed(list(self.graph.nodes)):
            if not node.users and (node in self.condemned or shape_reader(node)):
                inputs = node.all_input_nodes
                self.graph.erase_node(node)
                self.condemned.update(n for n in inputs if not n.users and self._pure(n))

    def _pure(self, node: Node) -> bool:
        if node.op == "get_attr" or node in self.view.constants or shape_reader(node):
            return True
        call = self.view.calls.get(node)
        pure = call is not None and call.op in {*SEVERAL, "getitem"} and node not in self.view.effects.writes
        return pure or node.target is operator.eq or is_number(node) or (is_aten(node) and schema.pure(node))

    def modules(self) -> dict[str, nn.Module]:
        """Every module a call in the graph can name: the root's, and the fused layers over them."""
        captured = self.view.captured
        known = {spelled(captured.root, path): module for path, module in captured.modules.items()}
        return captured.modules | known | {n: m for n, m in self.layers.items() if isinstance(m, nn.Module)}

    def params(self) -> int:
        """Parameters that the rewritten graph uses, each tensor once."""
        modules, root = self.modules(), self.view.captured.root
        used: dict[int, int] = {}
        for node in self.graph.nodes:
            if node.op == "call_module":
                used.update((id(p), p.numel()) for p in modules[str(node.target)].parameters())
            elif node.op == "get_attr" and node.target not in self.view.captured.constants:
                made = self.layers.get(str(node.target))
                value = attribute(root, str(node.target)) if made is None else made
                used.update({id(value): value.numel()} if isinstance(value, nn.Parameter) else {})
        return sum(used.values())

    def build(self, memo: dict[int, Any]) -> GraphModule:
        """The GraphModule of the rewritten graph; `memo` as in `assemble`."""
        return assemble(self.view.captured, self.graph, self.layers, memo)


def _ends_in_coefficient(piece: tuple[Segment, ...]) -> bool:
    """Whether a coefficient of the join went into a fused layer of the branch."""
    return any(isinstance(s, Fuse) and any(p.node is None for p in s.parts) for s in piece)
