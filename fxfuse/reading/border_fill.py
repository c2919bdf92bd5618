"""The border-fill idiom: zero padding whose border is then overwritten with a constant.

Diverse Branch Block pads the output of a batch norm with the value it gives to zeros, by `F.pad`
and one slice assignment a side. Together they are one padding with a per-channel value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fxfuse.algebra.constants import Apply, Attr
from fxfuse.facts.fact import Fact
from fxfuse.ops.aten import views
from fxfuse.ops.call import Call
from fxfuse.reading.affine import pad_pairs, wide_axes


@dataclass(frozen=True, slots=True)
class Fill:
    """What a padding is filled with, and the slice assignments that do it with the slices they write to."""

    value: Any
    writes: tuple[Node, ...]
    slices: tuple[Node, ...] = ()


def border_fills(
    calls: Mapping[Node, Call], facts: Mapping[Node, Fact], position: Mapping[Node, int]
) -> dict[Node, Fill]:
    """Zero paddings by node whose whole border is assigned one value before anybody reads them."""
    written: dict[Node, list[Node]] = {}
    for node, call in calls.items():
        if call.op == "setitem" and isinstance(call.args["input"], Node):
            written.setdefault(call.args["input"], []).append(node)
    fills = {}
    for pad, writes in written.items():
        padding = calls.get(pad)
        if padding is not None and padding.op == "pad":
            slices = dict.fromkeys(v for w in writes for v in views(w.args[0]))
            value = _filled(pad, padding, facts[pad], {w: calls[w] for w in writes}, slices, position)
            if value is not None:
                fills[pad] = Fill(value, tuple(writes), tuple(slices))
    return fills


def _filled(
    pad: Node,
    call: Call,
    fact: Fact,
    writes: Mapping[Node, Call],
    slices: Collection[Node],
    position: Mapping[Node, int],
) -> Any:
    pairs = pad_pairs(call.args["pad"])
    if call.args["mode"] != "constant" or pairs is None or fact.rank != len(pairs) + 2:
        return None
    values = [w.args["value"] for w in writes.values()]
    if not all(isinstance(v, (Attr, Apply, int, float)) for v in values) or len(set(values)) != 1:
        return None
    value = values[0]
    sides = {s for w in writes.values() if (s := _side(w.args["index"], pairs)) is not None}
    wanted = {(d, end) for d, pair in enumerate(pairs) for end in (0, 1) if pair[end]}
    if sides != wanted or len(writes) != len(wanted) or not _per_channel(value, len(pairs)):
        return None
    own = {*writes, *slices}
    if any(u not in own for s in slices for u in s.users):
        return None
    readers = [position[u] for u in pad.users if u not in own]
    if readers and min(readers) < max(position[w] for w in writes):
        return None
    return value


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
