"""Each node of a graph read once into an affine step, a constant, or opaque; who reads whom, and in what runs.

After it no code asks whether a node was `nn.Conv2d` or `F.conv2d`. An affine node is one operator
of one tensor ("unary"), a sum of tensors with coefficients ("sum") or a concatenation ("concat").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.fx import Node

from fxfuse.capture.captured import Captured
from fxfuse.facts.fact import Fact
from fxfuse.facts.sizes import Dims
from fxfuse.names import plain
from fxfuse.ops.call import SEVERAL, Call
from fxfuse.ops.value_kinds import asks_size, shape_reader
from fxfuse.reading.affine import Affine
from fxfuse.reading.effects import Effects

Run = Iterator[tuple[Node, Affine]]
_SWITCHES = {"_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode"}


@dataclass(frozen=True)
class Nodes:
    """What every node of a graph is by itself; `shapings` are the calls that give the same values in another shape.

    `shapes` are those of the example inputs, as they were when the graph was read.
    """

    captured: Captured
    affine: dict[Node, Affine]
    constants: dict[Node, Any]
    effects: Effects
    facts: Mapping[Node, Fact]
    calls: Mapping[Node, Call]
    shapings: Mapping[Node, Call]
    shapes: Mapping[Node, torch.Size]

    @cached_property
    def dims(self) -> Dims:
        """Sizes of every value, and which are equal for every input."""
        captured = self.captured
        return Dims(captured.graph, self.calls, self.shapings, self.facts, captured.modules)

    @cached_property
    def sized(self) -> dict[Node, list[Node]]:
        """Who asks for the size of a node, for those that somebody asks."""
        asked = {n: [u for u in n.users if asks_size(u, n)] for n in self.affine}
        return {n: users for n, users in asked.items() if users}

    @cached_property
    def inside_regions(self) -> set[Node]:
        """Nodes between the first and the last switch of gradients or autocast: nothing is fused there.

        Where the last one switches gradients as the first did, they are not back again: what follows is inside too.
        """
        nodes = list(self.captured.graph.nodes)
        switches = [i for i, n in enumerate(nodes) if plain(n.target) in _SWITCHES]
        grad = [nodes[i].args[0] for i in switches if plain(nodes[i].target) == "_set_grad_enabled"]
        stop = len(nodes) if grad and grad[0] == grad[-1] else switches[-1] if switches else 0
        return set(nodes[switches[0] : stop] if switches else ())

    def source(self, node: Node) -> Node:
        """The tensor that a node reads, the first where there are several."""
        affine = self.affine.get(node)
        return node.all_input_nodes[0] if affine is None else affine.inputs[0][0]

    def data_users(self, node: Node) -> list[Node]:
        """Users that read more than its rank, dtype or size."""
        hidden = self.affine[node].extra if node in self.affine else ()
        return [u for u in node.users if u not in hidden and shape_reader(u) is None and not asks_size(u, node)]

    def readers(self, node: Node) -> list[Node]:
        """Who reads the data of `node`; pieces of a chunk or split are read where they are taken out."""
        found = []
        for user in self.data_users(node):
            call = self.calls.get(user)
            found += self.data_users(user) if call is not None and call.op in SEVERAL else [user]
        return found

    def before(self, node: Node, reader: Node, steps: Mapping[Node, Affine] | None = None) -> Run:
        """`node` and what comes before it, upward: each a unary step read by the one after it alone, `reader` the last.

        Whoever comes before the last one given has another reader, or is no unary step. `steps` say what each node
        does, by default the affine ones. Where a run is to end sooner, the caller leaves the loop.
        """
        steps = self.affine if steps is None else steps
        while (step := steps.get(node)) is not None and step.kind == "unary" and self.readers(node) == [reader]:
            yield node, step
            reader, node = node, step.inputs[0][0]

    def after(self, node: Node, steps: Mapping[Node, Affine] | None = None) -> Run:
        """What comes after `node`, downward: each a unary step that is the only one to read the one before it."""
        steps = self.affine if steps is None else steps
        while len(following := self.readers(node)) == 1 and (step := steps.get(following[0])) is not None:
            if step.kind != "unary" or step.inputs[0][0] is not node:
                return
            node = following[0]
            yield node, step
