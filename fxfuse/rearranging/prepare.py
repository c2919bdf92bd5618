"""What is changed in a captured graph before the plan, so that the planner only decides what becomes one layer."""

from __future__ import annotations

from collections.abc import Callable

from fxfuse.cost import CostFunction
from fxfuse.graph_edits import make_disjoint
from fxfuse.pattern import Selection
from fxfuse.reading.movable.dynamic_conv import give_biases
from fxfuse.reading.view import View
from fxfuse.rearranging.index_tensors import write_indices
from fxfuse.rearranging.permutation_moves import move_permutations, use_shuffles
from fxfuse.rearranging.pool_first import swap
from fxfuse.rearranging.sums import regroup
from fxfuse.reporting.report import Fired


def prepare(
    view: View, again: Callable[[], View], patterns: Selection, price: CostFunction
) -> tuple[View, tuple[Fired, ...]]:
    """The view of the prepared graph, and what was fused by it; `again` looks at the graph anew."""
    fired = list[Fired]()
    for passes in ((swap,), (give_biases,), (regroup,), (use_shuffles, write_indices, move_permutations)):
        while made := next(filter(None, (make_disjoint(find(view, patterns, price)) for find in passes)), None):
            fired += [edit.told for edit in made if edit.told is not None]
            view = again()
    return view, tuple(fired)
