"""Refusals of what no chain holds: joins of several tensors, and batch norms with nothing to join."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch.fx import Node

from fxfuse.algebra.constants import Attr
from fxfuse.algebra.operator import Operator
from fxfuse.cost import CostFunction
from fxfuse.names import place
from fxfuse.ops.movement import read_shaping
from fxfuse.pattern import Selection
from fxfuse.reading.affine import Affine
from fxfuse.reading.movable.factor_ways import passes
from fxfuse.reading.view import View
from fxfuse.rearranging.index_tensors import indexed
from fxfuse.rearranging.permutation_passing import permutation_of
from fxfuse.rearranging.permutation_routes import Route, Routes
from fxfuse.refusal import Refusal

NAMED = 3  # readers of a batch norm that its refusal names


def left_over(
    view: View, patterns: Selection, price: CostFunction, joined: Set[Node], fused: Set[Node]
) -> list[Refusal]:
    """Refusals of the view, and of affine nodes that neither a join (`joined`) nor a fusion took."""
    notes = list(view.refused.values())
    for node, affine in view.affine.items():
        if affine.kind != "unary" and node not in joined:
            notes += _several_sources(view, node, affine)
        elif affine.op.law == "batch_norm" and node not in fused:
            notes.append(_lonely_norm(view, patterns, node, affine, fused).at(affine.op.path))
    for node, call in view.calls.items():
        if call.op == "batch_norm" and node not in view.affine and node not in view.refused:
            reason = "what batch_norm normalizes with is computed when the model runs, or of several dtypes"
            notes.append(Refusal(reason, where=call.path or node.name))
    notes += _permutations(view, Routes(view, patterns, price), fused)
    return notes + [note for node in view.captured.graph.nodes for note in _layer_norm(view, node)]


def _permutations(view: View, routes: Routes, fused: Set[Node]) -> list[Refusal]:
    """Why permutations of channels stayed: what is on either side of them."""
    notes = list[Refusal]()
    single = [permutation_of(n, a) for n, a in view.affine.items() if n not in fused]
    by_tensor = [i.permutation for i in indexed(view) if i.permutation.whole]
    for permutation in (*filter(None, single), *by_tensor, *(s.permutation for s in view.shuffles)):
        found, where = routes.find(permutation), place(permutation.last)
        if isinstance(found, Route):
            reason = "a permutation of channels stays: what it reads is written in place before a layer could take it"
            notes.append(Refusal(reason, where, "use the out-of-place form"))
            continue
        before, after = found
        reason = "a permutation of channels stays: no layer before it or after it can take it into its weight"
        remedy = "a layer with groups=1 takes it, past activations and depthwise layers that nothing else reads"
        notes.append(Refusal(reason, where, remedy, f"before it {before.reason}; after it {after.reason}"))
    return notes


def _layer_norm(view: View, node: Node) -> list[Refusal]:
    """A layer norm whose weight and bias the layers after it could take; folded, they took .98 to 1.10 of the time."""
    if node.op not in ("call_function", "call_module") or node in view.affine:
        return []
    modules = view.captured.modules
    call = read_shaping(node, modules)
    if call is None or call.op != "layer_norm":
        return []
    weight: Any = modules[str(node.target)].weight if node.op == "call_module" else call.args.get("weight", node)
    readers = _through_permutations(view, node)
    steps = [view.affine.get(r) for r in readers]
    if weight is None or not readers or not all(s is not None and s.op.weighted for s in steps):
        return []
    held = view.constants.get(weight) if isinstance(weight, Node) else None
    where = held.path.rpartition(".")[0] if isinstance(held, Attr) else ""
    reason = "layer_norm keeps its weight and bias: measured, the layer after it gains nothing by taking them"
    return [Refusal(reason, where or place(node), detail=f"read by {', '.join(map(place, readers[:NAMED]))}")]


def _through_permutations(view: View, node: Node) -> list[Node]:
    """Who reads a node, or what has only been permuted since."""
    found = list[Node]()
    for reader in view.readers(node):
        call = read_shaping(reader, view.captured.modules) if reader.op != "output" else None
        turned = call is not None and call.op in ("permute", "transpose")
        found += _through_permutations(view, reader) if turned else [reader]
    return found


def _several_sources(view: View, node: Node, affine: Affine) -> list[Refusal]:
    """Convolutions that meet in a join without having started at one tensor."""
    before = [view.affine.get(source) for source, _ in affine.inputs]
    paths = [a.op.path for a in before if a is not None and a.kind == "unary" and (a.op.weighted or a.op.path)]
    if not paths:
        return []
    verb = "summed" if affine.kind == "sum" else "concatenated"
    reason = f"what is {verb} does not start at one tensor: something between is not linear"
    return [Refusal(reason, where=paths[0], detail=f"at {node.name}")]


def _lonely_norm(view: View, patterns: Selection, node: Node, affine: Affine, fused: Set[Node]) -> Refusal:
    """Why a batch norm stayed: what comes before it, or else what comes after it."""
    source, reader = affine.inputs[0][0], node
    steps = {**view.carries, **view.affine}
    before, carried, between = steps.get(source), False, [source]
    while before is not None and before.kind == "unary" and passes(before.op) and view.readers(source) == [reader]:
        carried |= before.op.kind in ("carry", "pool")
        source, reader = before.inputs[0][0], source
        before = steps.get(source)
        between.append(source)
    absorbs = before is not None and (source in fused if before.kind != "unary" else before.op.weighted)
    if before is None or not absorbs:
        reason = "batch_norm follows no convolution or linear layer of constant weight that could absorb it"
        return Refusal(reason, detail=f"after {place(source)}; {_below(view, patterns, node, affine)}")
    others = [u for u in view.readers(source) if u is not reader]
    if others:
        return Refusal(
            "the output of the layer before batch_norm is read elsewhere too",
            detail=f"by {', '.join(map(place, others))}",
            remedy="read the normalized tensor there instead",
        )
    if carried:
        return Refusal("what lies between the layer and batch_norm puts the layer's channels on another axis")
    both = patterns.combine("chain", before.op, affine.op) if before.kind == "unary" else before.op
    if isinstance(both, Refusal):
        return both
    if not view.sized.keys().isdisjoint(between):
        return Refusal("somebody asks for the size of a value that would be gone, and no other value has that size")
    return Refusal("the chosen cost does not fall by merging batch_norm")


def _below(view: View, patterns: Selection, node: Node, affine: Affine) -> str:
    """Who reads a batch norm, and why a layer that does cannot absorb it."""
    readers = view.readers(node)
    told = []
    for reader in readers[:NAMED]:
        after = view.affine.get(reader)
        both = patterns.combine("chain", affine.op, after.op) if after is not None and after.op.weighted else None
        dear = "exact with a frame, but it would cost more" if isinstance(both, Operator) and both.framed else ""
        why = both.reason if isinstance(both, Refusal) else dear
        told.append(f"{place(reader)} ({why})" if why else place(reader))
    more = [f"{len(readers) - NAMED} more"] if len(readers) > NAMED else []
    return f"read by {', '.join(told + more)}" if told else "read by nobody"
