"""`torch.compile(model, backend="fxfuse")`: the same passes under any inner compiler, never stale."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule

from fxfuse.compiling.compiled_graph import CompiledGraph, GraphByNumbers
from fxfuse.compiling.dynamo_graphs import number_positions
from fxfuse.compiling.fused_graph import fused_graph
from fxfuse.compiling.options import CompileOptions, compile_options
from fxfuse.compiling.runners import untouched
from fxfuse.compiling.weight_sets import watch_optimizers
from fxfuse.reporting.report import Report

logger = logging.getLogger("fxfuse")
_graphs: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()


def fxfuse(gm: GraphModule, example_inputs: Sequence[Any], *, options: Any = None, mode: str | None = None) -> Any:
    """A Dynamo backend: fuses the graph and hands it to an inner compiler.

    Args:
        gm: the graph as Dynamo traced it; it is not changed.
        example_inputs: its arguments, the model's parameters and buffers among them.
        options: a dict with any of
            inner: a registered Dynamo backend or a callable; default "inductor".
            inner_options: passed on to it.
            mode: one of torch.compile's modes, for inductor.
            patterns, cost: as for `optimize`.
            freeze: True bakes weights into the graph, so that the compiler can pack them, and compiles anew when they
                change; False keeps them inputs; "auto" bakes those on a CPU, without gradients, until they change.
            check: how changes of weights are seen: "full" by identity, version and address, "identity", "never".
            on_report: called with the Report of each graph.
            strict: raise when fxfuse fails, where the untouched graph would go to the inner compiler.
        mode: the same as in `options`.

    Raises:
        ValueError: an unknown option, or an unknown value of one; the message lists the known ones.
    """
    chosen = compile_options(options, mode)
    numbers = number_positions(gm, example_inputs)
    if not numbers:
        return _compiled(gm, example_inputs, chosen, live=True)
    graphs = GraphByNumbers(numbers, lambda args, live: _compiled(gm, args, chosen, live))
    graphs.at(example_inputs, live=True)
    return graphs


fxfuse.reset = _graphs.clear  # type: ignore[attr-defined]  # Dynamo calls it where it forgets all graphs itself


def _compiled(gm: GraphModule, inputs: Sequence[Any], options: CompileOptions, live: bool) -> Any:
    """What Dynamo is given for its graph; `live` says that it is just compiling it."""
    try:
        fused = fused_graph(gm, inputs, options)
    except Exception as error:  # whatever goes wrong here, the model runs
        if options.strict:
            raise
        logger.error("a graph is left as it is: %s: %s", type(error).__name__, error, exc_info=True)
        fused = None
    if fused is None:
        return untouched(gm, inputs, options)
    if options.on_report is not None:
        options.on_report(fused.report)
    watch_optimizers()
    graph = CompiledGraph(fused, gm, inputs, options, live)
    _graphs.add(graph)
    return graph


def reports(compiled_model: Any) -> tuple[Report, ...]:
    """The reports of the graphs that run with weights of a model, compiled or with compiled parts."""
    ids = {id(t) for t in (*compiled_model.parameters(), *compiled_model.buffers())}
    return tuple(graph.report for graph in sorted(_graphs, key=lambda g: g.number) if graph.serves(ids))
