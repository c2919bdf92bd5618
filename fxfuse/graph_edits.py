"""Changes of a graph: found on one view of it, then carried out where none disturbs another.

What changes a graph must not go on reading a view of what the graph was: its nodes may be gone. So a pass finds all
its edits first, and of those that share a node only the first is made. The others are found anew, in a new view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch.fx import Node


class Edit(NamedTuple):
    """One change: every node that it reads, changes or removes, what makes it, and what the report is told of it."""

    nodes: frozenset[Node]
    make: Callable[[], object]
    told: Any = None


def make_disjoint(edits: Iterable[Edit]) -> list[Edit]:
    """Make those edits that share no node with one made before; returns them, none only where there were none."""
    made, touched = list[Edit](), set[Node]()
    for edit in list(edits):  # all of them found before the first is made
        if touched.isdisjoint(edit.nodes):
            touched |= edit.nodes
            edit.make()
            made.append(edit)
    return made
