"""The border-fill idiom: zero padding whose border is then overwritten with a constant.

Diverse Branch Block pads the output of a batch norm with the value it gives to zeros, by `F.pad`
and one slice assignment a side. Together they are one padding with a per-channel value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fxfuse.algebra.constants import Apply, Attr
from fxfuse.facts.fact import Facts
from fxfuse.ops.aten import views
from fxfuse.ops.call import Calls, pad_pairs
from fxfuse.reading.affine import wide_axes


@dataclass(frozen=True, slots=True)
class Fill:
    """What a padding is filled with, and the slice assignments that do it with the slices they write to."""

    value: Any
    writes: tuple[Node, ...]
    slices: tuple[Node, ...] = ()


def border_fills(calls: Calls, facts: Facts, position: Mapping[Node, int]) -> dict[Node, Fill]:
    """Zero paddings by node whose whole border is assigned one value before anybody reads them."""
    written: dict[Node, list[Node]] = {}
    for node, call in calls.items():
        if call.op == "setitem" and isinstance(call.args["input"], Node):
            written.setdefault(call.args["input"], []).append(node)
    fills = {pad: _filled(pad, writes, calls, facts, position) for pad, writes in written.items()}
    return {pad: fill for pad, fill in fills.items() if fill is not None}


def _filled(pad: Node, writes: list[Node], calls: Calls, facts: Facts, position: Mapping[Node, int]) -> Fill | None:
    call = calls.get(pad)
    if call is None or call.op != "pad" or call.args["mode"] != "constant":
        return None
    pairs = pad_pairs(call.args["pad"])
    if pairs is None or facts[pad].rank != len(pairs) + 2:
        return None
    values = [calls[w].args["value"] for w in writes]
    if not all(isinstance(v, (Attr, Apply, int, float)) for v in values) or len(set(values)) != 1:
        return None
    sides = {_side(calls[w].args["index"], pairs) for w in writes}
    wanted = {(d, end) for d, pair in enumerate(pairs) for end in (0, 1) if pair[end]}
    if sides != wanted or len(writes) != len(wanted) or not _per_channel(values[0], len(pairs)):
        return None
    slices = dict.fromkeys(v for w in writes for v in views(w.args[0]))
    own, last = {*writes, *slices}, max(position[w] for w in writes)
    if any(u not in own for s in slices for u in s.users) or any(position[u] < last for u in {*pad.users} - own):
        return None
    return Fill(values[0], tuple(writes), tuple(slices))


def _side(index: Any, pairs: list[tuple[int, int]]) -> tuple[int, int] | None:
    """(spatial dim, 0 low or 1 high) of a slice that covers exactly one side of the border."""
    cut = [(d, i) for d, i in enumerate(index) if i != slice(None)] if isinstance(index, tuple) else []
    if len(cut) != 1 or not 2 <= cut[0][0] < len(index) <= len(pairs) + 2 or not isinstance(cut[0][1], slice):
        return None
    dim, where = cut[0][0] - 2, cut[0][1]
    low, high = pairs[dim]
    if where.step not in (None, 1):
        return None
    if low and where.start in (None, 0) and where.stop == low:
        return dim, 0
    if high and where.start == -high and where.stop is None:
        return dim, 1
    return None


def _per_channel(value: Any, spatial: int) -> bool:
    """A number, or a tensor that varies along the channel axis of the padded tensor alone."""
    if not isinstance(value, (Attr, Apply)):
        return True
    return len(value.shape) <= spatial + 2 and wide_axes(value) in ([], [-spatial - 1])
