"""Permutations of channels, each made one operation and moved along its route to the layer that takes it in.

    shuffle -> depthwise conv -> batch_norm -> relu -> 1x1 conv  =>  depthwise' -> batch_norm' -> relu -> shuffle -> 1x1

The captured graph is changed, before the plan, and computes the same after each move: the weights of what is passed
become expressions of the weights they were, w[[2, 0, 1]], which the planner's layers evaluate once.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from fxfuse.algebra.constants import Apply, Attr
from fxfuse.algebra.operator import Ints
from fxfuse.cost import CostFunction
from fxfuse.graph_edits import Edit, Editor, insert_check
from fxfuse.ops.index_lists import index_of
from fxfuse.ops.value_kinds import is_number
from fxfuse.pattern import Selection
from fxfuse.reading.movable.permutations import Indexed, Permutation, indexed, permutation_of
from fxfuse.reading.view import View
from fxfuse.rearranging.permutation_passing import Passed
from fxfuse.rearranging.permutation_routes import Route, Routes


def move_permutations(view: View, patterns: Selection, price: CostFunction) -> Iterator[Edit]:
    """Permutations to be moved to a layer further on that takes them."""
    routes = Routes(view, patterns, price)
    for permutation in filter(None, map(permutation_of, view.affine, view.affine.values())):
        route = routes.find(permutation)
        if isinstance(route, Route) and route.steps:
            ends = (permutation.source, *view.readers(permutation.last), *view.readers(route.steps[-1].node))
            nodes = frozenset((*permutation.nodes, *(s.node for s in route.steps), *ends))
            yield Edit(nodes, partial(_move, view, permutation, route))


def use_shuffles(view: View, patterns: Selection, price: CostFunction) -> Iterator[Edit]:
    """Shuffles to be written as one operation, which a layer before or after them can take."""
    routes = Routes(view, patterns, price)
    for shuffle in view.movable.shuffles:
        at = [view.effects.position[n] for n in shuffle.nodes]
        written = view.effects.written_between(shuffle.source, at[0], at[-1], shuffle.nodes)
        if written is None and isinstance(routes.find(shuffle), Route):
            yield Edit(frozenset((shuffle.source, *shuffle.nodes, *shuffle.last.users)), partial(_use, shuffle))


def _use(shuffle: Permutation, editor: Editor) -> None:
    nodes, last = shuffle.nodes, shuffle.last
    asked = [n for node in nodes for n in node.all_input_nodes if n not in nodes]
    new = editor.call(last, torch.channel_shuffle, (shuffle.source, shuffle.groups), last, last)
    editor.replace(last, new)
    for node in nodes[-2::-1]:
        editor.erase(node)
    _drop_unread(asked, editor)


def write_indices(view: View, patterns: Selection, price: CostFunction) -> Iterator[Edit]:
    """Selections by constant tensors of indices to be written as lists, which a layer takes."""
    routes = Routes(view, patterns, price)
    for found in indexed(view):
        if isinstance(routes.find(found.permutation), Route):
            old = found.permutation.last
            yield Edit(frozenset((found.permutation.source, old, *old.users)), partial(_write, view, found))


def _write(view: View, found: Indexed, editor: Editor) -> None:
    old, index = found.permutation.last, index_of(found.axis, found.entries)
    editor.replace(old, editor.call(old, operator.getitem, (found.permutation.source, index), old, old), view.constants)
    view.captured.held[found.const] = found.entries


def _drop_unread(sizes: list[Node], editor: Editor) -> None:
    """Erase those of these sizes, and of all that is computed of or with them, that nobody reads any more.

    `b, _, h, w = x.shape` takes out more than it reads. A size that is left would keep a value from fusing.
    """
    known, near, todo = dict[Node, bool](), set[Node](), sizes
    while todo:
        node = todo.pop()
        if node not in near and is_number(node, known):
            near.add(node)
            todo += [*node.users, *node.all_input_nodes]
    for node in sorted(near, reverse=True):
        if not node.users:
            editor.erase(node)


def _move(view: View, permutation: Permutation, route: Route, editor: Editor) -> None:
    (old,), last = permutation.nodes, route.steps[-1]
    reader = view.readers(last.node)[0]
    nodes = [_renumbered(view, step, editor) for step in route.steps]
    source = permutation.source if route.forward else nodes[0]
    for user in list(old.users):
        editor.rewire(user, old, source)
    value = nodes[-1] if route.forward else view.source(last.node)
    reader = reader if route.forward else nodes[-1]
    if last.reads == permutation.reads:
        new = editor.copy(reader, old, source, value)
    else:
        index = index_of(-permutation.spatial - 1, last.reads)
        new = editor.call(reader, operator.getitem, (value, index), old, value)
    ranks = [a.assumes for n in (old, *(s.node for s in route.steps)) if (a := view.affine.get(n)) is not None]
    insert_check(editor.graph, source, next((r for r in ranks if r is not None), None))
    editor.rewire(reader, value, new)
    editor.erase(old)


def _renumbered(view: View, step: Passed, editor: Editor) -> Node:
    """A node with the rows of its weights, where it has any, in another order."""
    node = step.node
    if step.rows is None:
        return node
    if node.op == "call_module":
        return _function(view, node, step.rows, editor)
    op = view.affine[node].op
    axis = -(op.spatial or 0) - 1 if op.law == "scale" else 0
    for argument in [n for n in node.all_input_nodes if _has_rows(view.constants.get(n), axis)]:
        index = index_of(axis, step.rows)
        editor.rewire(node, argument, editor.call(node, operator.getitem, (argument, index)))
    return node


def _has_rows(value: Any, axis: int) -> bool:
    """Whether a constant holds numbers of its own for each channel."""
    wide = isinstance(value, (Attr, Apply)) and len(value.shape) > (axis if axis >= 0 else -1 - axis)
    return wide and value.shape[axis] > 1


def _function(view: View, node: Node, rows: Ints, editor: Editor) -> Node:
    """The layer that a module call is, as a function of permuted weights."""
    call = view.calls[node]

    def row(name: str) -> Node | None:
        held = call.args[name]
        if held is None:
            return None
        return editor.call(node, operator.getitem, (editor.attribute(node, held.path), index_of(0, rows)))

    if call.op == "conv":
        function, names = getattr(F, f"conv{call.spatial}d"), ["weight", "bias"]
        rest = [call.args[n] for n in ("stride", "padding", "dilation", "groups")]
    else:
        function, names = F.batch_norm, ["running_mean", "running_var", "weight", "bias"]
        rest = [False, 0.0, call.args["eps"]]
    new = editor.call(node, function, (node.all_input_nodes[0], *map(row, names), *rest), node, node)
    fact = view.facts[node].sure or view.facts[node]
    if fact.rank is not None:  # a batch norm module settles the rank of what it reads, the function does not
        editor.sized(new, [fact.axes.get(a) for a in range(-fact.rank, 0)])
    editor.replace(node, new)
    return new
