"""What is changed in a captured graph before the plan, so that the planner only decides what becomes one layer."""

from __future__ import annotations

from collections.abc import Callable

from .cost import CostFunction
from .indices import write_indices
from .moves import move_permutations, use_shuffles
from .pattern import Selection
from .regroup import regroup
from .report import Fired
from .runtime_weight import give_bias
from .swap import swap
from .view import View


def prepare(
    view: View, again: Callable[[], View], patterns: Selection, price: CostFunction
) -> tuple[View, tuple[Fired, ...]]:
    """The view of the prepared graph, and what was fused by it; `again` looks at the graph anew."""
    fired = list[Fired]()
    while found := swap(view, patterns, price):
        fired += found
        view = again()
    if give_bias(view, patterns):
        view = again()
    if regroup(view, patterns, price):
        view = again()
    steps = (use_shuffles, write_indices, move_permutations)
    while any(step(view, patterns, price) for step in steps):
        view = again()
    return view, tuple(fired)
