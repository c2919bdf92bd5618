"""The only hands on a captured graph: passes say what to change, an `Editor` changes it and notes what is known.

What changes a graph must not go on reading a view of what the graph was: its nodes may be gone. So a pass finds all
its edits first, and of those that share a node only the first is made. The others are found anew, in a new view.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from fxfuse.capture.captured import KNOWN, Captured

RANK = "fxfuse took the input here for a batch of {0} dims; optimize with example_inputs of the rank you use"
WIDTH = "fxfuse took the input here for a batch of {0} channels; optimize with example_inputs of the channels you use"


class Edit(NamedTuple):
    """One change: every node that it reads, changes or removes, what makes it, and what the report is told of it."""

    nodes: frozenset[Node]
    make: Callable[[Editor], object]
    told: Any = None


def make_disjoint(captured: Captured, edits: Iterable[Edit]) -> list[Edit]:
    """Make those edits that share no node with one made before; returns them, none only where there were none."""
    made, touched, editor = list[Edit](), set[Node](), Editor(captured)
    for edit in list(edits):  # all of them found before the first is made
        if touched.isdisjoint(edit.nodes):
            touched |= edit.nodes
            edit.make(editor)
            made.append(edit)
    return made


class Editor:
    """Changes one graph. A new node is told whose work it does (`old`) and whose shape it has (`like`)."""

    def __init__(self, captured: Captured) -> None:
        self.captured, self.graph = captured, captured.graph

    def call(
        self, before: Node, target: Any, args: Sequence[Any], old: Node | None = None, like: Node | None = None
    ) -> Node:
        """A call of a function, or of a method by its name, right before a node."""
        with self.graph.inserting_before(before):
            how = "call_method" if isinstance(target, str) else "call_function"
            return self._noted(self.graph.create_node(how, target, tuple(args)), old, like)

    def copy(self, before: Node, old: Node, source: Node, value: Node) -> Node:
        """The call `old` once more, right before a node, on `value` where it reads `source`, whose shape it has."""
        with self.graph.inserting_before(before):
            return self._noted(self.graph.node_copy(old, lambda n: value if n is source else n), old, value)

    def attribute(self, before: Node, path: str) -> Node:
        """A parameter or buffer, read right before a node."""
        with self.graph.inserting_before(before):
            return self.graph.create_node("get_attr", path)

    def _noted(self, new: Node, old: Node | None, like: Node | None) -> Node:
        new.meta = {} if old is None else provenance(old)
        if like is not None:
            self.same_shape(new, like)
        return new

    def same_shape(self, node: Node, like: Node) -> None:
        """Note that one node has the shape and dtype of another."""
        shapes = self.captured.shapes
        for table in (shapes, shapes.dtypes):
            if like in table:
                table[node] = table[like]  # type: ignore[assignment]
        if KNOWN in like.meta:
            node.meta[KNOWN] = like.meta[KNOWN]

    def sized(self, node: Node, sizes: Sequence[int | None]) -> None:
        """Note the sizes that a node has for every input, None where they vary, unless more is noted."""
        node.meta.setdefault(KNOWN, (tuple(sizes), None))

    def resize(self, node: Node, axis: int, size: int) -> None:
        """Note that a node has another size along an axis, counted from the end."""
        shapes = self.captured.shapes
        if node in shapes:
            shapes[node] = torch.Size((*shapes[node][:axis], size, *shapes[node][axis:][1:]))
        if KNOWN in node.meta:
            sizes, dtype = node.meta[KNOWN]
            node.meta[KNOWN] = ((*sizes[:axis], size, *sizes[axis:][1:]), dtype)

    def rewire(self, reader: Node, old: Node, new: Node) -> None:
        """Let a node read another one."""
        reader.replace_input_with(old, new)

    def set_arguments(self, node: Node, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        node.args, node.kwargs = tuple(args), kwargs

    def set_argument(self, node: Node, position: int, name: str, value: Node) -> None:
        """Give a call an argument, at its position where there is one and by its name otherwise."""
        if len(node.args) > position:
            node.update_arg(position, value)
        else:
            node.update_kwarg(name, value)

    def move(self, node: Node, before: Node) -> None:
        before.prepend(node)

    def replace(self, old: Node, new: Node, constants: Container[Node] = ()) -> None:
        """Let everybody read `new`, and erase `old` with those `constants` that it alone read."""
        old.replace_all_uses_with(new)
        self.erase(old, constants)

    def erase(self, node: Node, constants: Container[Node] = ()) -> None:
        """Erase a node, and those `constants` that it alone read: a state dict would go on to offer them."""
        inputs = node.all_input_nodes
        self.graph.erase_node(node)
        for source in inputs:
            if not source.users and source in constants:
                self.erase(source, constants)


def provenance(node: Node) -> dict[str, Any]:
    """Of the metadata of a node, what one that stands for it gets too."""
    return {k: node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in node.meta}


def insert_check(graph: Graph, source: Node, size: int | None, axis: int | None = None) -> None:
    """Check when the model runs what was taken for granted: the rank of a tensor, or its size along an axis."""
    if size is None:
        return
    message = (RANK if axis is None else WIDTH).format(size)
    asked = ("dim", (source,)) if axis is None else ("size", (source, axis))
    with graph.inserting_before(source.next):
        right = graph.call_function(operator.eq, (graph.call_method(*asked), size))
        graph.call_function(torch._assert, (right, message))
