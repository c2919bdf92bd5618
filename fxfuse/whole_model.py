"""From the parts of a model to their fused forms: each graph through the pipeline, inner parts first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from fxfuse.capture.copying import copied
from fxfuse.capture.example_shapes import propagate
from fxfuse.capture.parts import Part
from fxfuse.cost import CostFunction
from fxfuse.pattern import Selection
from fxfuse.pipeline import fuse
from fxfuse.refresh import Replay
from fxfuse.refusal import Refusal
from fxfuse.reporting import describe
from fxfuse.reporting.report import Fired, Totals
from fxfuse.rewriting.assemble import keep


@dataclass
class Outcome:
    """What came of the parts: fused and refused sites under their full paths, totals, recipes."""

    patterns: Selection
    price: CostFunction
    dry_run: bool
    fired: list[Fired] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    replays: tuple[Replay, ...] = ()
    before: list[Totals] = field(default_factory=list)
    after: list[Totals] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, part: Part, inputs: tuple[Any, ...] | None) -> None:
        """Fuse one graph; its module, where anything was fused, is what copies of the model will hold."""
        assert part.captured is not None
        captured = replace(part.captured, shapes=propagate(part.captured, inputs))
        done = fuse(captured, self.patterns, self.price, weights=not self.dry_run)
        self.fired += [replace(f, path=_join(part.path, f.path)) for f in done.fired]
        self.refused += [replace(r, where=_join(part.path, r.where)) for r in done.refused]
        self.before.append(done.before)
        self.after.append(done.after)
        if part.path and not done.fired:
            return  # the module itself is as good, and keeps its class
        self.replays += (Replay(part.path, done.recipes, captured.constants, captured.held),)
        if not self.dry_run:
            built = self.memo[id(part.module)] = done.rewriter.build(self.memo)
            keep(built, {name: getattr(part.module, name) for name in part.asked})

    def stay(self, part: Part) -> None:
        """A part that stays Python: its own layers are counted once each, as nobody knows how often they run."""
        self.refused += part.refused
        taken = {id(m) for p in part.parts for m in p.module.modules()}
        layers = [m for m in part.module.modules() if id(m) not in taken and describe.is_layer(m)]
        ops = dict(Counter(describe.kind_of(m) for m in layers))
        weighted = any(getattr(m, "weight", None) is not None and not describe.is_norm(m) for m in layers)
        totals = Totals(0, 0, None if weighted else 0, ops)
        self.before.append(totals)
        self.after.append(totals)

    def module(self, model: nn.Module) -> nn.Module:
        """The optimized model: its graph, or a copy that holds the optimized parts."""
        made: nn.Module = self.memo[id(model)] if id(model) in self.memo else copied(model, self.memo)
        return made


def sizes(parts: Sequence[Totals], params: int) -> Totals:
    """Totals of all parts together; MACs where every part knows its own."""
    ops: Counter[str] = Counter()
    for part in parts:
        ops.update(part.ops)
    macs = [p.macs for p in parts]
    known = None if None in macs else sum(m for m in macs if m is not None)
    return Totals(sum(p.nodes for p in parts), params, known, dict(sorted(ops.items())))


def ways(root: Part) -> Iterator[tuple[str, str, str]]:
    """Path, way of capture and, where a module stays Python, the reason."""
    for part in root.walk():
        yield part.path, part.how, part.refused[0].detail if part.captured is None else ""


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix else path
