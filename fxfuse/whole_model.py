"""From the parts of a model to their fused forms: each graph through the pipeline, inner parts first."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxfuse.capture.captured import Captured
from fxfuse.capture.copying import copied
from fxfuse.capture.example_shapes import inputs_of, propagate
from fxfuse.capture.parts import Part, survey
from fxfuse.capture.symbolic import form
from fxfuse.cost import CostFunction
from fxfuse.guarded import GRAPHS, Form, Guard, kept_parameters
from fxfuse.names import below
from fxfuse.pattern import Selection
from fxfuse.pipeline import fuse
from fxfuse.refusal import Refusal
from fxfuse.reporting.describe import layer_totals, params
from fxfuse.reporting.report import Fired, Report, Totals
from fxfuse.rewriting.assemble import assemble
from fxfuse.rewriting.layers import Replay
from fxfuse.rewriting.result import keep
from fxfuse.rewriting.spelling import unspelled


@dataclass
class FusedParts:
    """What came of the parts of `root`: fused and refused sites under their full paths, totals, recipes.

    `memo` holds, by the id of a module, what copies of the model will have in its place; `guarded` the graphs of those
    that stay beside them.
    """

    root: Part
    dry_run: bool
    fired: list[Fired] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    replays: tuple[Replay, ...] = ()
    before: Totals = field(default_factory=Totals)
    after: Totals = field(default_factory=Totals)
    memo: dict[int, Any] = field(default_factory=dict)
    guarded: dict[int, list[tuple[Form, GraphModule]]] = field(default_factory=dict)

    def fuse(
        self, part: Part, captured: Captured, patterns: Selection, price: CostFunction, other: bool = False
    ) -> None:
        """Fuse one graph; a part in which nothing fuses keeps its module, which is as good, and its class.

        An `other` graph of a part is for other calls: of it, only its new parameters are counted.
        """
        done = fuse(captured, patterns, price, weights=not self.dry_run)
        self.fired += [replace(f, path=below(part.path, unspelled(part.module, f.path))) for f in done.fired]
        self.refused += [replace(r, where=below(part.path, r.where)) for r in done.refused]
        after = done.after
        if part.kept and done.fired:  # what it had is still there, beside what is new
            layers = done.rewritten.layers.values()
            new = {t for v in layers for t in (v.parameters() if isinstance(v, nn.Module) else [v])}
            after = replace(after, params=(0 if other else done.before.params) + sum(t.numel() for t in new))
        if other:
            self.after = replace(self.after, params=self.after.params + after.params)
        else:
            self.before += done.before
            self.after += after
        if not done.fired and (part.path or part.kept):
            return
        graphs = self.guarded.setdefault(id(part.module), []) if part.kept else []
        inside = f"{GRAPHS}{len(graphs)}" if part.kept else ""
        self.replays += (Replay(part.path, done.rewritten.operators, captured.constants, captured.held, inside),)
        if self.dry_run:
            return
        built = assemble(captured, done.rewritten.layers, self.memo)
        if part.kept:
            graphs.append((form(captured), built))
        else:
            self.memo[id(part.module)] = built
            keep(built, {name: copy.copy(getattr(part.module, name)) for name in part.asked})

    def stay(self, part: Part) -> None:
        """Count a part that stays Python."""
        self.refused += part.refused
        taken = {id(m) for p in part.parts for m in p.module.modules()}
        totals = layer_totals(m for m in part.module.modules() if id(m) not in taken)
        self.before += totals
        self.after += totals

    def module(self) -> nn.Module:
        """The optimized model: its graph, or a copy that holds the optimized parts."""
        model = self.root.module
        made: nn.Module = self.memo[id(model)] if id(model) in self.memo else copied(model, self.memo)
        for original, graphs in self.guarded.items():
            if graphs and original in self.memo:
                Guard(self.memo[original], graphs)
        return made

    def report(
        self, cost: str, started: float, fused: nn.Module | None = None, max_error: float | None = None
    ) -> Report:
        """The report of all parts, when `fused` was made of them, or nothing yet."""
        root, before = self.root, params(self.root.module)
        after = before - self.before.params + self.after.params if fused is None else params(fused)
        ways = [(p.path, p.how, p.refused[0].detail if p.captured is None else "") for p in root.walk()]
        return Report(
            model=type(root.module).__name__,
            fired=tuple(self.fired),
            refused=tuple(dict.fromkeys(self.refused)),
            before=replace(self.before, params=before),
            after=replace(self.after, params=after),
            cost=cost,
            seconds=time.perf_counter() - started,
            capture="hierarchical" if root.captured is None else root.how,
            parts=tuple(ways) if root.parts or root.captured is None else (),
            dry_run=self.dry_run,
            kept=0 if fused is None else kept_parameters(fused),
            kept_for=tuple(dict.fromkeys(p.kept for p in root.walk() if p.kept and self.guarded.get(id(p.module)))),
            max_error=max_error,
        )


def fuse_parts(
    model: nn.Module,
    inputs: tuple[Any, ...] | None,
    patterns: Selection,
    price: CostFunction,
    capture: str | None,
    dry_run: bool,
    checked: bool = True,
) -> FusedParts:
    """Every part of the model fused; a dry run computes no weight. Raises as `survey` and `inputs_of`."""
    root = survey(model, inputs, capture, checked)
    known = inputs_of(model, {p.path: p.module for p in root.walk() if p.captured and p.path}, inputs)
    parts = FusedParts(root, dry_run)
    for part in root.walk():
        if part.captured is None:
            parts.stay(part)
        else:
            shapes = propagate(part.captured, known.get(part.path) if part.path else inputs)
            parts.fuse(part, replace(part.captured, shapes=shapes), patterns, price)
            for captured in part.others:
                parts.fuse(part, captured, patterns, price, other=True)
    return parts
