"""Copies of the graph modules that Dynamo gives, with the notes by which later stages know their inputs.

Dynamo's own are never handed on: it reads them again afterwards, and a compiler may do with its own as it likes.
"""

from __future__ import annotations

from typing import Any

from torch._dynamo.source import LocalSource
from torch.fx import Graph, GraphModule, Node

from fxfuse.attributes import attribute


def copied_module(gm: GraphModule) -> GraphModule:
    """A copy of a graph module, with the same attributes."""
    held = {str(n.target): attribute(gm, str(n.target)) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")}
    return module_of(copied_graph(gm.graph), held, gm)


def copied_graph(graph: Graph) -> Graph:
    """A copy of a graph with what Dynamo notes on its placeholders."""
    new, values = Graph(), dict[Node, Node]()
    for node in graph.nodes:
        values[node] = new.node_copy(node, values.__getitem__)
        if node.op == "placeholder":
            values[node]._dynamo_source = getattr(node, "_dynamo_source", None)
    return new


def module_of(graph: Graph, held: dict[str, Any], dynamo: GraphModule) -> GraphModule:
    """The module of a graph that was made of `dynamo`'s, with those of the attributes `held` that it reads."""
    gm = GraphModule({str(n.target): held[str(n.target)] for n in graph.nodes if str(n.target) in held}, graph)
    gm.meta = dict(dynamo.meta)
    known: dict[str, Any] = dict(getattr(dynamo, "_param_name_to_source", None) or {})
    names = [name for name, _ in (*gm.named_parameters(), *gm.named_buffers())]
    sources: Any = known | {name: LocalSource(f"fxfuse {name}") for name in names}
    gm._param_name_to_source = sources
    return gm
