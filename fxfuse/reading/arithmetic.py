"""Tensor arithmetic read into operator records: constants, sums, concatenation, channel selection."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from fxfuse.algebra.constants import Apply, Attr
from fxfuse.algebra.operator import IDENTITY, pointwise, shuffled
from fxfuse.names import torch_name
from fxfuse.ops.call import PIECES, Call
from fxfuse.ops.index_lists import pick
from fxfuse.ops.spellings import read
from fxfuse.reading.affine import PASS_EXAMPLES, Affine, Facts, Unknown, axis_layout, data, ints, layout
from fxfuse.refusal import Refusal

PASS_DTYPE = "pass example_inputs to optimize, they settle the dtype"


def _arithmetic(call: Call, facts: Facts, node: Node) -> Affine | Refusal | None:
    left, right = call.args["input"], call.args["other"]
    alpha = call.args.get("alpha", 1)
    if not isinstance(alpha, (int, float)) or call.args.get("rounding_mode") is not None:
        return None
    sign = -alpha if call.op == "sub" else alpha
    if isinstance(left, Node) and isinstance(right, Node):
        if call.op not in ("add", "sub"):
            if not (facts[left].low and facts[right].low):  # sizes are multiplied too
                return None
            return Refusal(f"a {'product' if call.op == 'mul' else 'quotient'} of two computed tensors is not linear")
        return Affine("sum", ((left, 1.0), (right, float(sign))))
    if isinstance(left, Node):
        number = {"mul": (right, 0), "div": (right, 0)}.get(call.op, (1, right))
        return _scaled(left, number, sign, call.op == "div", facts, node)
    if isinstance(right, Node) and call.op in ("add", "sub", "mul"):
        number = (left, 0) if call.op == "mul" else (sign, left)
        return _scaled(right, number, 1, False, facts, node)
    return None


def _scaled(
    source: Node, numbers: tuple[Any, Any], alpha: float, inverse: bool, facts: Facts, node: Node
) -> Affine | Refusal | None:
    """x * factor + alpha * shift, one of the two a number and the other a number or a tensor."""
    factor, shift = numbers
    constant = factor if isinstance(factor, (Attr, Apply)) else shift
    consts: tuple[tuple[str, Any], ...] = (("factor", factor), ("inverse", inverse), ("shift", shift), ("alpha", alpha))
    fact = facts[source]
    if fact.dtype is None and isinstance(constant, (Attr, Apply)) and any(n > 1 for n in constant.shape):
        return Refusal("a constant meets a tensor of unknown dtype, which it may promote", remedy=PASS_DTYPE)
    if fact.dtype is None or not (fact.dtype.is_floating_point or fact.dtype.is_complex):
        raise Unknown  # an integer would be promoted
    fields: dict[str, Any] = {"consts": consts, "bias": not (isinstance(shift, (int, float)) and shift == 0)}
    if not isinstance(constant, (Attr, Apply)):
        if not all(isinstance(n, (int, float)) for n in numbers):
            return None
        return Affine("unary", ((source, 1.0),), replace(IDENTITY, kind="scale", law="scale", path=node.name, **fields))
    if constant.dtype.is_complex or constant.dtype == torch.bool:
        return None
    dims = len(constant.shape)
    path = constant.path if isinstance(constant, Attr) else node.name
    wide = [i - dims for i, n in enumerate(constant.shape) if n != 1]
    assumes = None
    if dims > fact.sure_low:
        _, assumes = layout(fact)
        if assumes is None or dims > assumes:
            return Refusal("a constant may have more dims than the tensor it meets", remedy=PASS_EXAMPLES)
    dtype = fact.dtype
    if dims and torch.promote_types(constant.dtype, dtype) != dtype:
        return Refusal(
            "a constant of a wider dtype promotes the tensor it meets",
            detail=f"{constant.dtype} and {dtype}",
            remedy="convert the model to one dtype with model.to(dtype)",
        )
    if not wide:
        op = replace(IDENTITY, kind="scale", law="scale", path=path, dtype=dtype, **fields)
        return Affine("unary", ((source, 1.0),), op, assumes=assumes)
    if len(wide) > 1:
        return Refusal("a constant that varies along more than the channel axis is no per-channel factor")
    width, met = constant.shape[wide[0]], fact.axes.get(wide[0])
    if met is None and source.op != "placeholder":
        return Refusal("a constant may broadcast the channels of the tensor it meets", remedy=PASS_EXAMPLES)
    if met not in (None, width):
        return Refusal("the channel counts differ and broadcast", detail=f"{met} and {width}")
    certain = fact.channels(-wide[0] - 1) is not None  # else other inputs may have one channel, and become wider
    op = pointwise("scale", "scale", -wide[0] - 1, width, path=path, dtype=dtype, **fields)
    return Affine("unary", ((source, 1.0),), op, assumes=assumes, width=None if certain else width)


def _neg(call: Call, facts: Facts, node: Node) -> Affine | Refusal | None:
    return _scaled(data(call), (-1, 0), 1, False, facts, node)


def _cat(call: Call, facts: Facts, node: Node) -> Affine:
    tensors = call.args["tensors"]
    if not isinstance(tensors, (tuple, list)) or not all(isinstance(t, Node) for t in tensors):
        raise Unknown
    if len(tensors) == 1:
        return Affine("unary", ((tensors[0], 1.0),), replace(IDENTITY, path=node.name))
    spatial, assumes = axis_layout(facts[node], call.args["dim"])
    return Affine("concat", tuple((t, 1.0) for t in tensors), spatial=spatial, assumes=assumes)


def _selected(source: Node, dim: Any, reads: Callable[[int], Sequence[int] | None], facts: Facts, node: Node) -> Affine:
    """The channels of `source`, counted along `dim`, that `reads` tells where their number is known."""
    spatial, assumes = axis_layout(facts[source], dim)
    channels = facts[source].channels(spatial)
    chosen = None if channels is None else reads(channels)
    if channels is None or chosen is None:
        raise Unknown
    return _selection(source, chosen, channels, spatial, node, assumes)


def _selection(
    source: Node, reads: Sequence[int], channels: int, spatial: int, node: Node, assumes: int | None
) -> Affine:
    if spatial < 0 or not reads:
        raise Unknown
    op = pointwise("select", "select", spatial, len(reads), path=node.name)
    return Affine("unary", ((source, 1.0),), replace(op, in_channels=channels, reads=tuple(reads)), assumes=assumes)


def _getitem(call: Call, facts: Facts, node: Node) -> Affine:
    source, index = data(call), call.args["index"]
    if torch_name(source) in PIECES and isinstance(index, int):
        return _piece(source, index, facts, node)
    if (picked := pick(index)) is not None:
        return _selected(source, picked.axis, picked.reads, facts, node)
    if not isinstance(index, tuple) or len(index) < 2 or not all(isinstance(i, slice) for i in index):
        raise Unknown
    cut: slice = index[1]
    if any(i != slice(None) for i in (index[0], *index[2:])):
        raise Unknown
    if not all(b is None or isinstance(b, int) for b in (cut.start, cut.stop, cut.step)):
        raise Unknown
    return _selected(source, 1, lambda channels: range(channels)[cut], facts, node)


def _piece(chunks: Node, index: int, facts: Facts, node: Node) -> Affine:
    """One output of chunk or split along the channels."""
    call = read(chunks, {}, None)
    if call is None or call.op not in ("chunk", "split"):
        raise Unknown
    source, chunk = data(call), call.op == "chunk"
    sizes = call.args["chunks" if chunk else "split_size"]
    spatial, assumes = axis_layout(facts[source], call.args["dim"])
    channels = facts[source].channels(spatial)
    if channels is None and chunk and isinstance(sizes, int):
        channels = _whole(chunks, sizes, -spatial - 1, facts)
    elif channels is None and isinstance(sizes, (list, tuple)) and all(isinstance(s, int) for s in sizes):
        channels = sum(sizes)
    if channels is None:
        raise Unknown
    if isinstance(sizes, int):
        size = -(-channels // sizes) if chunk else sizes
        sizes = [min(size, channels - i) for i in range(0, channels, size)]
    if not isinstance(sizes, (list, tuple)) or not all(isinstance(s, int) for s in sizes) or sum(sizes) != channels:
        raise Unknown
    if not -len(sizes) <= index < len(sizes):
        raise Unknown
    start = sum(sizes[: index % len(sizes)])
    return _selection(source, range(start, start + sizes[index]), channels, spatial, node, assumes)


def _whole(chunks: Node, count: int, axis: int, facts: Facts) -> int | None:
    """Channels of a chunked tensor, from what its pieces are fed to, where all are known."""
    pieces = [u for u in chunks.users if u.target is operator.getitem]
    sizes = {u.args[1]: facts[u].channels(-axis - 1) for u in pieces}
    known = [s for i, s in sizes.items() if isinstance(i, int) and s is not None]
    return sum(known) if len(known) == count == len(sizes) else None


def _narrow(call: Call, facts: Facts, node: Node) -> Affine:
    start, length = call.args["start"], call.args["length"]
    if not isinstance(start, int) or not isinstance(length, int) or start < 0:
        raise Unknown
    part = range(start, start + length)
    return _selected(data(call), call.args["dim"], lambda n: part if part.stop <= n else None, facts, node)


def _flip(call: Call, facts: Facts, node: Node) -> Affine:
    (dim,) = ints(call.args["dims"], 1)
    return _selected(data(call), dim, lambda channels: range(channels)[::-1], facts, node)


def _channel_shuffle(call: Call, facts: Facts, node: Node) -> Affine:
    groups = call.args["groups"]
    if not isinstance(groups, int):
        raise Unknown
    return _selected(data(call), 1, lambda channels: shuffled(channels, groups), facts, node)


ARITHMETIC = {
    "add": _arithmetic,
    "sub": _arithmetic,
    "mul": _arithmetic,
    "div": _arithmetic,
    "neg": _neg,
    "cat": _cat,
    "getitem": _getitem,
    "narrow": _narrow,
    "flip": _flip,
    "channel_shuffle": _channel_shuffle,
}
