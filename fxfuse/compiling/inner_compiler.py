"""The compiler below: a graph is copied with Dynamo's notes, and handed to inductor or to any other Dynamo backend.

Dynamo's own graphs are never handed on: it reads them again afterwards, and a compiler may do with its own as it likes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import LocalSource
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from fxfuse.compiling.dynamo_graphs import attributes_read
from fxfuse.compiling.options import CompileOptions

Runner = Callable[..., Any]


def copied_module(gm: GraphModule) -> GraphModule:
    """A copy of a graph module, with the same attributes."""
    return module_of(copied_graph(gm.graph), attributes_read(gm.graph, gm), gm)


def copied_graph(graph: Graph) -> Graph:
    """A copy of a graph with what Dynamo notes on its placeholders, by which later stages know their inputs."""
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


def compiled(
    gm: GraphModule, inputs: Sequence[Any], options: CompileOptions, mode: FakeTensorMode | None, baked: bool = False
) -> Runner:
    """`gm` compiled for `inputs`; `baked` says that its attributes never change, so that they may be packed.

    While Dynamo compiles, its own context stands. Later on `mode` is that of the fake tensors among `inputs`, and
    there is a new context about them.
    """
    with contextlib.nullcontext() if mode is None else tracing(TracingContext(mode)):
        if options.inner == "inductor":
            from torch._inductor.compile_fx import compile_fx

            patches = {"freezing": baked and not _crashes(gm), **(options.inner_options or {})}
            run: Any = compile_fx(gm, list(inputs), config_patches=patches)
            return run  # type: ignore[no-any-return]
        backend: Any = torch._dynamo.lookup_backend(options.inner)
        more = {"options": options.inner_options} if options.inner_options else {}
        return backend(gm, list(inputs), **more)  # type: ignore[no-any-return]


def _crashes(gm: GraphModule) -> bool:
    """Whether inductor's freezing would crash: on the CPU it packs convolutions of float64, which oneDNN lacks."""
    tensors: list[Tensor] = [*gm.parameters(), *gm.buffers()]
    return any(t.device.type == "cpu" and t.dtype is torch.float64 and t.dim() > 2 for t in tensors)
