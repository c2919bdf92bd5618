"""A rewritten graph with its layers as function calls on weights, or on inputs, for compilers that take those."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Graph, Node

from fxfuse.ops.deformable import is_deformable, torchvision_ops
from fxfuse.planning.autocast_forms import FLOAT32, FORM, WIDEN
from fxfuse.rewriting.layers import PARAMETERS


def functional(
    graph: Graph, layers: Mapping[str, nn.Module | nn.Parameter], autocast: Sequence[str] = ()
) -> dict[str, tuple[str, str]]:
    """Turn every call of one of `layers` into a function of attributes; (layer, parameter) by attribute path.

    `autocast` are the types of devices for which the graph will run under autocast.
    """
    attributes: dict[str, tuple[str, str]] = {}

    def attribute(name: str, parameter: str) -> Node | None:
        if getattr(layers[name], parameter, None) is None:
            return None
        attributes[f"{name}.{parameter}"] = (name, parameter)
        return graph.get_attr(f"{name}.{parameter}")

    for node in list(graph.nodes):
        name = str(node.target)
        if node.op == "get_attr" and name in layers:  # a bias that is added by itself
            path, _, parameter = name.rpartition(".")
            attributes[name] = (path, parameter)
        if node.op == "call_module" and name in layers:
            with graph.inserting_before(node):
                parameters = [attribute(name, p) for p in PARAMETERS]
                new = _call_under(autocast, graph, layers[name], node.args, parameters)
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    _erase_unread_attributes(graph)
    return attributes


def attributes_as_inputs(graph: Graph, paths: Iterable[str]) -> list[Node]:
    """Make inputs of the attributes at `paths`, in this order behind those that there are; the new inputs."""
    made, read = list[Node](), dict[str, list[Node]]()
    for node in graph.find_nodes(op="get_attr"):
        read.setdefault(str(node.target), []).append(node)
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        for path in paths:
            made.append(graph.placeholder("weight_" + path.replace(".", "_")))
            made[-1].meta = dict(read[path][0].meta)
            for old in read[path]:
                old.replace_all_uses_with(made[-1])
    _erase_unread_attributes(graph)
    return made


def _erase_unread_attributes(graph: Graph) -> None:
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)


def _call_under(
    autocast: Sequence[str], graph: Graph, layer: Any, args: tuple[Any, ...], parameters: list[Node | None]
) -> Node:
    """The call of a layer that gives the dtype of what it stands for, under autocast too."""
    form = getattr(layer, FORM, None) if autocast else None
    if form in (None, WIDEN):
        new = _call(graph, layer, args, parameters)
        return new if form is None else graph.call_method("float", (new,))
    off = [graph.call_function(_enter_autocast, (device, None, False, None)) for device in autocast]
    if form == FLOAT32:
        args = (graph.call_method("float", (args[0],)), *args[1:])
    else:
        parameters = [None if p is None else graph.call_method("type_as", (p, args[0])) for p in parameters]
    new = _call(graph, layer, args, parameters)
    for entered in reversed(off):
        graph.call_function(_exit_autocast, (entered,))
    return new


def _call(graph: Graph, layer: Any, args: tuple[Any, ...], parameters: list[Node | None]) -> Node:
    *state, frame = parameters
    if is_deformable(layer):
        x, offset, mask = (*args, None)[:3]
        values = (x, offset, *state, layer.stride, layer.padding, layer.dilation, mask)
        return graph.call_function(torchvision_ops().deform_conv2d, values)
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
