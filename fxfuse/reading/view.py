"""The view: each node read once into an affine step, a constant, or something opaque.

After it no code asks whether a node was `nn.Conv2d` or `F.conv2d`. An affine node is one operator
of one tensor ("unary"), a sum of tensors with coefficients ("sum") or a concatenation ("concat").
Axes are decided by rank, never by sizes that happen to agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch.fx import Node

from fxfuse.algebra.constants import Attr, leaves
from fxfuse.algebra.operator import Operator
from fxfuse.attributes import tensor_at
from fxfuse.capture.captured import Captured
from fxfuse.capture.symbolic import stays
from fxfuse.facts.fact import Fact
from fxfuse.facts.infer import infer
from fxfuse.facts.sizes import Dims
from fxfuse.ops.call import SEVERAL, Call
from fxfuse.ops.movement import read_shaping
from fxfuse.ops.questions import asks_size, shape_reader
from fxfuse.ops.spellings import read
from fxfuse.reading.affine import Affine, Unknown
from fxfuse.reading.arithmetic import ARITHMETIC
from fxfuse.reading.border_fill import border_fills
from fxfuse.reading.effects import Effects
from fxfuse.reading.folding import find_constants
from fxfuse.reading.layers import LAYERS
from fxfuse.reading.modes import inside_regions
from fxfuse.reading.movable.commuting import read_carry
from fxfuse.reading.movable.dynamic_conv import Dynamic, Finder
from fxfuse.reading.movable.factor_before_concat import Ahead
from fxfuse.reading.movable.factor_ways import Passage, find_divisions, find_passage
from fxfuse.reading.movable.shuffles import Shuffle, candidates, find_shuffles
from fxfuse.refusal import Refusal

READERS = {**LAYERS, **ARITHMETIC}


@dataclass(frozen=True)
class View:
    """All that later stages know of the graph."""

    captured: Captured
    affine: dict[Node, Affine]
    refused: dict[Node, Refusal]
    constants: dict[Node, Any]
    effects: Effects
    facts: dict[Node, Fact]
    shapes: Mapping[Node, torch.Size]
    calls: dict[Node, Call] = field(default_factory=dict)
    passage: Passage = field(default_factory=Passage)
    carries: Mapping[Node, Affine] = field(default_factory=dict)
    unbiased: tuple[Dynamic, ...] = ()
    shuffles: tuple[Shuffle, ...] = ()

    def data_users(self, node: Node) -> list[Node]:
        """Users that read more than its rank, dtype or size."""
        hidden = self.affine[node].extra if node in self.affine else ()
        return [u for u in node.users if u not in hidden and shape_reader(u) is None and not asks_size(u, node)]

    @cached_property
    def sized(self) -> dict[Node, list[Node]]:
        """Who asks for the size of a node, for those that somebody asks."""
        asked = {n: [u for u in n.users if asks_size(u, n)] for n in self.affine}
        return {n: users for n, users in asked.items() if users}

    def readers(self, node: Node) -> list[Node]:
        """Who reads the data of `node`; pieces of a chunk or split are read where they are taken out."""
        found = []
        for user in self.data_users(node):
            call = self.calls.get(user)
            found += self.data_users(user) if call is not None and call.op in SEVERAL else [user]
        return found


def look(captured: Captured) -> View:
    """Read every node of the graph as it is now."""
    graph, root, shapes = captured.graph, captured.root, captured.shapes.copy()
    modules = captured.modules

    def attr(path: str) -> Attr | None:
        tensor = tensor_at(root, path)
        return None if tensor is None else Attr(path, tuple(tensor.shape), tensor.dtype)

    calls = {n: c for n in graph.nodes if (c := read(n, modules, attr)) is not None}
    effects = Effects(graph, calls, modules)
    constants = find_constants(graph, root, captured.constants, effects)
    calls = {n: replace(c, args=_resolved(c.args, constants)) for n, c in calls.items() if n not in constants}
    shapings = {n: c for n in graph.nodes if n not in constants and (c := read_shaping(n, modules)) is not None}
    facts = infer(graph, calls, shapings, modules, shapes)
    fills = border_fills(calls, facts, effects.position)
    effects.forget(n for fill in fills.values() for n in fill.writes)
    written = effects.written_attributes()
    affine: dict[Node, Affine] = {}
    refused: dict[Node, Refusal] = {}
    for node, call in calls.items():
        try:
            result = READERS[call.op](call, facts, node) if call.op in READERS else call.refusal
        except Unknown:
            if call.op == "batch_norm":
                reason = "what batch_norm normalizes with is computed when the model runs, or of several dtypes"
                refused[node] = Refusal(reason, call.path or node.name)
            continue
        if isinstance(result, Affine) and node in fills:
            fill = fills[node]
            result = replace(result, op=replace(result.op, pad_value=fill.value), extra=(*fill.writes, *fill.slices))
        if isinstance(result, Affine) and not effects.private_write(node):
            result = Refusal("it writes a tensor in place that is read elsewhere", remedy="use the out-of-place form")
        if isinstance(result, Affine) and written and _reads_any(result.op, written):
            result = Refusal("the forward itself writes its weights")
        if isinstance(result, Refusal):
            refused[node] = result.at(call.path or node.name)
        elif result is not None:
            affine[node] = result
    if affine and (writer := effects.by_strides()) is not None:
        reason = "whether it writes a tensor that is read again depends on strides, which a fusion may change"
        remedy = "use the out-of-place form, or view instead of flatten and reshape"
        affine, refused = {}, {**refused, writer: Refusal(reason, writer.name, remedy)}
    for node in inside_regions(graph):
        if (gone := affine.pop(node, None)) is not None and gone.op.law == "batch_norm":
            refused[node] = Refusal("the forward switches gradients or autocast before it and after it", gone.op.path)
    for node in graph.nodes:
        if node.op == "call_module" and node.target in captured.whole:
            refused[node] = stays(str(node.target), captured.whole[node.target])
    view = View(captured, affine, refused, constants, effects, facts, shapes, calls)
    return _with_carries(view, shapings)


def _with_carries(view: View, shapings: Mapping[Node, Call]) -> View:
    """The view with those carries among its affine nodes that lie between a factor and a layer."""
    graph = view.captured.graph
    turns = candidates(shapings)
    if not turns and not any(_apart(node, view) for node in view.affine):
        return view
    divisions = find_divisions(view.affine, view.readers)
    dims = Dims(graph, view.calls, shapings, view.facts, view.captured.modules)
    steps = dict[Node, Affine]()
    for node in graph.nodes:
        if node in view.constants:
            continue
        call = shapings.get(node) or view.calls.get(node)
        affine = view.affine.get(node) or read_carry(node, call, dims, view.facts)
        if affine is not None and affine.kind == "unary" and node not in view.effects.writes:
            steps[node] = affine  # what is written in place cannot stand in two places
    passage = find_passage(steps, view.readers)
    chosen = view.affine.keys() | passage.carries
    affine_nodes = {n: view.affine.get(n) or steps[n] for n in graph.nodes if n in chosen}
    carries = {n: a for n, a in steps.items() if a.op.kind == "carry"}
    finder = Finder(view.calls, shapings, view.affine, dims, view.readers)
    divisions |= finder.divisions() | Ahead(view.affine, view.facts, view.effects, view.readers).divisions()
    view = replace(view, unbiased=tuple(finder.unbiased()), shuffles=find_shuffles(turns, shapings, dims))
    return replace(view, affine=affine_nodes, passage=replace(passage, divisions=divisions), carries=carries)


def _apart(node: Node, view: View) -> bool:
    """Whether a node is a factor that follows no layer."""
    affine = view.affine[node]
    before = view.affine.get(affine.inputs[0][0])
    follows = before is not None and before.kind == "unary" and before.op.kind in ("conv", "scale", "identity")
    return affine.kind == "unary" and affine.op.kind == "scale" and not follows


def _resolved(args: dict[str, Any], constants: Mapping[Node, Any]) -> dict[str, Any]:
    return {k: constants.get(v, v) if isinstance(v, Node) else v for k, v in args.items()}


def _reads_any(op: Operator, paths: set[str]) -> bool:
    return any(a.path in paths for _, c in op.consts for a in leaves(c))
