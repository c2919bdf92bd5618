"""What is certain about the dtype of every value: it follows from the weights of the layers around it.

An integer or half-precision input that a constant promotes must meet the same promotion in the result,
so a factor or shift may only be absorbed where the dtype it acts on is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from fxfuse.algebra.constants import Apply, Attr
from fxfuse.facts.fact import known_dtype
from fxfuse.names import is_aten, plain
from fxfuse.ops.call import SEVERAL, Call
from fxfuse.ops.elementwise import CASTS, named
from fxfuse.ops.modules import runs

_SAME = {"batch_norm", "avg_pool", "pad", "dropout", "identity", "neg", "flip", "narrow", "index_select"}
_SAME |= {"channel_shuffle", "flatten"}
_MOVES = set("flatten unflatten reshape like transpose permute unsqueeze squeeze expand expand_like repeat".split())
_MOVES |= {"select"}
_AVERAGES = {"average", "reduce", "adaptive_avg_pool", "interpolate", "same", "layer_norm"}
_LAYERS = "activation pooling normalization instancenorm upsampling pixelshuffle flatten".split()
_LAYER_MODULES = tuple(f"torch.nn.modules.{name}" for name in _LAYERS)


def find_dtypes(
    graph: Graph,
    calls: Mapping[Node, Call],
    shapings: Mapping[Node, Call],
    modules: Mapping[str, nn.Module],
    known: Mapping[Node, torch.dtype],
) -> dict[Node, torch.dtype]:
    """Dtypes that hold for every input the model accepts, and `known` ones (from example inputs)."""
    found = {n: d for n in graph.nodes if (d := known_dtype(n)) is not None} | dict(known)
    nodes = list(graph.nodes)
    for order in (nodes, nodes[::-1], nodes):
        for node in order:
            if node in shapings:
                _relate_shaping(node, shapings[node], found)
            else:
                _relate(node, calls.get(node), found, modules)
    return found


def _relate(node: Node, call: Call | None, found: dict[Node, torch.dtype], modules: Mapping[str, nn.Module]) -> None:
    if call is None or call.op == "refused":
        _relate_other(node, found, modules)
        return
    source = call.args.get("input")
    if call.op in ("conv", "conv_transpose", "linear", "deform"):
        weight = call.args["weight"]
        if isinstance(weight, (Attr, Apply)):
            for value in (source, node):
                if isinstance(value, Node):
                    found[value] = weight.dtype
    elif call.op in ("add", "sub", "mul", "div"):
        _promote(node, (source, call.args["other"]), found)
    elif call.op == "cat":
        tensors = call.args["tensors"]
        _promote(node, tuple(tensors) if isinstance(tensors, (tuple, list)) else (), found)
    elif isinstance(source, Node) and (call.op in _SAME or call.op == "getitem"):
        dtype = found.get(source, found.get(node))
        if dtype is not None:
            found[source] = found[node] = dtype
    elif isinstance(source, Node) and call.op in SEVERAL and source in found:
        found[node] = found[source]


def _relate_shaping(node: Node, call: Call, found: dict[Node, torch.dtype]) -> None:
    """What moves, averages or normalizes values keeps a floating dtype; only what moves them keeps any."""
    if call.op in ("matmul", "bmm", "attention"):
        _promote(node, tuple(call.args[n] for n in ("input", "other", "key", "value") if n in call.args), found)
        return
    source = call.args.get("input")
    if not isinstance(source, Node) or call.args.get("dtype") is not None or call.op not in _MOVES | _AVERAGES:
        return
    if node.target in ("argmax", "argmin", "all", "any", torch.argmax, torch.argmin, torch.all, torch.any):
        return
    dtype = found.get(source, found.get(node) if call.op in _MOVES else None)
    if dtype is not None and (call.op in _MOVES or dtype.is_floating_point):
        found[source] = found[node] = dtype


def _promote(node: Node, operands: tuple[Any, ...], found: dict[Node, torch.dtype]) -> None:
    """The dtype of arithmetic: numbers and single values count only where they are of a higher kind."""
    wide = [o for o in operands if isinstance(o, Node) or (isinstance(o, (Attr, Apply)) and o.shape)]
    dtypes = [found.get(o) if isinstance(o, Node) else o.dtype for o in wide]
    known = [d for d in dtypes if d is not None]
    if not known or len(known) != len(dtypes):
        return
    result = known[0]
    for dtype in known[1:]:
        result = torch.promote_types(result, dtype)
    rest = [o for o in operands if o not in wide]
    lifts = any(isinstance(o, complex) or (isinstance(o, (Attr, Apply)) and o.dtype.is_complex) for o in rest)
    if result.is_floating_point and not lifts:
        found[node] = result


def _relate_other(node: Node, found: dict[Node, torch.dtype], modules: Mapping[str, nn.Module]) -> None:
    """Elementwise operations and layers without weights of their own keep a floating dtype."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return
    if node.op == "call_method" and str(node.target) in CASTS:
        found[node] = CASTS[str(node.target)]
        return
    method = plain(node.target) if node.op == "call_method" or is_aten(node) else ""
    keeps = bool(named(node)) or method in ("contiguous", "clone", "detach")
    if node.op == "call_module":
        keeps = getattr(runs(modules[str(node.target)]), "__module__", "") in _LAYER_MODULES
    dtype = found.get(source)
    same = not any(isinstance(v, torch.dtype) for v in (*node.args, *node.kwargs.values()))
    if keeps and same and node.all_input_nodes == [source] and dtype is not None and dtype.is_floating_point:
        found[node] = dtype
