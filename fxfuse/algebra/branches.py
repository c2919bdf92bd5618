"""The sum and the concatenation of operators on one tensor: what they have to be exact, and their structure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from fxfuse.algebra import taps
from fxfuse.algebra.combine import Result, densify, made_of, meet
from fxfuse.algebra.operator import Operator
from fxfuse.refusal import Refusal


def add(ops: Sequence[Operator]) -> Result:
    """The sum of operators on one tensor: taps aligned by the input offset they read."""
    ops = _common_layout(ops)
    if refusal := _refuse(ops):
        return refusal
    if len({o.out_channels for o in ops}) > 1:
        return Refusal("the summands have different channel counts and broadcast")
    if len({o.reads for o in ops}) > 1:
        ops = [densify(o, 1, full=True) for o in ops]
    united = _united("sum", ops)
    return united if isinstance(united, Refusal) else replace(united, groups=math.gcd(*(o.groups for o in ops)))


def concat(ops: Sequence[Operator]) -> Result:
    """The operators' outputs one after the other on the channel axis.

    Dense when all read the same channels; one grouped operator when each reads a run of its own.
    """
    ops = _common_layout(ops)
    if refusal := _refuse(ops):
        return refusal
    if any(o.transposed for o in ops):
        return Refusal("transposed convolutions are not concatenated")
    if ops[0].spatial is None:
        return Refusal("nothing that is concatenated has a known number of channels")
    reads = [o.reads if o.reads is not None else tuple(range(o.in_channels)) for o in ops]
    joined = tuple(c for r in reads for c in r)
    alike = len({(o.out_channels // o.groups, o.input_width // o.groups) for o in ops}) == 1
    grouped = alike and joined == tuple(range(joined[0], joined[0] + len(joined)))
    united = _united("concat", ops if grouped else [densify(o, 1, full=len(set(reads)) > 1) for o in ops])
    if isinstance(united, Refusal):
        return united
    if grouped:
        reads_all = None if len(joined) == united.in_channels else joined
        united = replace(united, groups=sum(o.groups for o in ops), reads=reads_all)
    return replace(united, out_channels=sum(o.out_channels for o in ops))


def _common_layout(ops: Sequence[Operator]) -> list[Operator]:
    known = next((o for o in ops if o.spatial is not None), None)
    if known is None:
        return list(ops)
    return [o.at(known.spatial or 0, known.in_channels) for o in ops]


def _refuse(ops: Sequence[Operator]) -> Refusal | None:
    first = ops[0]
    if any(o.kind == "warp" for o in ops):
        return Refusal("a deformable convolution reads between positions, where no other kernel does")
    for other in ops[1:]:
        if refusal := meet(first, other, first.in_channels, other.in_channels):
            return refusal
        if first.transposed != other.transposed:
            return Refusal("a transposed convolution beside an ordinary operator")
        if first.stride != other.stride:
            return Refusal("the branches have different strides", detail=f"{first.stride}, {other.stride}")
    return None


def _united(law: str, ops: Sequence[Operator]) -> Result:
    """The operators on the smallest common grid of taps; groups and channels are the caller's."""
    first = ops[0]
    if first.transposed and len({(o.kernel, o.dilation, o.padding, o.output_padding) for o in ops}) > 1:
        return Refusal("transposed convolutions of different geometry")
    grid = taps.united(ops)
    if isinstance(grid, Refusal):
        return grid
    padders = [o for o in ops if o.pads]
    modes = {(o.padding_mode, o.pad_value) for o in padders}
    if len(modes) > 1:
        return Refusal("the branches pad with different modes or values")
    mode, value = modes.pop() if modes else ("zeros", 0)
    if (mode, value) != ("zeros", 0) and grid["padding"] not in {o.padding for o in padders}:
        return Refusal(f"the union of the branches needs more {mode} padding than each of them")
    return replace(
        first,
        **made_of(law, *ops),
        **grid,
        bias=any(o.bias for o in ops),
        framed=any(o.framed for o in ops),
        padding_mode=mode,
        pad_value=value,
    )
