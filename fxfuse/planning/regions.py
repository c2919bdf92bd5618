"""Regions: maximal single-entry single-exit affine subgraphs, as series-parallel trees.

A chain is a list of parts applied one after the other to one tensor; a part is a step (one
operator) or a join (chains of the same tensor, summed or concatenated). They are found by
series-parallel reduction: in execution order, an affine node swallows the chain of an input that
nobody else reads, and a join whose branches start at one tensor becomes one part: the next one of
that tensor's own chain, where nothing outside of the join reads it.
"""

from __future__ import annotations

from collections import Counter
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
    parts: list[Step | Join]


def part_nodes(part: Step | Join) -> Iterator[Node]:
    """Every graph node below a part."""
    if isinstance(part, Step):
        yield from part.others
        if part.node is not None:
            yield part.node
        return
    yield from part.nodes
    for branch in part.branches:
        for inner in branch.parts:
            yield from part_nodes(inner)


def first_spatial(part: Step | Join) -> int | None:
    """On how many spatial dims the first layer in a part works; None where there is none."""
    return next((s.op.spatial for s in steps_of(part) if s.op.weighted), None)


def steps_of(part: Step | Join) -> Iterator[Step]:
    """Every step below a part, branch by branch."""
    if isinstance(part, Step):
        yield part
    else:
        for inner in (p for b in part.branches for p in b.parts):
            yield from steps_of(inner)


def exit_of(parts: Iterable[Step | Join]) -> Node:
    """The node whose value the last of `parts` gives: one that has not moved."""
    return [p.node for p in parts if p.node is not None and not (isinstance(p, Step) and p.moved)][-1]


def find(view: View, shared: frozenset[Node] = frozenset(), split: frozenset[Node] = frozenset()) -> list[Chain]:
    """All maximal chains, in execution order of their last node.

    Each layer after `shared` factors (roots of `Movable.trees`) has a copy of them in its own chain, and each
    branch of the join before `split` ones (of `Movable.split`) its share.
    """
    split_factors = [view.movable.split[first] for first in split]
    gone = {factor: view.affine[d.factors[0]].inputs[0][0] for d in split_factors for factor in d.factors}
    shares, ahead = dict[Node, list[Step]](), dict[Node, list[Step]]()
    for d in split_factors:
        for end, ops in d.shares.items():
            steps = [Step(n, op, moved=True) for n, op in zip(d.factors, ops, strict=True)]
            (ahead if d.before else shares).setdefault(end, []).extend(steps)
    copied = {n for root in shared for n in view.movable.trees[root]}
    chains, swallowed = dict[Node, Chain](), set[Node]()
    for node, affine in view.affine.items():
        times = Counter(source for source, _ in affine.inputs)
        private = [s in chains and times[s] == 1 and view.readers(s) == [node] for s, _ in affine.inputs]
        starts = [chains[s] if p else Chain(s, []) for (s, _), p in zip(affine.inputs, private, strict=True)]
        if node in gone:
            if gone[node] in chains:
                chains[node] = chains[gone[node]]
                swallowed.add(affine.inputs[0][0])
            continue
        if node in shared or affine.inputs[0][0] in copied:
            before = Chain(affine.inputs[0][0], []) if node in shared else chains[affine.inputs[0][0]]
            chains[node] = Chain(before.source, [*before.parts, Step(node, affine.op), *shares.get(node, [])])
            swallowed.update({node} & copied)
            continue
        if affine.kind == "unary":
            chains[node] = Chain(starts[0].source, starts[0].parts)
            starts[0].parts.extend([] if starts[0].parts else ahead.get(node, []))
            starts[0].parts.extend((Step(node, affine.op), *shares.get(node, [])))
        elif len({c.source for c in starts}) == 1:
            join, source = _join(node, affine, starts, view), starts[0].source
            chains[node] = Chain(source, [join])
            if source in chains and set(view.readers(source)) <= set(part_nodes(join)):
                chains[node] = Chain(chains[source].source, [*chains[source].parts, join])
                swallowed.add(source)
            chains[node].parts.extend(shares.get(node, []))
        else:
            continue  # branches of different tensors: each ends here, and the join is opaque
        swallowed.update(s for (s, _), p in zip(affine.inputs, private, strict=True) if p)
    return [c for n, c in chains.items() if n not in swallowed]


def _join(node: Node, affine: Affine, starts: list[Chain], view: View) -> Join:
    """The join of chains of one tensor; a sum inside a sum is one sum of all summands."""
    branches, nodes = list[Chain](), [node]
    for chain, (_, coefficient) in zip(starts, affine.inputs, strict=True):
        inner = chain.parts[0] if len(chain.parts) == 1 else None
        if isinstance(inner, Join) and inner.kind == affine.kind == "sum" and inner.node not in view.sized:
            group = inner.branches
            nodes.extend(inner.nodes)
        else:
            group = (chain,)
        scaled = [Step(None, _times(coefficient))] if coefficient != 1 else []
        branches.extend(Chain(c.source, [*c.parts, *scaled]) for c in group)
    return Join(affine.kind, node, tuple(branches), affine.spatial, tuple(nodes))


def _times(coefficient: float) -> Operator:
    consts = (("factor", coefficient), ("inverse", False), ("shift", 0), ("alpha", 1))
    return replace(IDENTITY, kind="scale", law="scale", consts=consts)
