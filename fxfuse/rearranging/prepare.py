"""What is changed in a captured graph before the plan, so that the planner only decides what becomes one layer."""

from __future__ import annotations

from fxfuse.cost import CostFunction
from fxfuse.graph_edits import make_disjoint
from fxfuse.pattern import Selection
from fxfuse.reading.view import View, look
from fxfuse.rearranging.dynamic_bias import give_biases
from fxfuse.rearranging.permutation_moves import move_permutations, use_shuffles, write_indices
from fxfuse.rearranging.pool_first import Swapped, swap
from fxfuse.rearranging.sums import regroup

PASSES = ((swap,), (give_biases,), (regroup,), (use_shuffles, write_indices, move_permutations))


def prepare(view: View, patterns: Selection, price: CostFunction) -> tuple[View, tuple[Swapped, ...]]:
    """The view of the prepared graph, and the layers that changed places with a pool."""
    captured, swapped = view.captured, list[Swapped]()
    for passes in PASSES:
        while made := next(filter(None, (make_disjoint(captured, p(view, patterns, price)) for p in passes)), None):
            swapped += [edit.told for edit in made if edit.told is not None]
            view = look(captured)
    return view, tuple(swapped)
