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
from fxfuse.facts.fact import Facts
from fxfuse.names import torch_name
from fxfuse.ops.call import PIECES, Call, piece_sizes
from fxfuse.ops.index_lists import fixed, pick
from fxfuse.ops.spellings import read
from fxfuse.reading.affine import (
    PASS_EXAMPLES,
    Affine,
    Unknown,
    axis_layout,
    data,
    ints,
    layout,
    unary,
    wide_axes,
)
from fxfuse.refusal import Refusal

Reads = Callable[[int], Sequence[int] | None]  # which channels are taken of how many
PASS_DTYPE = "pass example_inputs to optimize, they settle the dtype"


def _arithmetic(call: Call, facts: Facts, node: Node) -> Affine | Refusal | None:
    left, right = call.args["input"], call.args.get("other", -1)  # neg has no other
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
        number = (right, 0) if call.op in ("mul", "div", "neg") else (1, right)
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
        return unary(source, replace(IDENTITY, kind="scale", law="scale", path=node.name, **fields))
    if constant.dtype.is_complex or constant.dtype == torch.bool:
        return None
    dims = len(constant.shape)
    path = constant.path if isinstance(constant, Attr) else node.name
    wide = wide_axes(constant)
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
        return unary(source, replace(IDENTITY, kind="scale", law="scale", path=path, dtype=dtype, **fields), assumes)
    if len(wide) > 1:
        return Refusal("a constant that varies along more than the channel axis is no per-channel factor")
    width, met = constant.shape[wide[0]], fact.axes.get(wide[0])
    if met is None and source.op != "placeholder":
        return Refusal("a constant may broadcast the channels of the tensor it meets", remedy=PASS_EXAMPLES)
    if met not in (None, width):
        return Refusal("the channel counts differ and broadcast", detail=f"{met} and {width}")
    certain = fact.channels(-wide[0] - 1) is not None  # else other inputs may have one channel, and become wider
    op = pointwise("scale", "scale", -wide[0] - 1, width, path=path, dtype=dtype, **fields)
    return unary(source, op, assumes, None if certain else width)


def _cat(call: Call, facts: Facts, node: Node) -> Affine:
    tensors = call.args["tensors"]
    if not isinstance(tensors, (tuple, list)) or not all(isinstance(t, Node) for t in tensors):
        raise Unknown
    if len(tensors) == 1:
        return unary(tensors[0], replace(IDENTITY, path=node.name))
    spatial, assumes = axis_layout(facts[node], call.args["dim"])
    return Affine("concat", tuple((t, 1.0) for t in tensors), spatial=spatial, assumes=assumes)


def _selected(source: Node, dim: Any, reads: Reads, facts: Facts, node: Node, channels: int | None = None) -> Affine:
    """The channels of `source`, counted along `dim`, that `reads` tells by their number: a fact, or else `channels`."""
    spatial, assumes = axis_layout(facts[source], dim)
    sure = facts[source].channels(spatial)
    channels = channels if sure is None else sure
    chosen = None if channels is None else reads(channels)
    if channels is None or not chosen or spatial < 0:
        raise Unknown
    op = pointwise("select", "select", spatial, len(chosen), path=node.name)
    return unary(source, replace(op, in_channels=channels, reads=tuple(chosen)), assumes)


def _getitem(call: Call, facts: Facts, node: Node) -> Affine:
    source, index = data(call), call.args["index"]
    if torch_name(source) in PIECES and isinstance(index, int):
        return _piece(source, index, facts, node)
    if (picked := pick(index)) is not None:
        return _selected(source, picked.axis, picked.reads, facts, node)
    if not isinstance(index, tuple) or len(index) < 2 or not all(isinstance(i, slice) for i in index):
        raise Unknown
    cut: slice = index[1]
    if any(i != slice(None) for i in (index[0], *index[2:])) or not fixed(cut):
        raise Unknown
    return _selected(source, 1, lambda channels: range(channels)[cut], facts, node)


def _piece(chunks: Node, index: int, facts: Facts, node: Node) -> Affine:
    """One output of chunk or split along the channels."""
    call = read(chunks, {}, None)
    if call is None or call.op not in ("chunk", "split"):
        raise Unknown
    source, dim = data(call), call.args["dim"]
    given: Any = call.args["chunks" if call.op == "chunk" else "split_size"]
    if isinstance(given, int):  # what the pieces are fed to may tell their sizes
        spatial, _ = axis_layout(facts[source], dim)
        users = [u for u in chunks.users if u.target is operator.getitem and call.op == "chunk" and given > 0]
        found = {u.args[1] % given: facts[u].channels(spatial) for u in users if isinstance(u.args[1], int)}
        given = list(found.values()) if len(found) == given else None
    known = isinstance(given, (list, tuple)) and all(isinstance(n, int) for n in given)

    def reads(channels: int) -> range | None:
        sizes = piece_sizes(call, channels) or ()
        whole = all(isinstance(s, int) for s in sizes) and sum(sizes) == channels
        start = sum(sizes[: index % len(sizes)]) if whole and -len(sizes) <= index < len(sizes) else None
        return None if start is None else range(start, start + sizes[index])

    return _selected(source, dim, reads, facts, node, sum(given) if known else None)


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
    **dict.fromkeys(("add", "sub", "mul", "div", "neg"), _arithmetic),
    "cat": _cat,
    "getitem": _getitem,
    "narrow": _narrow,
    "flip": _flip,
    "channel_shuffle": _channel_shuffle,
}
