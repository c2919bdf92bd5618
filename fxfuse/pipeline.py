"""The spine: one captured graph read, rearranged, planned, rewritten and described, whoever captured it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fxfuse.capture.captured import Captured
from fxfuse.cost import CostFunction
from fxfuse.pattern import Selection
from fxfuse.planning.layer_first import LayerFirst
from fxfuse.planning.planner import Planner
from fxfuse.planning.siblings import Gather
from fxfuse.planning.sites import Plan
from fxfuse.reading.view import View, look
from fxfuse.rearranging.prepare import prepare, tidy
from fxfuse.refusal import Refusal
from fxfuse.reporting import describe
from fxfuse.reporting.report import Fired, Totals
from fxfuse.rewriting.rewriter import Recipe, Rewriter


@dataclass(frozen=True)
class Fused:
    """A graph with its plan carried out: what fused and what did not, sizes before and after, how weights follow."""

    captured: Captured
    rewriter: Rewriter
    recipes: tuple[Recipe, ...]
    fired: tuple[Fired, ...]
    refused: tuple[Refusal, ...]
    before: Totals
    after: Totals


def fuse(captured: Captured, patterns: Selection, price: CostFunction, weights: bool) -> Fused:
    """Fuse one graph, which is changed. Without `weights` the new layers have shapes but no numbers."""
    params = sum(p.numel() for p in captured.root.parameters())
    before = describe.totals(captured.graph, captured.modules, params, None)
    tidy(captured)
    view = look(captured)
    before = replace(before, macs=describe.macs(view))
    view, swapped = prepare(view, patterns, price)
    rewriter = Rewriter(view, dry_run=not weights)
    plan, recipes = rewriter.apply(make_plan(view, patterns, price))
    fired = (*map(describe.swapped, swapped), *describe.fired(plan, view, rewriter.names))
    macs = None if before.macs is None else before.macs - sum(f.saved for f in fired)
    after = describe.totals(rewriter.graph, rewriter.modules(), rewriter.params(), macs)
    return Fused(captured, rewriter, recipes, fired, plan.refusals, before, after)


def make_plan(view: View, patterns: Selection, price: CostFunction) -> Plan:
    """The whole plan of one graph; no weight is read and nothing is changed."""
    plan = Planner(view, patterns, price).run()
    plan = LayerFirst(view, patterns, price).run(plan)
    return Gather(view, patterns, price).run(plan)
