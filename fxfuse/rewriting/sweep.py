"""What is left of a graph where layers stand: numbers written in, readers redirected, all erased that nobody reads."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch.fx import Node, map_arg

from fxfuse.names import is_aten
from fxfuse.ops import schema
from fxfuse.ops.call import SEVERAL
from fxfuse.ops.purity import makes, superfluous
from fxfuse.ops.value_kinds import is_number, rank_check, shape_reader
from fxfuse.planning.sites import Fuse
from fxfuse.reading.view import View


def write_numbers(constants: Mapping[Node, Any]) -> set[Node]:
    """Replace every constant integer and float among the arguments of what is no constant; what nobody reads now.

    `pad_same(x, self.weight.shape[-2:])` keeps a weight alive for the sake of its size, long after the convolution
    it belongs to has become another one; with the number itself in the graph nobody holds the weight any more.
    """
    numbers, unread = {n: v for n, v in constants.items() if type(v) in (int, float)}, set[Node]()
    for user in {u for n in numbers for u in n.users if u not in constants}:
        user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda n: numbers.get(n, n))
    for node in reversed(numbers):
        unread |= {node} if unread.issuperset(node.users) else set()
    return unread


def redirect_readers(emitted: Mapping[Node, tuple[Fuse, Node]], current: Callable[[Node], Node]) -> None:
    """Let those that ask a vanishing tensor for its rank or dtype ask what the layer reads instead.

    `emitted` are the calls of the layers, each with what it reads.
    """
    for fuse, source in emitted.values():
        while (source := current(source)) in emitted:
            source = emitted[source][1]  # a layer keeps both
        for node in fuse.nodes:
            for user in list(node.users):
                if shape_reader(user) in ("rank", "dtype"):
                    user.replace_input_with(node, source)


def sweep(view: View, condemned: set[Node]) -> None:
    """Erase those `condemned` nodes that nobody reads, and what nobody reads because of it.

    That includes writes to a tensor of the forward's own, where all that read it read a constant now.
    """
    graph, asserted = view.captured.graph, set[Any]()
    last = {nodes[-1]: nodes for nodes in view.effects.replayed}
    for node in graph.nodes:  # one check of a rank per tensor is enough
        if (key := rank_check(node)) is not None:
            condemned |= {node} if key in asserted else set()
            asserted.add(key)
    for node in reversed(list(graph.nodes)):
        own = last.get(node, ())
        if all(set(n.users) <= set(own) for n in own):
            condemned.update(own)
        if not node.users and (node in condemned or shape_reader(node)):
            inputs = node.all_input_nodes
            graph.erase_node(node)
            condemned.update(n for n in inputs if not n.users and _pure(n, view))


def _pure(node: Node, view: View) -> bool:
    if node.op == "get_attr" or node in view.constants or shape_reader(node):
        return True
    call = view.calls.get(node)
    gives = (call is not None and call.op in {*SEVERAL, "getitem"}) or makes(node) or superfluous(node)
    pure = gives and node not in view.effects.writes
    return pure or node.target is operator.eq or is_number(node) or (is_aten(node) and schema.pure(node))
