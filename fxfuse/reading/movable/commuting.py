"""Nodes that commute with a factor a channel: reshapes, permutations, averages, resizing.

Each value such a node gives is one of its input's, or a mean of some with weights that sum to one, and all from
the same channel. So it commutes with any factor and shift a channel: batch_norm(flatten(linear(x))) is
flatten(batch_norm'(linear(x))), and linear(mean(batch_norm(x))) is linear(batch_norm'(mean(x))). Which axis of
the output is which of the input is proved by ranks, and by sizes that are equal for every input.

In which order a value lies in memory is told too, as far as it is certain: a batch norm changes it, and may not be
missed. It gives its result in row-major order, or with the channels last where its input has them last, whatever order
it reads. Where it has moved away, somebody who needs that order (a `view`, say) must still find it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Node

from fxfuse.algebra.operator import Operator
from fxfuse.facts.fact import Fact
from fxfuse.facts.sizes import ONE, Dims, kept_axes, order_of, product
from fxfuse.names import is_aten, plain
from fxfuse.ops.call import Call
from fxfuse.ops.movement import RESHAPES, ints_of
from fxfuse.reading.affine import Affine, layout

Axes = dict[int, int]
ROWS = "row-major"
LAYER = "row-major or channels last"  # as convolutions and pools give it
UNKNOWN = ""
Order = str | tuple[int, ...]  # a tuple: row-major in these axes


def read_commuting(node: Node, call: Call | None, dims: Dims, facts: Mapping[Node, Fact]) -> Affine | None:
    """What `node` does to the axes of its input; None where it may treat channels differently.

    In the operator `axes` are pairs (axis of the output, axis of the input) from the end, None where all
    stay; `rearrangement` is how it moves values (the kind, and the shapes or the axes before and after), for another
    to be recognized as undoing it; `how` names what it does to the order in memory, see `order_after`.
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
        other = call.args.get("other")  # the sizes stand for the shape that it gives, or whose shape it is
        gives = dims.of(other) or other.name if isinstance(other, Node) else node.name
        move = ("reshape", dims.of(source) or source.name, after if after and assumes is None else gives)
        axes = {} if shape is None or after is None else kept_axes(shape, after)
        return _affine(node, source, axes, move, "unflatten" if call.op == "unflatten" else "reshape", assumes)
    if shape is None:
        return None
    if call.op in ("permute", "transpose"):
        order = order_of(call, len(shape))
        if order is None:
            return None
        axes = {o - len(order): i - len(order) for o, i in enumerate(order)}
        return _affine(node, source, axes, ("permute", tuple(range(len(order))), order), "permute", assumes)
    averaged = _averaged(call, len(shape))
    return None if averaged is None else _affine(node, source, averaged, None, call.op, assumes)


def _affine(node: Node, source: Any, axes: Axes | None, move: Any, how: str, assumes: int | None = None) -> Affine:
    pairs = None if axes is None else tuple(sorted(axes.items()))
    consts = (("axes", pairs), ("rearrangement", move), ("how", how))
    op = Operator(kind="commuting", law="commuting", path=node.name, consts=consts)
    return Affine("unary", ((source, 1.0),), op, assumes=assumes)


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
        while len(stack) > 1 and (both := _joined(*stack[-2:])) is not None:
            stack[-2:] = [both]
        if stack[-1][1] == stack[-1][2]:
            stack.pop()
    return not stack


def _joined(one: Any, two: Any) -> Any:
    """Two rearrangements of a kind as one."""
    if one[0] != two[0]:
        return None
    if one[0] == "reshape":
        return ("reshape", one[1], two[2])
    return ("permute", one[1], tuple(one[2][i] for i in two[2])) if one[1] == two[1] else None


def order_of_layer(spatial: int | None) -> Order:
    """The order in which a convolution or linear layer gives its output."""
    return UNKNOWN if spatial is None else LAYER if spatial > 1 else ROWS


def order_after(order: Order, op: Operator) -> Order:
    """The order after a step that a factor can pass."""
    how = op.const("how") if op.kind == "commuting" else f"pool {op.spatial}" if op.kind == "pool" else "clone"
    if how in ("contiguous", "clone"):
        return ROWS if how == "contiguous" else order
    if how == "permute":
        return _permuted(order, op.const("rearrangement")[2])
    reshapes = how in ("reshape", "unflatten")
    if order == ROWS or (order == LAYER and reshapes and _one_value(op.const("rearrangement"))):
        return ROWS
    return LAYER if how in ("interpolate", "pool 2", "pool 3") else UNKNOWN


def norm_keeps(order: Order, rank: int) -> bool | None:
    """Whether a batch norm leaves this order as it is, or makes it row-major (False); None where it may do either."""
    if order in (ROWS, LAYER):
        return True
    if rank < 4:
        return False  # which `contiguous()` does too, and at no cost where there is nothing to do
    if isinstance(order, tuple):
        return order == (0, *range(2, rank), 1)
    return None


def _permuted(order: Order, move: tuple[int, ...]) -> Order:
    """The order of a permuted value: `move` tells for each axis where it was."""
    if order == ROWS:
        order = tuple(range(len(move)))
    if not isinstance(order, tuple) or len(order) != len(move):
        return UNKNOWN
    found = tuple(move.index(axis) for axis in order)
    return ROWS if found == tuple(range(len(found))) else found


def _one_value(move: Any) -> bool:
    """Whether a reshape drops nothing but axes of length 1 behind the channels, as after a global pool."""
    _, before, after = move
    shapes = isinstance(before, tuple) and isinstance(after, tuple)
    return shapes and len(after) == 2 and before[:2] == after and product(before[2:]) == ONE
