"""Regions: maximal single-entry single-exit affine subgraphs, as series-parallel trees.

A chain is a list of parts applied one after the other to one tensor; a part is a step (one
operator) or a join (chains of the same tensor, summed or concatenated). They are found by
series-parallel reduction: in execution order, an affine node swallows the chain of an input that
nobody else reads, and a join whose branches start at one tensor becomes one part: the next one of
that tensor's own chain, where nothing outside of the join reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import networkx as nx
from torch.fx import Node

from .arguments import Affine
from .call import SEVERAL
from .record import IDENTITY, Operator
from .view import View


@dataclass(frozen=True, slots=True)
class Step:
    """One operator; `node` is None for a coefficient that belongs to a join (`a - b`)."""

    node: Node | None
    op: Operator


@dataclass(frozen=True, slots=True)
class Join:
    """Branches of one tensor, summed or concatenated in order; `nodes` are the joining nodes."""

    kind: str
    node: Node
    branches: tuple[Chain, ...]
    spatial: int | None = None
    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True, slots=True)
class Chain:
    """`parts` applied in order to `source`; an empty chain is the identity."""

    source: Node
    parts: list[Step | Join]


def part_nodes(part: Step | Join) -> Iterator[Node]:
    """Every graph node below a part."""
    if isinstance(part, Step):
        if part.node is not None:
            yield part.node
        return
    yield from part.nodes
    for branch in part.branches:
        for inner in branch.parts:
            yield from part_nodes(inner)


def find(view: View) -> list[Chain]:
    """All maximal chains, in execution order of their last node."""
    chains: dict[Node, Chain] = {}
    swallowed: set[Node] = set()
    flow: nx.MultiDiGraph[Node] = nx.MultiDiGraph()
    for node, affine in view.affine.items():
        flow.add_node(node)
        flow.add_edges_from((source, node) for source, _ in affine.inputs)
    for node, affine in view.affine.items():
        private = [s in chains and _private(s, node, view, flow) for s, _ in affine.inputs]
        starts = [chains[s] if p else Chain(s, []) for (s, _), p in zip(affine.inputs, private, strict=True)]
        if affine.kind == "unary":
            chains[node] = Chain(starts[0].source, starts[0].parts)
            starts[0].parts.append(Step(node, affine.op))
        elif len({c.source for c in starts}) == 1:
            join, source = _join(node, affine, starts), starts[0].source
            chains[node] = Chain(source, [join])
            if source in chains and set(_readers(source, view)) <= set(part_nodes(join)):
                chains[node] = Chain(chains[source].source, [*chains[source].parts, join])
                swallowed.add(source)
        else:
            continue  # branches of different tensors: each ends here, and the join is opaque
        swallowed.update(s for (s, _), p in zip(affine.inputs, private, strict=True) if p)
    return [c for n, c in chains.items() if n not in swallowed]


def _join(node: Node, affine: Affine, starts: list[Chain]) -> Join:
    """The join of chains of one tensor; a sum inside a sum is one sum of all summands."""
    branches, nodes = list[Chain](), [node]
    for chain, (_, coefficient) in zip(starts, affine.inputs, strict=True):
        inner = chain.parts[0] if len(chain.parts) == 1 else None
        if isinstance(inner, Join) and inner.kind == affine.kind == "sum":
            group = inner.branches
            nodes.extend(inner.nodes)
        else:
            group = (chain,)
        scaled = [Step(None, _times(coefficient))] if coefficient != 1 else []
        branches.extend(Chain(c.source, [*c.parts, *scaled]) for c in group)
    return Join(affine.kind, node, tuple(branches), affine.spatial, tuple(nodes))


def _private(source: Node, reader: Node, view: View, flow: nx.MultiDiGraph[Node]) -> bool:
    """Whether `reader` is the only one to read `source`, and reads it once."""
    return flow.number_of_edges(source, reader) == 1 and _readers(source, view) == [reader]


def _readers(node: Node, view: View) -> list[Node]:
    """Who reads the data of `node`; pieces of a chunk or split are read where they are taken out."""
    readers = []
    for user in view.data_users(node):
        call = view.calls.get(user)
        readers += view.data_users(user) if call is not None and call.op in SEVERAL else [user]
    return readers


def _times(coefficient: float) -> Operator:
    consts = (("factor", coefficient), ("inverse", False), ("shift", 0), ("alpha", 1))
    return replace(IDENTITY, kind="scale", law="scale", consts=consts)
