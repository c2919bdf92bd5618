"""A rewritten graph with its layers as function calls on weights, for compilers that take those."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node

from fxfuse.ops.deformable import call_function, is_deformable
from fxfuse.rewriting.layers import PARAMETERS


def functional(graph: Graph, layers: Mapping[str, nn.Module | nn.Parameter]) -> dict[str, tuple[str, str]]:
    """Turn every call of one of `layers` into a function of attributes; (layer, parameter) by attribute path."""
    attributes: dict[str, tuple[str, str]] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr" and node.target in layers:  # a bias that is added by itself
            path, _, name = str(node.target).rpartition(".")
            attributes[str(node.target)] = (path, name)
        if node.op != "call_module" or node.target not in layers:
            continue
        name, layer = str(node.target), layers[str(node.target)]
        state: list[Node | None] = []
        with graph.inserting_before(node):
            for parameter in PARAMETERS:
                if getattr(layer, parameter, None) is None:
                    state.append(None)
                    continue
                attributes[f"{name}.{parameter}"] = (name, parameter)
                state.append(graph.get_attr(f"{name}.{parameter}"))
            new = _call(graph, layer, node.args, state)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    _drop_unread(graph)
    return attributes


def attributes_as_inputs(graph: Graph, paths: Iterable[str]) -> list[Node]:
    """Turn the attributes at `paths` into inputs behind those there are; attributes that nothing reads go."""
    nodes: dict[str, list[Node]] = {}
    for node in graph.find_nodes(op="get_attr"):
        nodes.setdefault(str(node.target), []).append(node)
    inputs = []
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        for path in paths:
            new = graph.placeholder("weight_" + path.replace(".", "_"))
            new.meta = dict(nodes[path][0].meta)
            for node in nodes[path]:
                node.replace_all_uses_with(new)
            inputs.append(new)
    _drop_unread(graph)
    return inputs


def _drop_unread(graph: Graph) -> None:
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)


def _call(graph: Graph, layer: Any, args: tuple[Any, ...], parameters: list[Node | None]) -> Node:
    *state, frame = parameters
    if is_deformable(layer):
        return call_function(graph, layer, args, state)
    (x,) = args
    if isinstance(layer, nn.Linear):
        return graph.call_function(F.linear, (x, *state))
    rank = len(layer.kernel_size)
    if layer.transposed:
        more = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
        return graph.call_function(getattr(F, f"conv_transpose{rank}d"), (x, *state, *more))
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x = graph.call_function(F.pad, (x, layer._reversed_padding_repeated_twice, layer.padding_mode))
        padding = (0,) * rank
    convolve, geometry = getattr(F, f"conv{rank}d"), (layer.stride, padding, layer.dilation, layer.groups)
    if frame is None:
        return graph.call_function(convolve, (x, *state, *geometry))
    sizes = [graph.call_method("size", (x, d)) for d in range(-rank, 0)]
    inside = graph.call_method("new_zeros", (x, (1, 1, *sizes)))
    border = graph.call_function(F.pad, (inside, layer.amounts, "constant", 1.0))
    border = graph.call_function(convolve, (border, frame, None, layer.stride, 0, layer.dilation))
    if layer.uneven:
        x = graph.call_function(F.pad, (x, layer.amounts))
    out = graph.call_function(convolve, (x, *state, *geometry))
    return graph.call_function(torch.add, (out, graph.call_function(operator.getitem, (border, 0))))
