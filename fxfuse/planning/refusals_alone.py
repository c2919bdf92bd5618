"""Why something stayed that has no neighbour to merge with: joins of several tensors, batch norms, layer norms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import takewhile
from typing import Any

from torch.fx import Node

from fxfuse.algebra.constants import Attr
from fxfuse.algebra.operator import Operator
from fxfuse.names import place
from fxfuse.ops.call import Call
from fxfuse.planning.factor_orders import factors_first, moved
from fxfuse.planning.fusing import STEPS, TOO_LONG, Fusing
from fxfuse.planning.refusals_between import unfused
from fxfuse.planning.regions import Step
from fxfuse.reading.affine import Affine
from fxfuse.reading.movable.commuting import order_of_layer
from fxfuse.reading.movable.factor_ways import passes
from fxfuse.refusal import Refusal

FRAME = "exact with a frame, but it would cost more"
NAMED = 3  # readers of a value that a refusal names


@dataclass(frozen=True)
class Alone:
    """`joined` are the nodes of joins in a chain, `fused` those that became an operator, `told` those of which a reason
    is given.
    """

    fusing: Fusing
    joined: Set[Node]
    fused: Mapping[Node, Operator]
    told: Set[Node]

    def refusals(self) -> Iterator[Refusal]:
        view = self.fusing.view
        yield from view.refused.values()
        for node, affine in view.affine.items():
            if affine.kind != "unary" and node not in self.joined:
                yield from self._several_sources(node, affine)
            elif affine.op.law == "batch_norm" and node not in self.fused and node not in self.told:
                yield self._norm(node, affine).at(affine.op.path)
        for node, call in view.shapings.items():
            if call.op == "layer_norm":
                yield from self._layer_norm(node, call)

    def _several_sources(self, node: Node, affine: Affine) -> Iterator[Refusal]:
        """Convolutions that meet in a join without having started at one tensor."""
        steps = [self.fusing.view.affine.get(source) for source, _ in affine.inputs]
        paths = [a.op.path for a in steps if a is not None and a.kind == "unary" and (a.op.weighted or a.op.path)]
        verb = "summed" if affine.kind == "sum" else "concatenated"
        reason = f"what is {verb} is not all made of one tensor by layers that can be merged"
        if paths:
            yield Refusal(reason, where=paths[0], detail=f"at {node.name}")

    @cached_property
    def _steps(self) -> dict[Node, Affine]:
        return {**self.fusing.view.movable.commuting, **self.fusing.view.affine}

    def _norm(self, node: Node, affine: Affine) -> Refusal:
        """What is the matter with what comes before a batch norm, or else with what comes after it."""
        view, source, reader = self.fusing.view, affine.inputs[0][0], node
        run = [Step(node, affine.op)]
        for passed, step in takewhile(lambda n: passes(n[1].op), view.before(source, node, self._steps)):
            run.insert(0, Step(passed, step.op))
            source, reader = step.inputs[0][0], passed
        layer = self._steps.get(source)
        absorbs = layer is not None and (source in self.fused if layer.kind != "unary" else layer.op.weighted)
        if layer is None or not absorbs:
            reason = "batch_norm follows no convolution or linear layer of constant weight that could absorb it"
            return Refusal(reason, detail=f"after {place(source)}; {self._below(node, affine)}")
        others = [u for u in view.readers(source) if u is not reader]
        if others:
            reason = "the output of the layer before batch_norm is read elsewhere too"
            detail = f"by {', '.join(map(place, others))}"
            return Refusal(reason, detail=detail, remedy="read the normalized tensor there, if that is meant")
        return self._not_taken(Step(source, layer.op if layer.kind == "unary" else self.fused[source]), run)

    def _not_taken(self, layer: Step, run: list[Step]) -> Refusal:
        """Why a layer does not take the batch norm at the end of a run that it alone could be merged with."""
        if len(run) >= STEPS:
            return TOO_LONG
        ordered = factors_first(run, order_of_layer(layer.op.spatial))
        parts = [layer, *takewhile(lambda s: s.op.kind not in ("commuting", "pool"), ordered)]
        while len(parts) > 1 and parts[-1].node is not run[-1].node:
            parts.pop()
        beside = moved(run[-1], run[-2::-1], up=True) if len(run) > 1 else run[-1]
        if beside is None or beside.op.spatial not in (None, layer.op.spatial):
            return Refusal("what lies between the layer and batch_norm puts the layer's channels on another axis")
        if len(parts) == 1:
            factor = any(s.op.kind == "scale" for s in run[:-1])
            order = "moved next to the layer, batch_norm would leave those who read it another order in memory"
            return Refusal("another factor keeps batch_norm from moving next to the layer" if factor else order)
        both = self.fusing.combine("chain", layer.op, beside.op)
        both = both if isinstance(both, Refusal) else self.fusing.combined("chain", [s.op for s in parts])
        if isinstance(both, Refusal):
            return both
        area = self.fusing.area(layer.node, Fraction(1), layer.op)
        return unfused(self.fusing, both, [(s.op, area) for s in parts], parts)

    def _below(self, node: Node, affine: Affine) -> str:
        """Who reads a batch norm, and why a layer that does cannot absorb it."""
        readers, told = self.fusing.view.readers(node), list[str]()
        for reader in readers[:NAMED]:
            after, why = self.fusing.view.affine.get(reader), ""
            if after is not None and after.op.weighted:
                both = self.fusing.combine("chain", affine.op, after.op)
                why = both.reason if isinstance(both, Refusal) else FRAME if both.framed else ""
            told.append(f"{place(reader)} ({why})" if why else place(reader))
        told += [f"{len(readers) - NAMED} more"] if len(readers) > NAMED else []
        return f"read by {', '.join(told) or 'nobody'}"

    def _layer_norm(self, node: Node, call: Call) -> Iterator[Refusal]:
        """One whose weight and bias the layers after it could take; folded, they took .98 to 1.10 of the time."""
        view, modules = self.fusing.view, self.fusing.view.captured.modules
        weight: Any = modules[str(node.target)].weight if node.op == "call_module" else call.args.get("weight", node)
        readers = list(self._past_permutations(node))
        layers = all(r in view.affine and view.affine[r].op.weighted for r in readers)
        held = view.constants.get(weight) if isinstance(weight, Node) else None
        where = held.path.rpartition(".")[0] if isinstance(held, Attr) else place(node)
        reason = "layer_norm keeps its weight and bias: measured, the layer after it gains nothing by taking them"
        if weight is not None and readers and layers:
            yield Refusal(reason, where or place(node), detail=f"read by {', '.join(map(place, readers[:NAMED]))}")

    def _past_permutations(self, node: Node) -> Iterator[Node]:
        """Who reads a node, or what has only been permuted since."""
        view = self.fusing.view
        for reader in view.readers(node):
            permuted = reader in view.shapings and view.shapings[reader].op in ("permute", "transpose")
            yield from self._past_permutations(reader) if permuted else (reader,)
