"""A size as a product of unknowns, and the axes that a reshape keeps because such products are equal."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple


class Size(NamedTuple):
    """`factor` times the product of `unknowns` (sorted, repeats allowed)."""

    factor: int
    unknowns: tuple[str, ...] = ()

    def __mul__(self, other: Any) -> Size:
        return Size(self.factor * other.factor, tuple(sorted((*self.unknowns, *other.unknowns))))

    def over(self, other: Size) -> Size | None:
        """The quotient where it is a product too. Nobody divides by a size that is 0."""
        left = list(self.unknowns)
        for name in other.unknowns:
            if name not in left:
                return None
            left.remove(name)
        whole = other.factor and self.factor % other.factor == 0
        return Size(self.factor // other.factor, tuple(left)) if whole else None


Shape = tuple[Size, ...]
ONE = Size(1)


def product(sizes: Sequence[Size]) -> Size:
    return reduce(operator.mul, sizes, ONE)


def kept_axes(before: Shape, after: Shape) -> dict[int, int]:
    """Axes of `after` that are axes of `before`, counted from the end: a reshape leaves each as it is.

    An element's index along an axis is (place // product of the sizes behind) % size, and its place in row-major
    order stays; equal products in front are as good, for the products of all sizes are equal.
    """
    olds, news = _places(before), _places(after)
    kept = {}
    for o, (size, front, back) in enumerate(news):
        for i, (old, before_it, behind_it) in enumerate(olds):
            if old == size and (before_it == front or behind_it == back):
                kept[o - len(after)] = i - len(before)
                break
    return kept


def _places(shape: Shape) -> list[tuple[Size, Size, Size]]:
    """Each size with the products of those in front of it and behind it."""
    return [(s, product(shape[:i]), product(shape[i + 1 :])) for i, s in enumerate(shape)]
