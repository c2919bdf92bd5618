"""Each node of a graph read once into an affine step, a constant, or something opaque; and who reads whom.

After it no code asks whether a node was `nn.Conv2d` or `F.conv2d`. An affine node is one operator
of one tensor ("unary"), a sum of tensors with coefficients ("sum") or a concatenation ("concat").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch.fx import Node

from fxfuse.capture.captured import Captured, Shapes
from fxfuse.facts.fact import Fact
from fxfuse.facts.sizes import Dims
from fxfuse.ops.call import SEVERAL, Call
from fxfuse.ops.value_kinds import asks_size, shape_reader
from fxfuse.reading.affine import Affine
from fxfuse.reading.effects import Effects


@dataclass(frozen=True)
class Nodes:
    """What every node of a graph is by itself; `shapings` are the calls that give the same values in another shape."""

    captured: Captured
    affine: dict[Node, Affine]
    constants: dict[Node, Any]
    effects: Effects
    facts: Mapping[Node, Fact]
    calls: Mapping[Node, Call]
    shapings: Mapping[Node, Call]

    @property
    def shapes(self) -> Shapes:
        """Those of the example inputs."""
        return self.captured.shapes

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
