"""The stages of a plan: what becomes one layer, which of them run before a pool, and which of those side by side."""

from __future__ import annotations

from fxfuse.cost import CostFunction
from fxfuse.pattern import Selection
from fxfuse.planning.layer_first import LayerFirst
from fxfuse.planning.planner import Planner
from fxfuse.planning.siblings import Gather
from fxfuse.planning.sites import Plan
from fxfuse.reading.view import View


def make_plan(view: View, patterns: Selection, price: CostFunction) -> Plan:
    """The whole plan of one graph; no weight is read and nothing is changed."""
    plan = Planner(view, patterns, price).run()
    plan = LayerFirst(view, patterns, price).run(plan)
    return Gather(view, patterns, price).run(plan)
