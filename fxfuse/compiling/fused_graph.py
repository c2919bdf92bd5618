"""One graph of Dynamo's, fused: functions of attributes, and where each attribute comes from at a call."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from fxfuse.algebra.constants import Apply, Attr, Held
from fxfuse.algebra.operator import Operator
from fxfuse.compiling.dynamo_graphs import attributes_read, exposed_state, frozen_state, traced
from fxfuse.compiling.options import CompileOptions
from fxfuse.cost import cost_name, resolve
from fxfuse.pattern import select
from fxfuse.pipeline import fuse
from fxfuse.reporting.report import Report
from fxfuse.rewriting.functional import functional
from fxfuse.rewriting.layers import PARAMETERS

logger = logging.getLogger("fxfuse")
_told = set[str]()


@dataclass(frozen=True)
class FusedGraph:
    """A rewritten graph of functions, and where its attributes come from.

    `state` are paths of the model's tensors by argument position, in order; `folded` the operator and the place
    (in `PARAMETERS`) of those computed from them; `constants` belong to the graph. It holds only while `held`,
    tensors of indices, have these values.
    """

    graph: Graph
    state: dict[int, str]
    folded: dict[str, tuple[Operator, int]]
    constants: dict[str, Any]
    held: Mapping[Attr | Apply, Held]
    report: Report


def fused_graph(gm: GraphModule, inputs: Sequence[Any], options: CompileOptions) -> FusedGraph | None:
    """Dynamo's graph fused, no weight read yet; None where it has to stay what it is. `gm` is not changed."""
    started = time.perf_counter()
    captured, state = traced(gm, inputs)
    if torch.is_grad_enabled() and any(inputs[i].requires_grad for i in state):
        _tell("graphs whose weights require gradients are not fused: call the model under torch.no_grad()")
        return None
    if frozen_state(gm):
        _tell(
            "torch._inductor.config.freezing is on: weights that change later are not followed; leave it off, "
            "as backend fxfuse bakes weights by itself and follows them"
        )
    if exposed := exposed_state(captured, state):
        captured, state = traced(gm, inputs, exposed)
    read = attributes_read(captured.graph, captured.root).items()
    constants = {path: value for path, value in read if path not in state.values()}
    done = fuse(captured, select(options.patterns), resolve(options.cost), weights=False)
    report = Report(
        model=f"graph {gm.meta.get('dynamo_compile_id', '')}".strip(),
        fired=done.fired,
        refused=done.refused,
        before=done.before,
        after=done.after,
        cost=cost_name(options.cost),
        seconds=time.perf_counter() - started,
        capture="dynamo",
    )
    logger.info("%s", report.headline)
    devices = dict.fromkeys(t.device.type for t in inputs if isinstance(t, torch.Tensor))
    autocast = [d for d in devices if torch.amp.is_autocast_available(d) and torch.is_autocast_enabled(d)]
    made, operators = functional(captured.graph, done.rewritten.layers, autocast), done.rewritten.operators
    folded = {path: (operators[name], PARAMETERS.index(place)) for path, (name, place) in made.items()}
    return FusedGraph(captured.graph, state, folded, constants, captured.held, report)


def _tell(text: str) -> None:
    """Warn once a process."""
    if text not in _told:
        _told.add(text)
        logger.warning(text)
