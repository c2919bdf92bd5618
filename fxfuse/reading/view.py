"""The view: all that is known of a graph before it is planned. `look` reads each node once and gives it.

Axes are decided by rank, never by sizes that happen to agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from fxfuse.algebra.constants import Attr
from fxfuse.algebra.operator import sources
from fxfuse.attributes import tensor_at
from fxfuse.capture.captured import Captured
from fxfuse.capture.symbolic import stays
from fxfuse.facts.infer import infer
from fxfuse.ops.call import Call
from fxfuse.ops.movement import read_shaping
from fxfuse.ops.spellings import read
from fxfuse.reading.affine import Affine, Unknown
from fxfuse.reading.arithmetic import ARITHMETIC
from fxfuse.reading.border_fill import border_fills
from fxfuse.reading.effects import Effects
from fxfuse.reading.folding import find_constants
from fxfuse.reading.layers import LAYERS
from fxfuse.reading.movable.find import Movable, find_movable
from fxfuse.reading.nodes import Nodes
from fxfuse.refusal import Refusal

READERS = {**LAYERS, **ARITHMETIC}


@dataclass(frozen=True)
class View(Nodes):
    """All that later stages know of the graph: its nodes, why some are opaque, and what may act elsewhere.

    Among its affine nodes are those between a factor and a layer that commute with the factor.
    """

    refused: Mapping[Node, Refusal]
    movable: Movable


def look(captured: Captured) -> View:
    """Read every node of the graph as it is now."""
    graph, root, modules = captured.graph, captured.root, captured.modules

    def attr(path: str) -> Attr | None:
        tensor = tensor_at(root, path)
        return None if tensor is None else Attr(path, tuple(tensor.shape), tensor.dtype)

    calls = {n: c for n in graph.nodes if (c := read(n, modules, attr)) is not None}
    effects = Effects(graph, calls, modules)
    constants = find_constants(graph, root, captured.constants, effects)
    calls = {n: _resolved(c, constants) for n, c in calls.items() if n not in constants}
    shapings = {n: c for n in graph.nodes if n not in constants and (c := read_shaping(n, modules)) is not None}
    facts = infer(graph, calls, shapings, modules, captured.shapes)
    fills = border_fills(calls, facts, effects.position)
    effects.forget(n for fill in fills.values() for n in fill.writes)
    written = effects.written_attributes()
    affine: dict[Node, Affine] = {}
    refused: dict[Node, Refusal] = {}
    for node, call in calls.items():
        try:
            result = READERS[call.op](call, facts, node) if call.op in READERS else call.refusal
        except Unknown:
            if call.op == "batch_norm":
                reason = "what batch_norm normalizes with is computed when the model runs, or of several dtypes"
                refused[node] = Refusal(reason, call.path or node.name)
            continue
        if isinstance(result, Affine) and node in fills:
            fill = fills[node]
            result = replace(result, op=replace(result.op, pad_value=fill.value), extra=(*fill.writes, *fill.slices))
        if isinstance(result, Affine) and not effects.private_write(node):
            result = Refusal("it writes a tensor in place that is read elsewhere", remedy="use the out-of-place form")
        if isinstance(result, Affine) and written and any(a.path in written for a in sources(result.op)):
            result = Refusal("the forward itself writes its weights")
        if isinstance(result, Refusal):
            refused[node] = result.at(call.path or node.name)
        elif result is not None:
            affine[node] = result
    if affine and (writer := effects.by_strides()) is not None:
        reason = "whether it writes a tensor that is read again depends on strides, which a fusion may change"
        remedy = "use the out-of-place form, or view instead of flatten and reshape"
        affine, refused = {}, {**refused, writer: Refusal(reason, writer.name, remedy)}
    shapes = dict(captured.shapes)
    nodes = Nodes(captured, affine, constants, effects, facts, calls, shapings, shapes)
    for node in [n for n in affine if n in nodes.inside_regions]:
        if (gone := affine.pop(node)).op.law == "batch_norm":
            refused[node] = Refusal("the forward switches gradients or autocast before it and after it", gone.op.path)
    whole = {n: str(n.target) for n in graph.nodes if n.op == "call_module" and n.target in captured.whole}
    refused |= {node: stays(path, captured.whole[path]) for node, path in whole.items()}
    movable, affine = find_movable(nodes)
    return View(captured, affine, constants, effects, facts, calls, shapings, shapes, refused, movable)


def _resolved(call: Call, constants: Mapping[Node, Any]) -> Call:
    """A call of constants where it was one of the nodes that give them."""
    args = {k: constants.get(v, v) if isinstance(v, Node) else v for k, v in call.args.items()}
    return replace(call, args=args)
