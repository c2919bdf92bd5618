"""What of a plan can be carried out: its layers built, and left out what their dtype cannot hold."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import Any

import networkx as nx
from torch import nn
from torch.fx import Node

from fxfuse.algebra.constants import Values
from fxfuse.algebra.operator import Operator, sources
from fxfuse.planning.sites import Plan, Site, fuses, joined
from fxfuse.reading.view import View
from fxfuse.refusal import Refusal
from fxfuse.rewriting.layers import Stored, blank, layer, tensors

Built = dict[Operator, nn.Module | nn.Parameter]


def feasible(plan: Plan, view: View, values: Values | None) -> tuple[Plan, Built]:
    """The part of `plan` whose weights are finite, with the layer of every operator; nothing is changed.

    Siblings run on their own where their wide layer cannot be had. Without `values` layers have no numbers.
    """
    siblings = plan.siblings
    sites = joined(plan.sites, [s for g in siblings for s in g.alone], view.effects.position)
    wide = {f.exit for g in siblings for f in g.members}
    ops = list(dict.fromkeys([op for s in sites for op in _operators(s, wide)] + [g.op for g in siblings]))
    stored: dict[Operator, Stored | Refusal] = {op: blank(op) for op in ops} if values is None else tensors(ops, values)
    refused = {op: r.at(op.path) for op, r in stored.items() if isinstance(r, Refusal)}
    failed = [i for i, s in enumerate(sites) if not refused.keys().isdisjoint(_operators(s, wide))]
    left = set[Any]()
    if failed:  # a factor that several sites share stays, and so do they all
        shared = nx.Graph((number, node) for number, site in enumerate(sites) for node in site.nodes())
        left.update(*(nx.node_connected_component(shared, i) for i in failed))
    done = [s for i, s in enumerate(sites) if i not in left]
    there = {f.exit for s in done for f in fuses(s.segments)}
    able = tuple(g for g in siblings if g.op not in refused and there.issuperset(f.exit for f in g.members))
    if able != siblings:
        return feasible(replace(plan, siblings=able), view, values)
    shifts = {f.shift for s in done for f in fuses(s.segments)}
    built: Built = {}
    for op in ops:
        numbers = stored[op]
        if not isinstance(numbers, Refusal):
            trained = any(map(view.captured.requires_grad, sources(op)))
            only_bias = numbers[1] if op in shifts else None
            built[op] = layer(op, numbers, trained) if only_bias is None else nn.Parameter(only_bias, trained)
    refusals = tuple(dict.fromkeys((*plan.refusals, *refused.values())))
    return replace(plan, sites=tuple(done), refusals=refusals, siblings=siblings), built


def _operators(site: Site, wide: Set[Node]) -> list[Operator]:
    """The operators of a site that need numbers of their own."""
    found = [op for f in fuses(site.segments) for op in (None if f.exit in wide else f.op, f.shift)]
    return [op for op in found if op is not None]
