"""How operations of one tensor relate the ranks and sizes of what they read and give.

Every relation holds for each input that the operation accepts, and works both ways: `x.mean((2, 3))` has two
dims fewer than x, and x two more than it. What would depend on a size or a rank that is not known says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.fx import Node

from fxfuse.facts.broadcasting import OF_SEVERAL
from fxfuse.facts.fact import Fact, Facts, known_axes, link, offset, same_rank, same_shape
from fxfuse.ops.call import Call
from fxfuse.ops.movement import ints_of


def relate(call: Call, out: Fact, facts: Facts) -> None:
    """Let the facts of the inputs and of the output of a call learn from each other."""
    if call.op in OF_SEVERAL:
        OF_SEVERAL[call.op](call, out, facts)
    elif call.op in ("reshape", "expand", "repeat"):
        _counted(call, out, facts)
    elif call.op in _OF_ONE and isinstance(source := call.args["input"], Node):
        _OF_ONE[call.op](call, facts[source], out)


def relate_index(index: Any, x: Fact, out: Fact) -> None:
    """`x[2]`, `x[:, None]`, `x[..., 0]`: each number takes a dim, each None gives one."""
    items = index if isinstance(index, tuple) else (index,)
    numbers = sum(isinstance(i, int) and not isinstance(i, bool) for i in items)
    taken = numbers + sum(isinstance(i, slice) for i in items)
    if x.low < 1 or len(items) != taken + sum(i is None or i is Ellipsis for i in items):
        return  # perhaps no tensor at all, or indexed by one
    x.at_least(taken)
    offset(x, out, sum(i is None for i in items) - numbers)


def part(dim: Any, size: Any, x: Fact, out: Fact) -> None:
    """A part of x, of `size` along `dim` and whole along the others."""
    axis = x.likely_axis(dim)
    if axis is None:
        return
    for other, n in x.axes.items():
        if other != axis:
            out.axes.setdefault(other, n)
    if isinstance(size, int):
        out.axes.setdefault(axis, size)


def windows(x: Fact, out: Fact, spatial: int) -> None:
    """The last `spatial` dims are read by windows, with channels before them and perhaps a batch."""
    x.at_least(spatial + 1)
    x.at_most(spatial + 2)
    same_rank(x, out)


def _without(x: Fact, out: Fact, gone: set[int]) -> None:
    """`out` has the axes of x, counted from the end, but those that are gone."""
    link(x, out, {a + sum(g > a for g in gone): a for a in known_axes(x, out) if a not in gone})


def _pool(call: Call, x: Fact, out: Fact) -> None:
    spatial = call.spatial or 0
    windows(x, out, spatial)
    link(x, out, {-spatial - 1: -spatial - 1})


def _pad(call: Call, x: Fact, out: Fact) -> None:
    same_rank(x, out)
    pad = call.args["pad"]
    if isinstance(pad, (tuple, list)):
        link(x, out, {a: a for a in known_axes(x, out) if a < -len(pad) // 2})


def _part(call: Call, x: Fact, out: Fact) -> None:
    same_rank(x, out)
    part(call.args["dim"], call.args.get("length"), x, out)


def _layer_norm(call: Call, x: Fact, out: Fact) -> None:
    same_shape(x, out)
    sizes = ints_of(call.args["normalized_shape"])
    if sizes is not None:
        for fact in (x, out):
            fact.at_least(len(sizes))
            fact.axes.update({i - len(sizes): n for i, n in enumerate(sizes)})


def _flatten(call: Call, x: Fact, out: Fact) -> None:
    start, end = call.args["start_dim"], call.args["end_dim"]
    if not isinstance(start, int) or not isinstance(end, int):
        return
    if start >= 0 > end:  # whatever the rank
        rank = start - end
        out.exactly(rank)
        x.at_least(rank if (start, end) != (0, -1) else 0)
    elif (start < 0) == (end < 0):
        x.at_least(max(start, end) + 1 if start >= 0 else -start)
        if start == end:
            same_shape(x, out)
            return
        offset(x, out, start - end)
    first, last = x.axis(start), x.axis(end)
    if last is not None:
        link(x, out, {a: a for a in range(last + 1, 0)})
    if first is None or last is None:
        return
    axes = range(first, last + 1)
    if all(a in x.axes for a in axes):
        out.axes[last] = math.prod(x.axes[a] for a in axes)
    if x.rank is not None:
        link(x, out, {a + last - first: a for a in range(-x.rank, first)})


def _unflatten(call: Call, x: Fact, out: Fact) -> None:
    dim, sizes = call.args["dim"], call.args["sizes"]
    if not isinstance(dim, int) or not isinstance(sizes, (tuple, list)):
        return
    x.at_least(1)
    offset(x, out, len(sizes) - 1)
    axis = x.axis(dim)
    if axis is not None:
        link(x, out, {a: a for a in range(axis + 1, 0)})
        known = {axis + 1 - len(sizes) + i: n for i, n in enumerate(sizes) if isinstance(n, int) and n >= 0}
        out.axes.update(known)


def _permute(call: Call, x: Fact, out: Fact) -> None:
    order = call.args["sizes"]
    if not isinstance(order, (tuple, list)):
        return
    for fact in (x, out):
        fact.exactly(len(order))
    if (dims := ints_of(order)) is not None:
        link(x, out, {o - len(dims): i if i < 0 else i - len(dims) for o, i in enumerate(dims)})


def _transpose(call: Call, x: Fact, out: Fact) -> None:
    dims = ints_of([call.args[n] for n in ("dim0", "dim1")])
    if dims is not None and set(dims) - {0, -1}:  # a number may be transposed along those
        x.at_least(_needed(dims))
    same_rank(x, out)
    pair = tuple(x.axis(call.args[n]) for n in ("dim0", "dim1"))
    if None not in pair:
        swapped = dict(zip(pair, pair[::-1], strict=True))
        link(x, out, {a: swapped.get(a, a) or a for a in {*known_axes(x, out), *(p for p in pair if p)}})


def _reduce(call: Call, x: Fact, out: Fact) -> None:
    dim, keep = call.args["dim"], call.args["keepdim"]
    dims = ints_of(dim)
    if not isinstance(keep, bool) or (dim is not None and not dims):
        return
    if dims is not None:
        x.at_least(_needed(dims) if len(dims) > 1 or dims[0] not in (0, -1) else 0)
    if keep:
        same_rank(x, out)
    elif dims is None:
        out.at_most(0)
    elif x.low or out.low:  # a number may be reduced along dim 0 and stays a number
        offset(x, out, -len(dims))
    if dims is None or not (keep or x.low or out.low):
        return
    reduced = {a for d in dims if (a := x.axis(d)) is not None}
    if len(reduced) < len(dims):
        return
    if keep:
        link(x, out, {a: a for a in known_axes(x, out) if a not in reduced})
        out.axes.update(dict.fromkeys(reduced, 1))
    else:
        _without(x, out, reduced)


def _needed(dims: tuple[int, ...]) -> int:
    """How many dims a tensor has at least that has these different ones."""
    return max(len(dims), *(d + 1 if d >= 0 else -d for d in dims))


def _unsqueeze(call: Call, x: Fact, out: Fact) -> None:
    offset(x, out, 1)
    axis = out.axis(call.args["dim"])
    if axis is not None:
        link(x, out, {a if a > axis else a - 1: a for a in known_axes(x, out) if a - 1 != axis or a > axis})
        out.axes[axis] = 1


def _squeeze(call: Call, x: Fact, out: Fact) -> None:
    dims = ints_of(call.args["dim"])
    out.at_most(x.high)
    x.at_least(out.low)
    if dims is None:
        return
    out.at_least(x.low - len(dims))
    axes = [x.axis(d) for d in dims]
    if not all(a in x.axes for a in axes):
        return
    gone = {a for a in axes if a is not None and x.axes[a] == 1}
    x.at_least(-min(gone, default=0))
    offset(x, out, -len(gone))
    _without(x, out, gone)


def _adaptive(call: Call, x: Fact, out: Fact) -> None:
    spatial, size = call.spatial or 0, call.args["output_size"]
    sizes = (size,) * spatial if isinstance(size, int) else size
    mean = spatial > 1 and sizes in ((1,) * spatial, [1] * spatial)  # then PyTorch takes any rank
    x.at_least(spatial + 1 - mean)
    x.at_most(99 if mean or not isinstance(sizes, (tuple, list)) else spatial + 2)
    same_rank(x, out)
    link(x, out, {-spatial - 1: -spatial - 1})
    if isinstance(sizes, (tuple, list)) and len(sizes) == spatial:
        out.axes.update({i - spatial: n for i, n in enumerate(sizes) if isinstance(n, int)})


def _interpolate(call: Call, x: Fact, out: Fact) -> None:
    x.at_least(3)
    x.at_most(5)
    same_rank(x, out)
    if x.rank is not None:
        link(x, out, {a: a for a in (-x.rank, 1 - x.rank)})


_UNCHANGED = "same cast dropout identity neg channel_shuffle flip".split()
_OF_ONE: dict[str, Callable[[Call, Fact, Fact], None]] = {
    **dict.fromkeys(
        "same cast dropout identity neg channel_shuffle flip".split(), lambda call, x, out: same_shape(x, out)
    ),
    "avg_pool": _pool,
    "pad": _pad,
    **dict.fromkeys(("narrow", "index_select"), _part),
    "layer_norm": _layer_norm,
    "flatten": _flatten,
    "unflatten": _unflatten,
    "permute": _permute,
    "transpose": _transpose,
    **dict.fromkeys(("average", "reduce"), _reduce),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "adaptive_avg_pool": _adaptive,
    "interpolate": _interpolate,
    "select": lambda call, x, out: offset(x, out, -1),
}


def _counted(call: Call, out: Fact, facts: Facts) -> None:
    """`x.view(b, -1, 8)` has as many dims as it is given sizes, and those sizes."""
    source, sizes = call.args["input"], call.args["sizes"]
    if call.op != "reshape" and isinstance(source, Node):
        facts[source].at_most(out.high)
    if isinstance(sizes, Node):
        tensor = _shape_of(sizes)
        if tensor is not None and call.op == "reshape":
            same_shape(facts[tensor], out)
        return
    if not isinstance(sizes, (tuple, list)) or not all(isinstance(s, (int, Node)) for s in sizes):
        return
    if len(sizes) == 1 and isinstance(sizes[0], Node):  # one size, or a whole shape
        return
    out.exactly(len(sizes))
    if call.op != "repeat":
        out.axes.update({i - len(sizes): n for i, n in enumerate(sizes) if isinstance(n, int) and n >= 0})


def _shape_of(node: Node) -> Node | None:
    """The tensor whose whole shape `node` is."""
    asks = node.op == "call_function" and node.target is getattr and node.args[1] == "shape"
    asks |= node.op == "call_method" and node.target == "size" and len(node.args) == 1 and not node.kwargs
    tensor = node.args[0] if asks else None
    return tensor if isinstance(tensor, Node) else None
