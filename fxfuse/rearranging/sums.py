"""(y + f(x)) + g(x)  =>  y + (f(x) + g(x))      branches of one tensor beside each other, where they become one layer

Addition may be grouped in any way. A sum written as `shortcut(y) + conv3x3(x) + conv1x1(x)` joins the shortcut to
the first branch before the second one comes; regrouped, the two branches are a sum of their own, which the planner
merges like any other. A sum stays as it is written where no two of its branches could be one layer.

The captured graph is changed, before the plan.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Set
from fractions import Fraction
from functools import partial, reduce
from typing import NamedTuple

from torch.fx import Node

from fxfuse.algebra import combine
from fxfuse.algebra.operator import IDENTITY, Operator
from fxfuse.cost import CostFunction
from fxfuse.graph_edits import Edit, Editor
from fxfuse.pattern import Selection
from fxfuse.reading.view import View
from fxfuse.refusal import Refusal

LARGEST = 128  # summands of a group: each is an operator inside the next one


class _Tree(NamedTuple):
    """Sums that end in `root`: the inner ones, read by the next alone, and what is summed, in order.

    `known` are the groups of summands, by number, that are a sum of their own already.
    """

    root: Node
    inner: tuple[Node, ...]
    leaves: tuple[Node, ...]
    known: Set[frozenset[int]]


def regroup(view: View, patterns: Selection, price: CostFunction) -> Iterator[Edit]:
    """Sums of several tensors to be regrouped, as branches of one can merge."""
    for root in (n for n, a in view.affine.items() if a.kind == "sum"):
        tree = _tree(view, root)
        groups = [] if tree is None else _groups(view, tree, patterns, price)
        if tree is not None and any(len(g) > 1 and frozenset(g) not in tree.known for g in groups):
            touched = frozenset((root, *tree.inner, *tree.leaves, *root.users))
            yield Edit(touched, partial(_rewrite, tree, groups))


def _tree(view: View, root: Node) -> _Tree | None:
    """The sum that ends in a node; None if it is a part of another, or if somebody could see another order."""
    if not _plain(view, root) or (len(root.users) == 1 and _plain(view, next(iter(root.users)))):
        return None
    leaves, inner, todo = list[Node](), list[Node](), [root]
    spans = dict[Node, list[int]]()
    while todo:
        node = todo.pop()
        if node is not root and (not _plain(view, node) or len(node.users) > 1):
            leaves.append(node)
            continue
        if node in spans:  # all of it has been seen
            spans[node].append(len(leaves))
            continue
        spans[node] = [len(leaves)]
        inner.append(node)
        todo += [node, *(source for source, _ in reversed(view.affine[node].inputs))]
    if len(set(leaves)) < max(3, len(leaves)) or any(view.effects.writers(n) for n in (*leaves, *inner)):
        return None  # what is written in place stays where it is
    return _Tree(root, tuple(inner[1:]), tuple(leaves), {frozenset(range(*span)) for span in spans.values()})


def _plain(view: View, node: Node) -> bool:
    affine = view.affine.get(node)
    if affine is None or affine.kind != "sum" or affine.assumes is not None or affine.width is not None:
        return False
    once = len({source for source, _ in affine.inputs}) == len(affine.inputs)  # not a tensor and itself
    return once and not affine.extra and all(coefficient == 1 for _, coefficient in affine.inputs)


def _groups(view: View, tree: _Tree, patterns: Selection, price: CostFunction) -> list[list[int]]:
    """The summands by number, those together that can be one layer that costs no more than they do."""
    groups = list[tuple[list[int], Node, Operator]]()
    for number, leaf in enumerate(tree.leaves):
        source, op = _branch(view, leaf, patterns)
        for at, (group, other, whole) in enumerate(groups):
            fits = other is source and len(group) < LARGEST
            if fits and (both := _one(patterns, price, whole, op)) is not None:
                groups[at] = ([*group, number], source, both)
                break
        else:
            groups.append(([number], source, op))
    return [group for group, _, _ in groups]


def _branch(view: View, leaf: Node, patterns: Selection) -> tuple[Node, Operator]:
    """The tensor that a summand is computed of by one operator, and that operator."""
    op, source = IDENTITY, leaf
    for node, step in view.before(leaf, view.readers(leaf)[0]):
        if node in view.sized or node in view.effects.writes:
            break
        both = step.op if op is IDENTITY else patterns.combine("chain", step.op, op)
        if isinstance(both, Refusal):
            break
        op, source = both, step.inputs[0][0]
    return source, op


def _one(patterns: Selection, price: CostFunction, f: Operator, g: Operator) -> Operator | None:
    if not (f.weighted or g.weighted):
        return None
    first, second = (f, g) if f.weighted else (g, f)
    both = patterns.combine("sum", first, second)
    if isinstance(both, Refusal) or isinstance(combine.finish(both), Refusal):
        return None
    apart = sum((Fraction(price(o, Fraction(1))) for o in (f, g) if o.kind != "identity"), Fraction(0))
    return both if price(both, Fraction(1)) <= apart else None


def _rewrite(tree: _Tree, groups: list[list[int]], editor: Editor) -> None:
    def add(a: Node, b: Node, like: Node | None = None) -> Node:
        return editor.call(tree.root, operator.add, (a, b), tree.root, like)

    leaves = ([tree.leaves[i] for i in group] for group in groups)
    parts = [reduce(lambda a, b: add(a, b, like=a), group) for group in leaves]  # one layer gives one shape
    whole = reduce(add, parts)  # what else is summed may be of another
    editor.same_shape(whole, like=tree.root)
    editor.replace(tree.root, whole)
    for node in tree.inner:
        editor.erase(node)
