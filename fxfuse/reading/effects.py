"""Who writes what in place, and who may share memory with whom.

Two values that may share storage are in one class. A write is harmless when every later reader
of its class goes through the writer's own result (`x = relu_(x)`); the class of any other write
is pinned: its members are read at the very place where the model reads them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

from networkx.utils import UnionFind
from torch import Tensor, nn
from torch.fx import Graph, Node

from fxfuse.names import plain, torch_name
from fxfuse.ops import memory
from fxfuse.ops.call import PIECES, Call
from fxfuse.ops.memory import storage
from fxfuse.ops.value_kinds import asks

_BY_STRIDES = ("flatten", "reshape", "reshape_as", "contiguous")  # a view or a copy, as the strides allow
_OVERLAPPING = ("unfold", "as_strided")  # views that hold one number at several places
_SPREADING = {*_OVERLAPPING, "expand", "expand_as", "broadcast_to"}

Piece = tuple[Node, int]  # what splits a tensor, and the number of one of its results


class Effects:
    """Alias classes and writes of one graph. Positions count nodes in execution order."""

    def __init__(self, graph: Graph, calls: Mapping[Node, Call], modules: Mapping[str, nn.Module]) -> None:
        self.position = {n: i for i, n in enumerate(graph.nodes)}
        self.last_use = {n: max((self.position[u] for u in n.users), default=-1) for n in graph.nodes}
        self.classes: UnionFind[Node] = UnionFind()
        self.writes: dict[Node, list[Node]] = {}
        self._modules = modules
        self.replayed: list[tuple[Node, ...]] = []
        self._own_writes: list[Tensor] = []
        for node in graph.nodes:
            if node.op == "call_module":
                self._own_writes += memory.own_writes(modules[str(node.target)])
            targets = memory.written(node, calls.get(node), modules)
            if targets:
                self.writes[node] = targets
            for source in (*targets, *memory.shared(node, targets, calls.get(node), modules)):
                self.classes.union(node, source)
        self._members: dict[Node, list[Node]] = {}
        for node in graph.nodes if self.writes else ():
            self._members.setdefault(self.classes[node], []).append(node)

    def replay(self, nodes: tuple[Node, ...], writers: Iterable[Node]) -> None:
        """Leave out the writes to one tensor which have become part of a constant, with all else among `nodes`."""
        self.replayed.append(nodes)
        self.forget(writers)

    def forget(self, nodes: Iterable[Node]) -> None:
        """Leave these writers out: the view has read them as something that is no write."""
        for node in nodes:
            self.writes.pop(node, None)

    def written_attributes(self) -> set[str]:
        """Paths of parameters and buffers that the forward itself may change, each by all its names."""
        if not self.writes and not self._own_writes:
            return set()
        paths = {str(n.target) for n in self.written() if n.op == "get_attr"}
        root = self._modules[""]
        state = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
        written = {storage(t) for p, t in state if p in paths} | {storage(t) for t in self._own_writes}
        return paths | {p for p, t in state if storage(t) in written}

    def written(self) -> set[Node]:
        """Every value that the forward may change in place, or through a view of it."""
        roots = {self.classes[t] for targets in self.writes.values() for t in targets}
        return {m for root in roots for m in self._members[root]}

    def private_write(self, writer: Node) -> bool:
        """Whether nothing but the writer's result can see that `writer` wrote."""
        return all(self.private(target, writer) for target in self.writes.get(writer, ()))

    def private(self, value: Node, writer: Node) -> bool:
        """Whether nothing but the writer's result could see that `writer` wrote the memory of `value`."""
        at, members = self.position[writer], self._members[self.classes[value]]
        if any(plain(m.target) in _OVERLAPPING or m.op in ("placeholder", "get_attr") for m in members):
            return False  # what is written to one place may be read at another
        return not any(self.position[m] < at and self.last_use[m] > at for m in members)

    def by_strides(self) -> Node | None:
        """An operator that writes, of which it depends on the strides of a computed tensor what is read after it."""
        for writer, targets in self.writes.items():
            if writer.op == "call_module" and not getattr(self._modules[str(writer.target)], "inplace", False):
                continue  # it may write, for all that is known
            at = self.position[writer]
            for target in targets:
                members = self._members[self.classes[target]]
                for member in (m for m in members if self.position[m] < at and self._by_strides(m)):
                    behind = {member}  # what may lie in a memory of its own
                    for other in members:
                        behind |= {other} if not behind.isdisjoint(other.all_input_nodes) else set()
                    apart = [m for m in members if (m in behind) != (target in behind) and m is not writer]
                    if any(self.position[u] > at and not asks(u) for m in apart for u in m.users):
                        return writer
        return None

    def _by_strides(self, node: Node) -> bool:
        if node.all_input_nodes[:1] and node.all_input_nodes[0].op == "placeholder":
            return False  # its strides are the caller's
        if node.op == "call_module":
            return isinstance(self._modules[str(node.target)], (nn.Flatten, nn.Unflatten))
        return plain(node.target) in _BY_STRIDES

    def writers(self, value: Node) -> list[Node]:
        """The nodes that may write `value` or something that shares its memory: all are in its class."""
        return [m for m in self._members[self.classes[value]] if m in self.writes] if self.writes else []

    def writes_itself(self, value: Node) -> Node | None:
        """A node that writes `value`, or a view of it, and reads the same memory by another name."""
        root = self.classes[value]
        for writer, targets in self.writes.items():
            readings = sum(self.classes[n] == root for n in writer.all_input_nodes)
            if readings > 1 and any(self.classes[t] == root for t in targets):
                return writer
        return None

    def written_between(self, value: Node, start: int, stop: int, inside: Iterable[Node]) -> Node | None:
        """A node after `start` and before `stop`, not in `inside`, that may write what `inside` reads of `value`."""
        own = set(inside)
        between = (w for w in self.writers(value) if w not in own and start < self.position[w] < stop)
        return next((w for w in between if not self._writes_other_pieces(w, own)), None)

    def _writes_other_pieces(self, writer: Node, readers: set[Node]) -> bool:
        """Whether a writer only writes pieces of a split tensor of which `readers` read others."""
        root = self.classes[self.writes[writer][0]]
        read = set[Piece | None]()
        for node in readers:
            for source in (i for i in node.all_input_nodes if self.classes[i] == root):
                if torch_name(source) in PIECES:
                    read.add(_piece(node))
                elif source not in readers and torch_name(node) not in PIECES:
                    read.add(self._piece_of(source))
        written = {self._piece_of(target) for target in self.writes[writer]}
        pieces = [p for p in read | written if p is not None]
        if None in read | written or len({split for split, _ in pieces}) != 1 or not read.isdisjoint(written):
            return False
        members = self._members[root]
        given = any(m.op in ("placeholder", "get_attr") for m in members)  # perhaps channels that are one in memory
        wide = _wide(pieces[0][0], last=max(pieces, key=lambda p: p[1]) in written)
        return (wide or not given) and not any(plain(m.target) in _SPREADING for m in members)

    def _piece_of(self, value: Node) -> Piece | None:
        """The piece of a split tensor that `value` is a view of."""
        root = self.classes[value]
        while (piece := _piece(value)) is None:
            sources = [i for i in value.all_input_nodes if self.classes[i] == root]
            if len(sources) != 1:
                return None
            (value,) = sources
        return piece


def _piece(node: Node) -> Piece | None:
    """(split, number), if a node takes one of the pieces that a tensor was split into."""
    source = node.args[0] if node.target is operator.getitem else None
    index = node.args[1] if len(node.args) > 1 else None
    taken = isinstance(source, Node) and torch_name(source) in PIECES and isinstance(index, int) and index >= 0
    return (source, index) if taken else None  # type: ignore[return-value]


def _wide(split: Node, last: bool) -> bool:
    """Whether pieces certainly have several entries, so that PyTorch refuses to write those that are one in memory.

    With `last` that is asked of the last piece too, which is smaller where one size is given for all.
    """
    sizes = split.args[1] if len(split.args) > 1 and torch_name(split) != "chunk" else None
    if isinstance(sizes, int):
        return sizes > 1 and not last
    return isinstance(sizes, (list, tuple)) and all(isinstance(s, int) and s > 1 for s in sizes)
