"""Graphs as Dynamo hands them to a backend: read as captured, with the model's state as attributes.

Dynamo passes parameters and buffers as arguments, the current ones at every call. Here they become
attributes of a module made for the purpose, so that all later stages find them where a traced model has
them. Dynamo's own graph is never edited: it reads the placeholders' metadata again afterwards.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxfuse.attributes import attribute
from fxfuse.capture.captured import KNOWN, Captured, Shapes
from fxfuse.names import plain
from fxfuse.ops.spellings import read
from fxfuse.reading.effects import Effects

_INDEX = re.compile(r"\['?(.*?)'?\]|\.([A-Za-z_]\w*)")
_TABLES = {"_modules", "_parameters", "_buffers"}
_READS = ("get_attr", "call_module")


def statistics(gm: GraphModule, training: bool) -> list[int]:
    """Positions of the running statistics of all batch norms, or of those alone that train and so write them."""
    positions = {n: i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
    found: set[int] = set()
    for node in gm.graph.nodes:
        call = read(node, {}, lambda path: None) if node.op == "call_function" else None
        if call is not None and call.op == "batch_norm" and (call.args["training"] or not training):
            found |= {positions[call.args[n]] for n in ("running_mean", "running_var") if call.args[n] in positions}
    return sorted(found)


def switches_gradients_on(gm: GraphModule) -> bool:
    """Whether a part of the graph asks for gradients though its caller may not."""
    on = {"_set_grad_enabled": True, "_enter_inference_mode": False}
    return any(on.get(plain(n.target)) in n.args for n in gm.graph.nodes if plain(n.target) in on)


def traced(
    gm: GraphModule, inputs: Sequence[Any], exposed: frozenset[int] = frozenset()
) -> tuple[Captured, dict[int, str]]:
    """Dynamo's graph with every state placeholder, those at `exposed` aside, made an attribute; `gm` stays as it is.

    With it the attribute path of each by its position.
    """
    root, graph = nn.Module(), Graph()
    values: dict[Node, Any] = {}
    arguments = dict(enumerate(gm.graph.find_nodes(op="placeholder")))
    numbers = number_positions(gm, inputs)
    state = {i: n for i, n in arguments.items() if _is_state(n, inputs[i]) and i not in exposed and i not in numbers}
    for index, node in arguments.items():
        if index not in state:
            values[node] = graph.node_copy(node)
            values[node]._dynamo_source = getattr(node, "_dynamo_source", None)
    paths = {i: _put(root, _path(n), inputs[i]) for i, n in state.items()}
    for index, path in paths.items():
        values[state[index]] = graph.get_attr(path)
        values[state[index]].meta = dict(state[index].meta)
    asked = {user: inputs[i].item() for i in numbers for user in arguments[i].users}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            continue
        if node in asked:
            values[node] = asked[node]
            continue
        values[node] = graph.node_copy(node, values.__getitem__)
        if node.op in _READS:  # state that a global freezing left there, constants, graphs of branches, modules
            values[node].target = _put(root, str(node.target), attribute(gm, str(node.target)))
    shapes = _shapes(v for v in values.values() if isinstance(v, Node))
    return Captured(graph, root.eval(), how="dynamo", shapes=shapes), paths


def attributes_read(graph: Graph, root: nn.Module) -> dict[str, Any]:
    """What a graph reads or calls of its module, by path."""
    return {str(n.target): attribute(root, str(n.target)) for n in graph.nodes if n.op in _READS}


def frozen_state(gm: GraphModule) -> list[Tensor]:
    """Parameters and buffers that inductor's global freezing made attributes of Dynamo's graph."""
    sources = getattr(gm, "_param_name_to_source", None) or {}
    values = attributes_read(gm.graph, gm).items()
    return [v for n, v in values if isinstance(v, nn.Parameter) or (n in sources and isinstance(v, Tensor))]


def number_positions(gm: GraphModule, inputs: Sequence[Any]) -> list[int]:
    """Positions of numbers, such as a batch norm's eps, that Dynamo passes as fresh tensors and asks for their item.

    They become constants of the graph, which then holds for calls with the same numbers.
    """
    found = []
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        value = inputs[index]
        single = isinstance(value, Tensor) and value.dim() == 0 and not isinstance(value, nn.Parameter)
        if single and node.users and all(u.op == "call_method" and u.target == "item" for u in node.users):
            found.append(index)
    return found


def exposed_state(captured: Captured, state: dict[int, str]) -> frozenset[int]:
    """Positions of state that the graph writes, or that an output may share memory with: it stays an input."""
    graph, modules = captured.graph, captured.modules
    calls = {n: c for n in graph.nodes if (c := read(n, modules, lambda path: None)) is not None}
    effects = Effects(graph, calls, modules)
    written = effects.written_attributes() if effects.writes else set()
    shown = {effects.classes[n] for o in graph.find_nodes(op="output") for n in o.all_input_nodes}
    written |= {str(n.target) for n in graph.find_nodes(op="get_attr") if effects.classes[n] in shown}
    return frozenset(i for i, path in state.items() if path in written)


def _is_state(node: Node, value: Any) -> bool:
    """Whether a placeholder is a parameter, buffer or tensor attribute of the model."""
    if not isinstance(value, Tensor):
        return False
    source = getattr(getattr(node, "_dynamo_source", None), "guard_source", None)
    return (
        isinstance(value, nn.Parameter)
        or "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
        or (source is not None and source.is_unspecialized_nn_module())
    )


def _path(node: Node) -> str:
    """`layers.0.weight` for the source `L['self']._modules['layers']._modules['0']._parameters['weight']`."""
    source = getattr(node, "_dynamo_source", None)
    name = source.name if source is not None else str(node.target)
    words = [a or b for a, b in _INDEX.findall(name() if callable(name) else name)]
    parts = [w for w in words[1:] if w not in _TABLES]
    return ".".join(re.sub(r"\W", "_", p) for p in parts) or str(node.target)


def _put(root: nn.Module, path: str, value: Any) -> str:
    """Hold `value` at `path`, or at the next free path like it; the path it got."""
    *owners, name = path.split(".")
    holder: Any = root
    for owner in owners:
        if not hasattr(holder, owner):
            holder.add_module(owner, nn.Module())
        holder = getattr(holder, owner)
        if type(holder) is not nn.Module:
            return _put(root, path.replace(".", "_"), value)
    names = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
    free = next(n for n in names if getattr(holder, n, value) is value)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        holder.register_buffer(free, value)
    else:
        setattr(holder, free, value)
    return ".".join((*owners, free))


def _shapes(nodes: Any) -> Shapes:
    """Shapes as Dynamo saw them. A size that it left open is certain for none, and a mere hint for the cost."""
    shapes = Shapes()
    for node in nodes:
        value = node.meta.get("example_value")
        if not isinstance(value, Tensor):
            continue
        sizes = [s if isinstance(s, int) else None for s in value.shape]
        node.meta[KNOWN] = (tuple(sizes), value.dtype)
        hints = [s if isinstance(s, int) else s.node.hint for s in value.shape]
        shapes.dtypes[node] = value.dtype
        if None not in hints:
            shapes[node] = torch.Size(hints)
    return shapes
