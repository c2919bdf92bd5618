"""How operations of several tensors relate the ranks and sizes of what they read and give.

Tensors broadcast, are stacked, concatenated or multiplied; what holds for each input the operation accepts is related
both ways, as `ranks` does for operations of one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch.fx import Node

from fxfuse.facts.fact import Fact, fact_of, link, offset, same_rank, same_shape
from fxfuse.ops.call import Call

Facts = Mapping[Node, Fact]


def _broadcast(call: Call, out: Fact, facts: Facts) -> None:
    sides = [fact_of(call.args[n], facts) for n in ("input", "other")]
    known = [f for f in sides if f is not None and f.high > 0]
    if len(known) == 1:  # the other is a number
        same_shape(known[0], out)
        return
    if len(known) < 2:
        return
    out.at_least(max(f.low for f in known))
    out.at_most(max(f.high for f in known))
    for fact in known:
        fact.at_most(out.high)
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
    if axis is not None and parts and len(parts) == len(tensors):
        sizes = [p.axes.get(axis) for p in parts]
        if all(s is not None for s in sizes):
            out.axes[axis] = sum(s for s in sizes if s is not None)


def _like(call: Call, out: Fact, facts: Facts) -> None:
    other = fact_of(call.args["other"], facts)
    if other is not None:
        same_shape(other, out)


def _matmul(call: Call, out: Fact, facts: Facts) -> None:
    a, b = (fact_of(call.args[n], facts) for n in ("input", "other"))
    if a is None or b is None or a.low < 2 or b.low < 2:
        return
    widest(out, [a, b])
    link(a, out, {-2: -2})
    link(b, out, {-1: -1})


def _bmm(call: Call, out: Fact, facts: Facts) -> None:
    for fact in (fact_of(call.args["input"], facts), fact_of(call.args["other"], facts), out):
        if fact is not None:
            fact.exactly(3)
    _matmul(call, out, facts)


def _attention(call: Call, out: Fact, facts: Facts) -> None:
    parts = [fact_of(call.args[n], facts) for n in ("input", "key", "value")]
    known = [f for f in parts if f is not None]
    if len(known) < 3:
        return
    for fact in known:
        fact.at_least(2)
    widest(out, known)
    link(known[0], out, {-2: -2})
    link(known[2], out, {-1: -1})


def _where(call: Call, out: Fact, facts: Facts) -> None:
    known = [f for n in ("condition", "input", "other") if (f := fact_of(call.args[n], facts)) is not None]
    if known:
        widest(out, known)


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
    **dict.fromkeys(("add", "sub", "mul", "div"), _broadcast),
    "cat": _cat,
    "like": _like,
    "expand_like": _like,
    "matmul": _matmul,
    "bmm": _bmm,
    "attention": _attention,
    "where": _where,
    "stack": _stack,
    "embedding": _embedding,
}
