"""`x[:, self.order]`: channels taken by a constant tensor of indices, which a layer takes where it would take a list.

What such a tensor holds decides the plan, where other weights only decide numbers. So the graph it is written into
notes what it held (`Captured.held`), and whoever gives that graph new weights compares first.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import partial

from fxfuse.cost import CostFunction
from fxfuse.graph_edits import Edit, Editor
from fxfuse.ops.index_lists import index_of
from fxfuse.pattern import Selection
from fxfuse.reading.movable.index_tensors import Indexed, indexed
from fxfuse.reading.view import View
from fxfuse.rearranging.permutation_routes import Route, Routes


def write_indices(view: View, patterns: Selection, price: CostFunction) -> Iterator[Edit]:
    """Those tensors to be written as lists, which a layer takes."""
    routes = Routes(view, patterns, price)
    for found in indexed(view):
        if isinstance(routes.find(found.permutation), Route):
            old = found.permutation.last
            yield Edit(frozenset((found.permutation.source, old, *old.users)), partial(_write, view, found))


def _write(view: View, found: Indexed, editor: Editor) -> None:
    old, index = found.permutation.last, index_of(found.axis, found.entries)
    new = editor.call(old, operator.getitem, (found.permutation.source, index), old, old)
    editor.replace(old, new, view.constants)
    view.captured.held[found.const] = found.entries
