"""What in a graph may act elsewhere: factors a channel, permutations of channels, dynamic convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from fxfuse.reading.affine import Affine
from fxfuse.reading.movable.commuting import read_commuting
from fxfuse.reading.movable.dynamic_conv import Dynamic, find_dynamic
from fxfuse.reading.movable.factor_ways import find_ways
from fxfuse.reading.movable.factors_at_joins import SplitFactors, after_joins, before_concats
from fxfuse.reading.movable.permutations import Permutation, find_shuffles, transposes
from fxfuse.reading.nodes import Nodes


@dataclass(frozen=True)
class Movable:
    """What may act elsewhere.

    `commuting` nodes commute with every factor a channel. `trees`: for a factor that several layers share, all nodes
    on its ways. `split`: factors that are absorbed in several places, by the first of them. `unbiased` are dynamic
    convolutions that could take a shift if they had a bias.
    """

    commuting: Mapping[Node, Affine] = field(default_factory=dict)
    trees: Mapping[Node, frozenset[Node]] = field(default_factory=dict)
    split: Mapping[Node, SplitFactors] = field(default_factory=dict)
    unbiased: tuple[Dynamic, ...] = ()
    shuffles: tuple[Permutation, ...] = ()


def find_movable(nodes: Nodes) -> tuple[Movable, dict[Node, Affine]]:
    """All that may act elsewhere, and the affine nodes with those between a factor and a layer that commute with it."""
    if not any(transposes(nodes)) and not any(_apart(nodes, affine) for affine in nodes.affine.values()):
        return Movable(), nodes.affine
    graph, steps = nodes.captured.graph, dict[Node, Affine]()
    for node in graph.nodes:
        if node in nodes.constants:
            continue
        call = nodes.shapings.get(node) or nodes.calls.get(node)
        affine = nodes.affine.get(node) or read_commuting(node, call, nodes.dims, nodes.facts)
        if affine is not None and affine.kind == "unary" and node not in nodes.effects.writes:
            steps[node] = affine  # what is written in place cannot stand in two places
    on_ways, trees = find_ways(steps, nodes)
    split, unbiased = find_dynamic(nodes, steps)
    movable = Movable(
        commuting={n: a for n, a in steps.items() if a.op.kind == "commuting"},
        trees=trees,
        split={s.factors[0]: s for s in (*after_joins(nodes), *split, *before_concats(nodes))},
        unbiased=tuple(unbiased),
        shuffles=tuple(find_shuffles(nodes)),
    )
    chosen = nodes.affine.keys() | on_ways
    return movable, {n: nodes.affine.get(n) or steps[n] for n in graph.nodes if n in chosen}


def _apart(nodes: Nodes, affine: Affine) -> bool:
    """Whether a node is a factor that follows no layer."""
    before = nodes.affine.get(affine.inputs[0][0])
    follows = before is not None and before.kind == "unary" and before.op.kind in ("conv", "scale", "identity")
    return affine.kind == "unary" and affine.op.kind == "scale" and not follows
