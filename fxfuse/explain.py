"""Refusals of what no chain holds: joins of several tensors, and batch norms with nothing to join."""

from __future__ import annotations

from collections.abc import Set

from torch.fx import Node

from .arguments import Affine
from .pattern import Selection
from .refusal import Refusal
from .view import View


def left_over(view: View, patterns: Selection, joined: Set[Node], fused: Set[Node]) -> list[Refusal]:
    """Refusals of the view, and of affine nodes that neither a join (`joined`) nor a fusion took."""
    notes = list(view.refused.values())
    for node, affine in view.affine.items():
        if affine.kind != "unary" and node not in joined:
            notes += _several_sources(view, node, affine)
        elif affine.op.law == "batch_norm" and node not in fused:
            notes += _lonely_norm(view, patterns, node, affine, fused)
    return notes


def _several_sources(view: View, node: Node, affine: Affine) -> list[Refusal]:
    """Convolutions that meet in a join without having started at one tensor."""
    before = [view.affine.get(source) for source, _ in affine.inputs]
    paths = [a.op.path for a in before if a is not None and a.kind == "unary" and (a.op.weighted or a.op.path)]
    if not paths:
        return []
    verb = "summed" if affine.kind == "sum" else "concatenated"
    reason = f"what is {verb} does not start at one tensor: something between is not linear"
    return [Refusal(reason, where=paths[0], detail=f"at {node.name}")]


def _lonely_norm(view: View, patterns: Selection, node: Node, affine: Affine, fused: Set[Node]) -> list[Refusal]:
    """A batch norm that stayed because of what comes before it."""
    source, reader = affine.inputs[0][0], node
    before, readers = view.affine.get(source), view.data_users(source)
    while before is not None and before.kind == "unary" and not before.op.weighted and readers == [reader]:
        source, reader = before.inputs[0][0], source
        before, readers = view.affine.get(source), view.data_users(source)
    absorbs = before is not None and (source in fused if before.kind != "unary" else before.op.weighted)
    if before is None or not absorbs:
        reason = "batch_norm follows no convolution or linear layer of constant weight that could absorb it"
        return [Refusal(reason, where=affine.op.path, detail=f"after {source.name}")]
    if readers == [reader]:
        return []
    both = patterns.combine("chain", before.op, affine.op) if before.kind == "unary" else before.op
    if isinstance(both, Refusal):
        return [both.at(affine.op.path)]
    others = ", ".join(u.name for u in readers if u is not reader)
    return [
        Refusal(
            "the output of the layer before batch_norm is read elsewhere too",
            where=affine.op.path,
            detail=f"by {others}",
            remedy="read the normalized tensor there instead",
        )
    ]
