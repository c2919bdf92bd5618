"""What puts a fused layer into a graph: under which path, before which node, and for whom it stands from then on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fxfuse.algebra.combine import needs_pad
from fxfuse.algebra.operator import Operator
from fxfuse.graph_edits import provenance
from fxfuse.names import above
from fxfuse.planning.autocast_forms import FORM, autocast_form
from fxfuse.planning.conflicts import answers
from fxfuse.planning.sites import Fuse, Site
from fxfuse.reading.view import View
from fxfuse.rewriting.feasible import Built
from fxfuse.rewriting.spelling import spelled


class Emitter:
    """Puts calls of `built` layers into the graph of a view, a node at a time.

    What others stand for is `condemned`: to be erased in the end, if nobody reads it.
    """

    def __init__(self, view: View, built: Built, sites: Iterable[Site], condemned: set[Node]) -> None:
        self.view, self.graph, self.built, self.condemned = view, view.captured.graph, built, condemned
        self.replaced: dict[Node, Node] = {}
        self.names: dict[Operator, str] = {}
        self.layers: dict[str, nn.Module | nn.Parameter] = {}
        self.taken = self._kept({n for s in sites for n in s.nodes()} | condemned)
        self.opened = {a for name in self.taken for a in above(name)}

    def _kept(self, fused: set[Node]) -> set[str]:
        """The names of modules and attributes that not only `fused` nodes use."""
        for node in reversed(self.graph.nodes):  # with what only they read of the weights
            if node in self.view.constants and node.users and fused.issuperset(node.users):
                fused.add(node)
        return {str(n.target) for n in self.graph.nodes if n.op in ("call_module", "get_attr") and n not in fused}

    def name(self, op: Operator) -> str:
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

    def current(self, node: Node) -> Node:
        """What stands for a node of the plan now: sites that read it are emitted after its own."""
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def replace(self, old: Node, new: Node) -> None:
        """Let everybody read `new` for a node that may stay where it is."""
        old.replace_all_uses_with(new)
        self.replaced[old] = new

    def stand_for(self, old: Node, new: Node) -> None:
        """Replace a node that is to go by another."""
        self.replace(old, new)
        self.condemned.add(old)

    def place(self, fuse: Fuse, before: Node) -> Node:
        """The node before which a fused layer has to stand: `before`, or one that asks for a size it gives."""
        asked = answers(fuse.parts, self.view.sized) or {}
        later = [u for n, by_input in asked.items() if not by_input for u in self.view.sized[n]]
        return min((before, *later, *self.beside(fuse)[:1]), key=self.view.effects.position.__getitem__)

    def beside(self, fuse: Fuse) -> list[Node]:
        """A deformable convolution, and what it reads beside its input: offsets, and a mask if it has one."""
        if fuse.op.kind != "warp":
            return []
        node = next(n for n in fuse.nodes if (c := self.view.calls.get(n)) is not None and c.op == "deform")
        read = (self.view.calls[node].args[n] for n in ("offset", "mask"))
        return [node, *(self.current(n) for n in read if n is not None)]

    def call(self, op: Operator, source: Node, beside: Sequence[Node] = ()) -> Node:
        """Call the layer of `op` on `source` and what it reads `beside` it, where the graph is inserting."""
        name, x = self.name(op), source
        if op.reads is not None:
            x = self.graph.call_function(torch.narrow, (x, -(op.spatial or 0) - 1, op.reads[0], len(op.reads)))
        if needs_pad(op):
            amounts = [a for low, high in op.padding[::-1] for a in (low, high)]
            mode = "constant" if op.padding_mode == "zeros" else op.padding_mode
            value: Any = op.pad_value if mode == "constant" else None
            x = self.graph.call_function(F.pad, (x, amounts, mode, value))
        return self.graph.call_module(name, (x, *beside))

    def give_form(self, fuse: Fuse, op: Operator) -> None:
        """Note at the layer of `op` how it is to run under autocast in place of a stretch, where it matters."""
        if (form := autocast_form(self.view, fuse)) is not None:
            setattr(self.layers[self.name(op)], FORM, form)

    def describe(self, new: Node, nodes: Sequence[Node], path: str) -> None:
        """Note for which `nodes` a new one stands, and where in the model the layer at `path` among them is."""
        affine = self.view.affine
        heaviest = next((n for n in nodes if n in affine and affine[n].op.path == path), nodes[-1])
        new.meta = provenance(heaviest) | {"fxfuse": tuple(dict.fromkeys(n.name for n in nodes))}
