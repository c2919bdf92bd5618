"""What is changed in a captured graph before the plan, so that the planner only decides what becomes one layer."""

from __future__ import annotations

from collections.abc import Callable

from .cost import CostFunction
from .graph_edits import make_disjoint
from .indices import write_indices
from .moves import move_permutations, use_shuffles
from .pattern import Selection
from .regroup import regroup
from .report import Fired
from .runtime_weight import give_biases
from .swap import swap
from .view import View


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
