"""In which order a value lies in memory, as far as that is certain: a batch norm changes it, and may not be missed.

Batch norm gives its result in row-major order, or with the channels last where its input has them last, whatever
order it reads. Where it has moved away, somebody who needs that order (a `view`, say) must still find it.
"""

from __future__ import annotations

from typing import Any

from fxfuse.algebra.operator import Operator
from fxfuse.facts.sizes import ONE, product

ROWS = "row-major"
LAYER = "row-major or channels last"  # as convolutions and pools give it
UNKNOWN = ""
Order = str | tuple[int, ...]  # a tuple: row-major in these axes


def order_of_layer(spatial: int | None) -> Order:
    """The order in which a convolution or linear layer gives its output."""
    return UNKNOWN if spatial is None else LAYER if spatial > 1 else ROWS


def order_after(order: Order, op: Operator) -> Order:
    """The order after a step that a factor can pass."""
    if op.kind == "pool":
        return order if order == ROWS else LAYER if (op.spatial or 0) > 1 else UNKNOWN
    if op.kind != "commuting":
        return order
    how, move = op.const("how"), op.const("rearrangement")
    if how == "contiguous":
        return ROWS
    if how == "clone":
        return order
    if how == "permute":
        return _permuted(order, move[1])
    if how in ("reshape", "unflatten"):
        return ROWS if order == ROWS or (order == LAYER and _one_value(move)) else UNKNOWN
    if how == "average":
        return ROWS if order == ROWS else UNKNOWN
    return order if order == ROWS else LAYER if how != "pool 1" else UNKNOWN


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
    before, after = move[1], move[2]
    if not isinstance(before, tuple) or not isinstance(after, tuple):
        return False
    return len(after) == 2 and before[:2] == after and product(before[2:]) == ONE
