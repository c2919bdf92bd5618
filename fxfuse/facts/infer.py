"""What is certain about the shape of every value: bounds on its rank, and sizes of single axes.

Nothing is assumed: a fact follows from the layers around the value (a BatchNorm2d only takes four
dims, a conv2d three or four) or from example inputs. Each operation relates the facts of its inputs
and its output; one pass forward, one back and one forward again carry them through the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from fxfuse.facts import ranks
from fxfuse.facts.dtypes import find_dtypes
from fxfuse.facts.fact import Fact, Facts, fact_of, known, known_axes, link, of_shape, offset, same_rank, same_shape
from fxfuse.names import torch_name
from fxfuse.ops.call import Call, Calls, piece_sizes
from fxfuse.ops.elementwise import elementwise
from fxfuse.ops.index_lists import fixed, pick
from fxfuse.ops.modules import Modules
from fxfuse.ops.movement import pooled
from fxfuse.ops.value_kinds import is_number, rank_check

# layers, and which of their arguments tells how many channels they read and give
_WEIGHTS = {**dict.fromkeys(("conv", "conv_transpose", "deform", "linear"), "weight"), "mm": "other"}
_WEIGHTS |= {"batch_norm": "running_mean"}


def infer(
    graph: Graph, calls: Calls, shapings: Calls, modules: Modules, shapes: Mapping[Node, torch.Size]
) -> dict[Node, Fact]:
    """Facts of every node; `shapes` (from example inputs) are taken as they are."""
    nodes, numbers = list(graph.nodes), dict[Node, bool]()
    read = {n: shape_call(n, calls, shapings, modules) for n in nodes}

    def found(given: Mapping[Node, torch.Size]) -> dict[Node, Fact]:
        facts = {n: Fact(0, 0) if is_number(n, numbers) else known(n) for n in nodes}
        # some may be gone from the graph since their shapes were noted
        facts |= {n: of_shape(tuple(shape)) for n, shape in given.items() if n in facts}
        for order in (nodes, nodes[::-1], nodes):
            for node in order:
                if (call := read[node]) is not None:
                    _relate(call, read, facts[node], facts)
                elif check := rank_check(node):
                    facts[check[0]].exactly(check[1])
        return facts

    sure = found({})
    facts = found(shapes) if shapes else sure
    dtypes = find_dtypes(graph, calls, shapings, modules, getattr(shapes, "dtypes", {}))
    for node, fact in facts.items():
        fact.sure = sure[node] if shapes else None
        fact.dtype = dtypes.get(node)
    return facts


def shape_call(node: Node, calls: Calls, shapings: Calls, modules: Modules) -> Call | None:
    """What tells the shape of a node: its call, or one that gives such a shape where it has none."""
    call = shapings.get(node) or calls.get(node)
    if call is not None and call.op != "refused":
        return call
    source = node.args[0] if node.args else node.kwargs.get("input")
    if elementwise(node, modules):
        return Call("same", {"input": source})
    spatial = pooled(node, modules)
    return Call("avg_pool", {"input": source}, spatial) if spatial else None


def _relate(call: Call, read: Mapping[Node, Call | None], out: Fact, facts: Facts) -> None:
    source = call.args.get("input")
    if call.op in _WEIGHTS and isinstance(source, Node):
        _relate_layer(call, facts[source], out, fact_of(call.args[_WEIGHTS[call.op]], facts))
    elif call.op == "getitem" and isinstance(source, Node):
        _relate_item(call.args["index"], read.get(source), source, out, facts)
    else:
        ranks.relate(call, out, facts)


def _relate_layer(call: Call, x: Fact, out: Fact, weight: Fact | None) -> None:
    """A layer reads and gives as many channels as its weight tells."""
    spatial, sizes = call.spatial or 0, {} if weight is None else weight.axes
    if call.op == "batch_norm":
        x.at_least({2: 4, 3: 5}.get(spatial, 2))
        x.at_most({1: 3, 2: 4, 3: 5}.get(spatial, 99))
        same_shape(x, out)
        if x.rank is not None and -1 in sizes:
            x.axes[1 - x.rank] = out.axes[1 - x.rank] = sizes[-1]
    elif call.op in ("linear", "mm"):
        x.at_least(1)
        same_rank(x, out)
        if weight is not None and {-1, -2} <= sizes.keys() and (call.op == "linear" or weight.rank == 2):
            link(x, out, {a: a for a in known_axes(x, out) if a < -1})
            read, given = (-1, -2) if call.op == "linear" else (-2, -1)
            x.axes[-1], out.axes[-1] = sizes[read], sizes[given]
    else:
        ranks.windows(x, out, spatial)
        first, second, groups = sizes.get(-spatial - 2), sizes.get(-spatial - 1), call.args.get("groups")
        if call.op == "deform" and first:
            out.axes[-3] = first
        elif first and second and isinstance(groups, int):
            pair = (second * groups, first) if call.op == "conv" else (first, second * groups)
            x.axes[-spatial - 1], out.axes[-spatial - 1] = pair


def _relate_item(index: Any, pieces: Call | None, source: Node, out: Fact, facts: Facts) -> None:
    x, asked = facts[source], torch_name(source)
    if asked in ("chunk", "split", "tensor_split", "unbind"):
        tensor = next(iter(source.all_input_nodes), None)
        if tensor is None or not isinstance(index, int):
            return
        whole = facts[tensor]
        offset(whole, out, -(asked == "unbind"))
        if pieces is not None and pieces.op in ("chunk", "split"):
            axis = whole.likely_axis(pieces.args["dim"])
            sizes = piece_sizes(pieces, None if axis is None else whole.axes.get(axis)) or ()
            size = sizes[index] if -len(sizes) <= index < len(sizes) else None
            ranks.part(pieces.args["dim"], size, whole, out)
    elif isinstance(index, tuple) and all(isinstance(i, slice) for i in index):
        same_rank(x, out)
        if (rank := x.likely) is not None:
            for axis, size in x.axes.items():
                cut = index[axis + rank] if 0 <= axis + rank < len(index) else slice(None)
                if fixed(cut):
                    out.axes.setdefault(axis, len(range(*cut.indices(size))))
    elif (picked := pick(index)) is not None:
        same_rank(x, out)
        x.at_least(picked.axis + 1 if picked.axis >= 0 else -picked.axis)
        ranks.part(picked.axis, len(picked.entries), x, out)
    else:
        ranks.relate_index(index, x, out)
