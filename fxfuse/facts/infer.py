"""What is certain about the shape of every value: bounds on its rank, and sizes of single axes.

Nothing is assumed: a fact follows from the layers around the value (a BatchNorm2d only takes four
dims, a conv2d three or four) or from example inputs. Each operation relates the facts of its inputs
and its output; one pass forward, one back and one forward again carry them through the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from fxfuse.facts import ranks
from fxfuse.facts.broadcasting import OF_SEVERAL
from fxfuse.facts.dtypes import find_dtypes
from fxfuse.facts.fact import Fact, fact_of, known, of_shape, offset, same_rank, same_shape
from fxfuse.names import torch_name
from fxfuse.ops.call import Call
from fxfuse.ops.elementwise import elementwise
from fxfuse.ops.index_lists import pick
from fxfuse.ops.movement import pooled
from fxfuse.ops.questions import rank_check
from fxfuse.ops.value_kinds import is_number


def infer(
    graph: Graph,
    calls: Mapping[Node, Call],
    shapings: Mapping[Node, Call],
    modules: Mapping[str, nn.Module],
    shapes: Mapping[Node, torch.Size],
) -> dict[Node, Fact]:
    """Facts of every node; `shapes` (from example inputs) are taken as they are."""
    nodes, numbers = list(graph.nodes), dict[Node, bool]()

    def found(given: Mapping[Node, torch.Size]) -> dict[Node, Fact]:
        facts = {n: Fact(0, 0) if is_number(n, numbers) else known(n) for n in nodes}
        # some may be gone from the graph since their shapes were noted
        facts |= {n: of_shape(tuple(shape)) for n, shape in given.items() if n in facts}
        for order in (nodes, nodes[::-1], nodes):
            for node in order:
                if node in shapings:
                    ranks.relate(shapings[node], facts[node], facts)
                else:
                    _relate(node, calls, facts, modules)
        return facts

    sure = found({})
    facts = found(shapes) if shapes else sure
    dtypes = find_dtypes(graph, calls, shapings, modules, getattr(shapes, "dtypes", {}))
    for node, fact in facts.items():
        fact.sure = sure[node] if shapes else None
        fact.dtype = dtypes.get(node)
    return facts


def _relate(node: Node, calls: Mapping[Node, Call], facts: dict[Node, Fact], modules: Mapping[str, nn.Module]) -> None:
    out, call = facts[node], calls.get(node)
    if call is None or call.op == "refused":
        _relate_other(node, out, facts, modules)
        return
    source = call.args.get("input")
    if call.op in OF_SEVERAL:
        OF_SEVERAL[call.op](call, out, facts)
        return
    if not isinstance(source, Node):
        return
    x = facts[source]
    if call.op in ("conv", "conv_transpose"):
        _spatial(x, out, call.spatial or 0)
        weight, groups = fact_of(call.args["weight"], facts), call.args["groups"]
        if weight is not None and weight.rank is not None:
            first, second = weight.axes.get(-weight.rank), weight.axes.get(1 - weight.rank)
            if first and second and isinstance(groups, int):
                pair = (second * groups, first) if call.op == "conv" else (first, second * groups)
                axis = -(call.spatial or 0) - 1
                x.axes[axis], out.axes[axis] = pair
    elif call.op == "deform":
        _spatial(x, out, 2)
        weight = fact_of(call.args["weight"], facts)
        if weight is not None and -4 in weight.axes:
            out.axes[-3] = weight.axes[-4]
    elif call.op == "mm":
        x.at_least(1)
        same_rank(x, out)
        other = fact_of(call.args["other"], facts)
        if other is not None and other.rank == 2 and {-1, -2} <= other.axes.keys():
            x.axes[-1], out.axes[-1] = other.axes[-2], other.axes[-1]
    elif call.op == "linear":
        x.at_least(1)
        same_rank(x, out)
        weight = fact_of(call.args["weight"], facts)
        if weight is not None and {-1, -2} <= weight.axes.keys():
            others = {a: n for f in (x, out) for a, n in f.axes.items() if a != -1}
            x.axes.update(others | {-1: weight.axes[-1]})
            out.axes.update(others | {-1: weight.axes[-2]})
    elif call.op == "batch_norm":
        x.at_least({2: 4, 3: 5}.get(call.spatial or 0, 2))
        x.at_most({1: 3, 2: 4, 3: 5}.get(call.spatial or 0, 99))
        same_shape(x, out)
        mean = fact_of(call.args["running_mean"], facts)
        if x.rank is not None and mean is not None and -1 in mean.axes:
            x.axes[1 - x.rank] = out.axes[1 - x.rank] = mean.axes[-1]
    elif call.op == "avg_pool":
        _spatial(x, out, call.spatial or 0, channels=True)
    elif call.op == "pad":
        same_rank(x, out)
        pad = call.args["pad"]
        if isinstance(pad, (tuple, list)):
            untouched = {a: n for f in (x, out) for a, n in f.axes.items() if a < -len(pad) // 2}
            x.axes.update(untouched)
            out.axes.update(untouched)
    elif call.op in ("dropout", "identity", "neg", "channel_shuffle", "flip"):
        same_shape(x, out)
    elif call.op == "narrow":
        same_rank(x, out)
        _relate_part(call.args["dim"], call.args["length"], x, out)
    elif call.op == "index_select":
        same_rank(x, out)
    elif call.op == "getitem":
        _relate_item(call, calls.get(source), source, out, facts)


def _spatial(x: Fact, out: Fact, spatial: int, channels: bool = False) -> None:
    x.at_least(spatial + 1)
    x.at_most(spatial + 2)
    same_rank(x, out)
    if channels:
        axis = -spatial - 1
        size = x.axes.get(axis, out.axes.get(axis))
        if size is not None:
            x.axes[axis] = out.axes[axis] = size


def _relate_item(call: Call, pieces: Call | None, source: Node, out: Fact, facts: Mapping[Node, Fact]) -> None:
    index = call.args["index"]
    asked = torch_name(source)
    if asked in ("chunk", "split", "tensor_split", "unbind"):
        tensor = next(iter(source.all_input_nodes), None)
        if tensor is not None and isinstance(index, int):
            offset(facts[tensor], out, -(asked == "unbind"))
            if pieces is not None and pieces.op in ("chunk", "split"):
                _relate_piece(pieces, index, facts[tensor], out)
    elif isinstance(index, tuple) and all(isinstance(i, slice) for i in index):
        same_rank(facts[source], out)
        _relate_slices(index, facts[source], out)
    elif (picked := pick(index)) is not None:
        same_rank(facts[source], out)
        facts[source].at_least(picked.axis + 1 if picked.axis >= 0 else -picked.axis)
        _relate_part(picked.axis, len(picked.entries), facts[source], out)
    else:
        ranks.relate_index(index, facts[source], out)


def _relate_slices(index: tuple[slice, ...], x: Fact, out: Fact) -> None:
    rank = x.likely
    if rank is None:
        return
    for axis, size in x.axes.items():
        cut = index[axis + rank] if 0 <= axis + rank < len(index) else slice(None)
        if all(b is None or isinstance(b, int) for b in (cut.start, cut.stop, cut.step)):
            out.axes.setdefault(axis, len(range(*cut.indices(size))))


def _relate_part(dim: Any, size: Any, x: Fact, out: Fact) -> None:
    """A part of x, of `size` along `dim` and whole along the others."""
    axis = x.likely_axis(dim)
    if axis is None:
        return
    for other, n in x.axes.items():
        if other != axis:
            out.axes.setdefault(other, n)
    if isinstance(size, int):
        out.axes.setdefault(axis, size)


def _relate_piece(call: Call, index: Any, x: Fact, out: Fact) -> None:
    """One output of chunk or split."""
    dim, sizes = call.args["dim"], call.args["chunks" if call.op == "chunk" else "split_size"]
    axis = x.likely_axis(dim)
    whole = None if axis is None else x.axes.get(axis)
    if isinstance(sizes, int) and sizes > 0 and whole is not None:
        size = -(-whole // sizes) if call.op == "chunk" else sizes
        sizes = [min(size, whole - i) for i in range(0, whole, size)]
    listed = isinstance(sizes, (list, tuple)) and isinstance(index, int) and -len(sizes) <= index < len(sizes)
    _relate_part(dim, sizes[index] if listed else None, x, out)


def _relate_other(node: Node, out: Fact, facts: Mapping[Node, Fact], modules: Mapping[str, nn.Module]) -> None:
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return
    if elementwise(node, modules):
        same_shape(facts[source], out)
    elif spatial := pooled(node, modules):
        _spatial(facts[source], out, spatial, channels=True)
    elif check := rank_check(node):
        facts[check[0]].exactly(check[1])
