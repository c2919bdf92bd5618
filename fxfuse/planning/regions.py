"""Regions: maximal single-entry single-exit affine subgraphs, as series-parallel trees.

A chain is a list of parts applied one after the other to one tensor; a part is a step (one
operator) or a join (chains of the same tensor, summed or concatenated). They are found by
series-parallel reduction: in execution order, an affine node swallows the chain of an input that
nobody else reads, and a join whose branches start at one tensor becomes one part: the next one of
that tensor's own chain, where nothing outside of the join reads it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch.fx import Node

from fxfuse.algebra.operator import IDENTITY, Operator
from fxfuse.reading.affine import Affine
from fxfuse.reading.view import View


@dataclass(frozen=True, slots=True)
class Step:
    """One operator; `node` is None for a coefficient that belongs to a join (`a - b`).

    A `moved` step acts at another place than its node, see `factor_orders`; there the values are to be `contiguous`, as
    it gave them. `others` go with the node.
    """

    node: Node | None
    op: Operator
    moved: bool = False
    contiguous: bool = False
    others: tuple[Node, ...] = ()


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
    parts: list[Part]


Part = Step | Join


def nodes_of(*parts: Part) -> Iterator[Node]:
    """Every graph node below some parts."""
    for part in parts:
        if isinstance(part, Join):
            yield from part.nodes
            for branch in part.branches:
                yield from nodes_of(*branch.parts)
        else:
            yield from (n for n in (*part.others, part.node) if n is not None)


def steps_of(*parts: Part) -> Iterator[Step]:
    """Every step below some parts, branch by branch."""
    for part in parts:
        if isinstance(part, Step):
            yield part
        else:
            for branch in part.branches:
                yield from steps_of(*branch.parts)


def exit_of(parts: Iterable[Part]) -> Node:
    """The node whose value the last of `parts` gives: one that has not moved."""
    return [p.node for p in parts if p.node is not None and not (isinstance(p, Step) and p.moved)][-1]


def find(view: View, shared: frozenset[Node] = frozenset(), split: frozenset[Node] = frozenset()) -> list[Chain]:
    """All maximal chains, in execution order of their last node.

    Each layer after `shared` factors (roots of `Movable.trees`) has a copy of them in its own chain, and each
    branch of the join before `split` ones (of `Movable.split`) its share.
    """
    split_factors = [view.movable.split[first] for first in split]
    gone = {factor: view.affine[d.factors[0]].inputs[0][0] for d in split_factors for factor in d.factors}
    shares, ahead = defaultdict[Node, list[Step]](list), defaultdict[Node, list[Step]](list)
    for d in split_factors:
        for end, ops in d.shares.items():
            steps = (Step(n, op, moved=True) for n, op in zip(d.factors, ops, strict=True))
            (ahead if d.before else shares)[end].extend(steps)
    copied = {n for root in shared for n in view.movable.trees[root]}
    chains, swallowed = dict[Node, Chain](), set[Node]()
    for node, affine in view.affine.items():
        source, times = affine.inputs[0][0], Counter(s for s, _ in affine.inputs)
        if node in gone:
            if gone[node] in chains:
                chains[node] = chains[gone[node]]
                swallowed.add(source)
            continue
        if node in shared or source in copied:
            before = Chain(source, []) if node in shared else chains[source]
            chains[node] = Chain(before.source, [*before.parts, Step(node, affine.op), *shares[node]])
            swallowed.update({node} & copied)
            continue
        private = {s for s, count in times.items() if s in chains and count == 1 and view.readers(s) == [node]}
        starts = [chains[s] if s in private else Chain(s, []) for s, _ in affine.inputs]
        if affine.kind == "unary":
            chains[node] = starts[0]
            first = [] if starts[0].parts else ahead[node]
            starts[0].parts.extend((*first, Step(node, affine.op), *shares[node]))
        elif len({c.source for c in starts}) == 1:
            join, source = _join(node, affine, starts, view), starts[0].source
            before = Chain(source, [])
            if source in chains and set(view.readers(source)) <= set(nodes_of(join)):
                before = chains[source]
                swallowed.add(source)
            chains[node] = Chain(before.source, [*before.parts, join, *shares[node]])
        else:
            continue  # branches of different tensors: each ends here, and the join is opaque
        swallowed |= private
    return [c for n, c in chains.items() if n not in swallowed]


def _join(node: Node, affine: Affine, starts: list[Chain], view: View) -> Join:
    """The join of chains of one tensor; a sum inside a sum is one sum of all summands."""
    branches, nodes = list[Chain](), [node]
    for chain, (_, coefficient) in zip(starts, affine.inputs, strict=True):
        inner, group = chain.parts[0] if len(chain.parts) == 1 else None, tuple[Chain, ...]((chain,))
        if isinstance(inner, Join) and inner.kind == affine.kind == "sum" and inner.node not in view.sized:
            group = inner.branches
            nodes.extend(inner.nodes)
        consts = (("factor", coefficient), ("inverse", False), ("shift", 0), ("alpha", 1))
        times = Step(None, replace(IDENTITY, kind="scale", law="scale", consts=consts))
        scaled = [times] if coefficient != 1 else []
        branches.extend(Chain(c.source, [*c.parts, *scaled]) for c in group)
    return Join(affine.kind, node, tuple(branches), affine.spatial, tuple(nodes))
