"""The spine: one captured graph read, rearranged, planned, rewritten and described, whoever captured it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fxfuse.capture.captured import Captured
from fxfuse.cost import CostFunction
from fxfuse.pattern import Selection
from fxfuse.planning.planner import make_plan
from fxfuse.reading.view import look
from fxfuse.rearranging.permutation_routes import permutations_left
from fxfuse.rearranging.prepare import prepare
from fxfuse.rearranging.tidy import tidy
from fxfuse.refusal import Refusal
from fxfuse.reporting import describe
from fxfuse.reporting.report import Fired, Totals
from fxfuse.rewriting.assemble import Rewritten
from fxfuse.rewriting.rewriter import rewrite


@dataclass(frozen=True)
class Fused:
    """A graph with its plan carried out: what fused and what did not, sizes before and after, how weights follow."""

    rewritten: Rewritten
    fired: tuple[Fired, ...]
    refused: tuple[Refusal, ...]
    before: Totals
    after: Totals


def fuse(captured: Captured, patterns: Selection, price: CostFunction, weights: bool) -> Fused:
    """Fuse one graph, which is changed. Without `weights` the new layers have shapes but no numbers."""
    before = describe.totals(captured.graph, captured.modules, describe.params(captured.root), None)
    tidy(captured)
    view = look(captured)
    before = replace(before, macs=describe.macs(view))
    view, swapped = prepare(view, patterns, price)
    plan = make_plan(view, patterns, price)
    left = permutations_left(view, patterns, price, plan.fused())
    plan, rewritten = rewrite(view, plan, weights)
    fired = (*map(describe.swapped, swapped), *describe.fired(plan, view, rewritten.names))
    macs = None if before.macs is None else before.macs - sum(f.saved for f in fired)
    after = describe.totals(captured.graph, rewritten.modules, rewritten.params(), macs)
    refused = tuple(dict.fromkeys((*plan.refusals, *left)))
    return Fused(rewritten, fired, refused, before, after)
