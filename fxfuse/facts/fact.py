"""A fact: what is certain about the shape and dtype of one value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from fxfuse.algebra.constants import Apply, Attr
from fxfuse.capture.captured import KNOWN


@dataclass(slots=True)
class Fact:
    """Bounds on the rank, and the size of axes counted from the end where it is known.

    `sure` are the bounds and axes that hold for every input; `low`, `high` and `axes` may come from examples.
    """

    low: int = 0
    high: int = 99
    axes: dict[int, int] = field(default_factory=dict)
    sure: Fact | None = None
    dtype: torch.dtype | None = None

    @property
    def rank(self) -> int | None:
        return self.low if self.low == self.high else None

    @property
    def likely(self) -> int | None:
        """The rank, or the one with a batch dim where that alone is open: whoever relies on it is guarded."""
        return self.high if self.low == self.high or (self.high == self.low + 1 and self.high >= 4) else None

    @property
    def taken(self) -> int | None:
        """The rank where examples alone settle it, which other inputs need not have."""
        return self.rank if self.sure is not None and self.sure.rank is None else None

    @property
    def sure_low(self) -> int:
        return self.low if self.sure is None else self.sure.low

    def channels(self, spatial: int) -> int | None:
        """Size of the channel axis before `spatial` dims, where every input has the same."""
        return (self.sure or self).axes.get(-spatial - 1)

    def at_least(self, low: int) -> None:
        self.low = max(self.low, low)

    def at_most(self, high: int) -> None:
        self.high = min(self.high, high)

    def exactly(self, rank: int) -> None:
        self.at_least(rank)
        self.at_most(rank)

    def axis(self, dim: Any) -> int | None:
        """`dim` counted from the end, or None where the rank does not say."""
        if not isinstance(dim, int):
            return None
        if dim < 0:
            return dim
        return dim - self.rank if self.rank is not None else None

    def likely_axis(self, dim: Any) -> int | None:
        """`dim` counted from the end, where the rank is at least likely."""
        return dim - self.likely if isinstance(dim, int) and dim >= 0 and self.likely is not None else self.axis(dim)


Facts = Mapping[Node, Fact]


def known(node: Node) -> Fact:
    """What the capture itself is certain of; nothing unless it says so."""
    return of_shape(node.meta[KNOWN][0]) if KNOWN in node.meta else Fact()


def known_dtype(node: Node) -> torch.dtype | None:
    dtype: torch.dtype | None = node.meta.get(KNOWN, (None, None))[1]
    return dtype


def same_rank(a: Fact, b: Fact) -> None:
    offset(a, b, 0)


def same_shape(a: Fact, b: Fact) -> None:
    same_rank(a, b)
    if a.axes != b.axes:
        a.axes.update(b.axes)
        b.axes.update(a.axes)


def offset(x: Fact, out: Fact, more: int) -> None:
    """`out` has `more` dims than `x`."""
    out.at_least(x.low + more)
    out.at_most(x.high + more)
    x.at_least(out.low - more)
    x.at_most(out.high - more)


def known_axes(x: Fact, out: Fact) -> range:
    """Axes from the end, as many as anything is known of."""
    return range(min([*x.axes, *out.axes, 0]), 0)


def link(x: Fact, out: Fact, axes: Mapping[int, int]) -> None:
    """Axis o of `out` has the size of axis i of `x`, for each o: i."""
    for o, i in axes.items():
        size = x.axes.get(i, out.axes.get(o))
        if size is not None:
            x.axes[i] = out.axes[o] = size


def of_shape(shape: Sequence[int | None]) -> Fact:
    return Fact(len(shape), len(shape), {i - len(shape): int(n) for i, n in enumerate(shape) if n is not None})


def fact_of(value: Any, facts: Facts) -> Fact | None:
    """The fact of an argument: a node's, a constant's; None for a number."""
    if isinstance(value, Node):
        return facts[value]
    return of_shape(value.shape) if isinstance(value, (Attr, Apply)) else None
