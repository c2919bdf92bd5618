"""How operations of several tensors relate the ranks and sizes of what they read and give.

Tensors broadcast, are stacked, concatenated or multiplied; what holds for each input the operation accepts is related
both ways, as `ranks` does for operations of one tensor.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from fxfuse.facts.fact import Fact, Facts, fact_of, link, offset, same_rank, same_shape
from fxfuse.ops.call import Call


def _broadcast(call: Call, out: Fact, facts: Facts) -> None:
    sides = [fact_of(call.args.get(n), facts) for n in ("condition", "input", "other")]
    known = [f for f in sides if f is not None and f.high > 0]
    if len(known) == 1:  # the others are numbers
        same_shape(known[0], out)
        return
    if len(known) < 2:
        return
    widest(out, known)
    for axis in {a for f in known for a in f.axes}:
        sizes = [f.axes.get(axis) for f in known]
        wide = [s for s in sizes if s is not None and s != 1]
        if wide:
            out.axes[axis] = wide[0]
        elif all(s == 1 for s in sizes):
            out.axes[axis] = 1


def _cat(call: Call, out: Fact, facts: Facts) -> None:
    tensors = call.args["tensors"]
    if not isinstance(tensors, (tuple, list)):
        return
    parts = [facts[t] for t in tensors if isinstance(t, Node)]
    for part in parts:
        same_rank(part, out)
    for part in parts:
        same_rank(part, out)
    axis = out.likely_axis(call.args["dim"])
    if axis is not None and parts and len(parts) == len(tensors) and all(axis in p.axes for p in parts):
        out.axes[axis] = sum(p.axes[axis] for p in parts)


def _like(call: Call, out: Fact, facts: Facts) -> None:
    other = fact_of(call.args["other"], facts)
    if other is not None:
        same_shape(other, out)


def _product(call: Call, out: Fact, facts: Facts) -> None:
    """Matrices in the last two dims; attention is one too, of the query by the values in the end."""
    names = [n for n in ("input", "key", "value", "other") if n in call.args]
    parts = [f for n in names if (f := fact_of(call.args[n], facts)) is not None]
    for fact in (*parts, out) if call.op == "bmm" else ():
        fact.exactly(3)
    if len(parts) < len(names):
        return
    for fact in parts if call.op == "attention" else ():
        fact.at_least(2)
    if all(f.low >= 2 for f in parts):
        widest(out, parts)
        link(parts[0], out, {-2: -2})
        link(parts[-1], out, {-1: -1})


def widest(out: Fact, parts: list[Fact]) -> None:
    """Parts that broadcast: the result has as many dims as the one that has most."""
    out.at_least(max(f.low for f in parts))
    out.at_most(max(f.high for f in parts))
    for fact in parts:
        fact.at_most(out.high)


def _stack(call: Call, out: Fact, facts: Facts) -> None:
    tensors = call.args["tensors"]
    for tensor in tensors if isinstance(tensors, (tuple, list)) else ():
        if isinstance(tensor, Node):
            offset(facts[tensor], out, 1)


def _embedding(call: Call, out: Fact, facts: Facts) -> None:
    index, weight = call.args["index"], fact_of(call.args.get("weight"), facts)
    if isinstance(index, Node):
        offset(facts[index], out, 1)
    width = call.args.get("width") if weight is None else weight.axes.get(-1)
    if isinstance(width, int):
        out.axes[-1] = width


OF_SEVERAL: dict[str, Callable[[Call, Fact, Facts], None]] = {
    **dict.fromkeys(("add", "sub", "mul", "div", "where"), _broadcast),
    "cat": _cat,
    **dict.fromkeys(("like", "expand_like"), _like),
    **dict.fromkeys(("matmul", "bmm", "attention"), _product),
    "stack": _stack,
    "embedding": _embedding,
}
