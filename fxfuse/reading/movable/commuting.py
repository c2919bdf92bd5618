"""Nodes that commute with a factor a channel: reshapes, permutations, averages, resizing.

Each value such a node gives is one of its input's, or a mean of some with weights that sum to one, and all from
the same channel. So it commutes with any factor and shift a channel: batch_norm(flatten(linear(x))) is
flatten(batch_norm'(linear(x))), and linear(mean(batch_norm(x))) is linear(batch_norm'(mean(x))). Which axis of
the output is which of the input is proved by ranks, and by sizes that are equal for every input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Node

from fxfuse.algebra.operator import Operator
from fxfuse.facts.fact import Fact
from fxfuse.facts.sizes import Dims, Shape, kept_axes, order_of
from fxfuse.names import is_aten, plain
from fxfuse.ops.call import Call
from fxfuse.ops.movement import RESHAPES, ints_of
from fxfuse.reading.affine import Affine, layout

Axes = dict[int, int]


def read_commuting(node: Node, call: Call | None, dims: Dims, facts: Mapping[Node, Fact]) -> Affine | None:
    """What `node` does to the axes of its input; None where it may treat channels differently.

    In the operator `axes` are pairs (axis of the output, axis of the input) from the end, None where all
    stay; `rearrangement` is how it moves values, for another to be recognized as undoing it; `how` names what
    it does to the order in memory, see `planning.memory_order`.
    """
    if call is None:
        name = plain(node.target) if node.op == "call_method" or is_aten(node) else ""
        kept = name in ("contiguous", "clone") and len(node.args) == 1 and not node.kwargs
        return _affine(node, node.args[0], None, None, name) if kept else None
    source = call.args.get("input")
    if not isinstance(source, Node):
        return None
    if call.op == "adaptive_avg_pool" or (call.op == "avg_pool" and _averages(call)):
        axis = -(call.spatial or 0) - 1
        return _affine(node, source, {axis: axis}, None, f"pool {call.spatial}")
    if call.op not in RESHAPES | {"permute", "transpose", "average", "interpolate"}:
        return None
    shape, assumes = dims.of(source), None
    if shape is None:
        spatial, assumes = layout(facts[source])
        shape = None if spatial is None else dims.filled(source, None, spatial + 2)
    if call.op in RESHAPES:
        after = None if shape is None else dims.reshaped(shape, call)
        move = ("reshape", dims.of(source) or source.name, _name(node, call, dims, after if assumes is None else None))
        axes = {} if shape is None or after is None else kept_axes(shape, after)
        return _affine(node, source, axes, move, "unflatten" if call.op == "unflatten" else "reshape", assumes)
    if shape is None:
        return None
    if call.op in ("permute", "transpose"):
        order = order_of(call, len(shape))
        if order is None:
            return None
        axes = {o - len(order): i - len(order) for o, i in enumerate(order)}
        return _affine(node, source, axes, ("permute", order), "permute", assumes)
    averaged = _averaged(call, len(shape))
    return None if averaged is None else _affine(node, source, averaged, None, call.op, assumes)


def _affine(node: Node, source: Any, axes: Axes | None, move: Any, how: str, assumes: int | None = None) -> Affine:
    pairs = None if axes is None else tuple(sorted(axes.items()))
    consts = (("axes", pairs), ("rearrangement", move), ("how", how))
    op = Operator(kind="commuting", law="commuting", path=node.name, consts=consts)
    return Affine("unary", ((source, 1.0),), op, assumes=assumes)


def _name(node: Node, call: Call, dims: Dims, after: Shape | None) -> Any:
    """What stands for the shape that a reshape gives: its sizes, or whose shape it is."""
    other = call.args.get("other")
    return after or (dims.of(other) or other.name if isinstance(other, Node) else node.name)


def _averages(call: Call) -> bool:
    """Whether an average pool divides by the number of values it has, so that its weights sum to one."""
    args = call.args
    padded = args["padding"] != 0 and args["padding"] != (0,) * (call.spatial or 0)
    return args.get("divisor_override") is None and (args["count_include_pad"] is False or not padded)


def _averaged(call: Call, rank: int) -> Axes | None:
    """Axes that `mean` or `interpolate` leaves whole."""
    if call.op == "interpolate":
        return {1 - rank: 1 - rank}
    dims = ints_of(call.args["dim"])
    if not dims or call.args["dtype"] is not None or not isinstance(call.args["keepdim"], bool):
        return None
    gone = {d if d < 0 else d - rank for d in dims}
    left = [a for a in range(-rank, 0) if a not in gone]
    return {a if call.args["keepdim"] else a + sum(g > a for g in gone): a for a in left}


def undone(moves: list[Any]) -> bool:
    """Whether rearrangements, one after the other, leave everything where it was."""
    stack: list[Any] = []
    for move in moves:
        stack.append(move)
        while len(stack) > 1 and (both := _joined(stack[-2], stack[-1])) is not None:
            stack[-2:] = [both]
        if stack and _nothing(stack[-1]):
            stack.pop()
    return not stack


def _joined(one: Any, two: Any) -> Any:
    """Two rearrangements of a kind as one."""
    if one[0] != two[0]:
        return None
    if one[0] == "reshape":
        return ("reshape", one[1], two[2])
    return ("permute", tuple(one[1][i] for i in two[1])) if len(one[1]) == len(two[1]) else None


def _nothing(move: Any) -> bool:
    if move[0] == "reshape":
        return bool(move[1] == move[2])
    return bool(move[1] == tuple(range(len(move[1]))))
