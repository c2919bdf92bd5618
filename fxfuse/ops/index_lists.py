"""`x[:, [2, 0, 1]]`: indexing by a list of whole numbers, which takes entries of one axis in any order.

Only a list of plain integers is read: bools are a mask, and a list beside another one broadcasts with it. As in
PyTorch a negative number counts from the end, and one out of range is an error, which is left to PyTorch.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Pick(NamedTuple):
    """The axis, from the end if negative, and the entries taken of it, which may be negative too."""

    axis: int
    entries: tuple[int, ...]

    def reads(self, size: int) -> tuple[int, ...] | None:
        """The entries counted from the front of an axis of `size`; None where one is out of range."""
        inside = all(-size <= e < size for e in self.entries)
        return tuple(e % size for e in self.entries) if inside else None


def pick(index: Any) -> Pick | None:
    """What an index takes of one axis, all others whole; None for any other index."""
    items = list(index) if isinstance(index, tuple) else [index]
    if items and items[-1] is Ellipsis:
        items.pop()
    lists = [i for i, item in enumerate(items) if isinstance(item, (list, tuple))]
    if len(lists) != 1:
        return None
    (at,) = lists
    before, entries, after = items[:at], tuple(items[at]), items[at + 1 :]
    axis = at
    if before and before[0] is Ellipsis:
        before, axis = before[1:], -1 - len(after)
    whole = all(isinstance(i, slice) and i == slice(None) for i in (*before, *after))
    plain = bool(entries) and all(type(e) is int for e in entries)
    return Pick(axis, entries) if whole and plain else None


def index_of(axis: int, entries: tuple[int, ...]) -> Any:
    """The index that takes these entries of an axis, which is counted from the end if negative."""
    if axis >= 0:
        return (*[slice(None)] * axis, list(entries))
    return (Ellipsis, list(entries), *[slice(None)] * (-1 - axis))


def fixed(cut: slice) -> bool:
    """Whether the bounds of a slice are known before the model runs."""
    return all(bound is None or isinstance(bound, int) for bound in (cut.start, cut.stop, cut.step))
