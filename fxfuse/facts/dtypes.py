"""What is certain about the dtype of every value: it follows from the weights of the layers around it.

An integer or half-precision input that a constant promotes must meet the same promotion in the result,
so a factor or shift may only be absorbed where the dtype it acts on is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch.fx import Graph, Node

from fxfuse.algebra.constants import Apply, Attr
from fxfuse.facts.fact import known_dtype
from fxfuse.names import is_aten, plain
from fxfuse.ops.call import SEVERAL, Call, Calls
from fxfuse.ops.elementwise import CASTS, named
from fxfuse.ops.modules import Modules, runs

# What keeps any dtype, and what keeps a floating one.
_KEEPS = set(
    "batch_norm avg_pool pad dropout identity neg flip narrow index_select channel_shuffle getitem flatten unflatten "
    "reshape like transpose permute unsqueeze squeeze expand expand_like repeat select".split()
)
_AVERAGES = {"average", "reduce", "adaptive_avg_pool", "interpolate", "same", "layer_norm"}
_COUNTS = ("argmax", "argmin", "all", "any", torch.argmax, torch.argmin, torch.all, torch.any)
_LAYERS = "activation pooling normalization instancenorm upsampling pixelshuffle flatten".split()
_LAYER_MODULES = tuple(f"torch.nn.modules.{name}" for name in _LAYERS)


def find_dtypes(
    graph: Graph, calls: Calls, shapings: Calls, modules: Modules, known: Mapping[Node, torch.dtype]
) -> dict[Node, torch.dtype]:
    """Dtypes that hold for every input the model accepts, and `known` ones (from example inputs)."""
    found = {n: d for n in graph.nodes if (d := known_dtype(n)) is not None} | dict(known)
    nodes = list(graph.nodes)
    for order in (nodes, nodes[::-1], nodes):
        for node in order:
            call = shapings.get(node) or calls.get(node)
            if call is None or call.op == "refused":
                _relate_other(node, found, modules)
            else:
                _relate(node, call, found)
    return found


def _relate(node: Node, call: Call, found: dict[Node, torch.dtype]) -> None:
    source = call.args.get("input")
    if call.op in ("conv", "conv_transpose", "linear", "deform"):
        weight = call.args["weight"]
        if isinstance(weight, (Attr, Apply)):
            found |= {value: weight.dtype for value in (source, node) if isinstance(value, Node)}
    elif call.op in ("add", "sub", "mul", "div", "matmul", "bmm", "attention"):
        _promote(node, [call.args[n] for n in ("input", "other", "key", "value") if n in call.args], found)
    elif call.op == "cat":
        tensors = call.args["tensors"]
        _promote(node, tensors if isinstance(tensors, (tuple, list)) else (), found)
    elif not isinstance(source, Node) or call.args.get("dtype") is not None:
        return
    elif call.op in _KEEPS:
        dtype = found.get(source, found.get(node))
        if dtype is not None:
            found[source] = found[node] = dtype
    elif call.op in SEVERAL or (call.op in _AVERAGES and node.target not in _COUNTS):
        dtype = found.get(source)
        if dtype is not None and (call.op in SEVERAL or dtype.is_floating_point):
            found[node] = dtype


def _promote(node: Node, operands: Sequence[Any], found: dict[Node, torch.dtype]) -> None:
    """The dtype of arithmetic: numbers and single values count only where they are of a higher kind."""
    wide = [o for o in operands if isinstance(o, Node) or (isinstance(o, (Attr, Apply)) and o.shape)]
    dtypes = [found.get(o) if isinstance(o, Node) else o.dtype for o in wide]
    known = [d for d in dtypes if d is not None]
    if not known or len(known) != len(dtypes):
        return
    result = reduce(torch.promote_types, known)
    rest = [o for o in operands if o not in wide]
    lifts = any(isinstance(o, complex) or (isinstance(o, (Attr, Apply)) and o.dtype.is_complex) for o in rest)
    if result.is_floating_point and not lifts:
        found[node] = result


def _relate_other(node: Node, found: dict[Node, torch.dtype], modules: Modules) -> None:
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
