"""Sizes as products of unknowns: what makes it certain that a reshape keeps an axis as it is.

Two axes are equal when the same product stands for both, for every input: `b, c, h, w = x.shape` and later
`y.view(b, c, -1)` speak of the same unknowns. Shapes are given where the rank is certain.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

from torch.fx import Graph, Node

from fxfuse.facts.fact import Facts
from fxfuse.facts.infer import shape_call
from fxfuse.names import plain
from fxfuse.ops.call import Call, Calls
from fxfuse.ops.index_lists import fixed, pick
from fxfuse.ops.modules import Modules
from fxfuse.ops.movement import ints_of
from fxfuse.ops.value_kinds import SIZE, asks

LONG = 8  # unknowns in one product
_SAME = {"batch_norm", "dropout", "identity", "neg", "channel_shuffle", "flip", "same", "cast", "layer_norm"}


class Size(NamedTuple):
    """`factor` times the product of `unknowns` (sorted, repeats allowed)."""

    factor: int
    unknowns: tuple[str, ...] = ()

    def __mul__(self, other: Any) -> Size:
        return Size(self.factor * other.factor, tuple(sorted((*self.unknowns, *other.unknowns))))

    def over(self, other: Size) -> Size | None:
        """The quotient where it is a product too. Nobody divides by a size that is 0."""
        left = list(self.unknowns)
        for name in other.unknowns:
            if name not in left:
                return None
            left.remove(name)
        whole = other.factor and self.factor % other.factor == 0
        return Size(self.factor // other.factor, tuple(left)) if whole else None


Shape = tuple[Size, ...]
ONE = Size(1)


def product(sizes: Sequence[Size]) -> Size:
    return reduce(operator.mul, sizes, ONE)


def kept_axes(before: Shape, after: Shape) -> dict[int, int]:
    """Axes of `after` that are axes of `before`, counted from the end: a reshape leaves each as it is.

    An element's index along an axis is (place // product of the sizes behind) % size, and its place in row-major
    order stays; equal products in front are as good, for the products of all sizes are equal.
    """
    olds, news = _places(before), _places(after)
    kept = {}
    for o, (size, front, back) in enumerate(news):
        for i, (old, before_it, behind_it) in enumerate(olds):
            if old == size and (before_it == front or behind_it == back):
                kept[o - len(after)] = i - len(before)
                break
    return kept


def _places(shape: Shape) -> list[tuple[Size, Size, Size]]:
    """Each size with the products of those in front of it and behind it."""
    return [(s, product(shape[:i]), product(shape[i + 1 :])) for i, s in enumerate(shape)]


class Dims:
    """Shapes of tensors and values of sizes, in one pass over the graph."""

    def __init__(self, graph: Graph, calls: Calls, shapings: Calls, facts: Facts, modules: Modules) -> None:
        self.facts = facts
        self.shapes: dict[Node, Shape] = {}
        self.values: dict[Node, Any] = {}
        self.names: dict[Any, str] = {}  # short names of long products, and of quotients by (size, divisor)
        asking = dict[Node, bool]()
        for node in graph.nodes:
            if asks(node, asking):
                self.values[node] = self._asked(node)
            elif (rank := (facts[node].sure or facts[node]).rank) is not None:
                call = shape_call(node, calls, shapings, modules)
                shape = self._shape(node, call, rank) if call is not None else None
                self.shapes[node] = self.filled(node, shape, rank)

    def filled(self, node: Node, shape: Sequence[Size | None] | None, rank: int) -> Shape:
        """`shape` with numbers where they are certain, and unknowns of the node's own for what is None."""
        axes = (self.facts[node].sure or self.facts[node]).axes
        if shape is None or len(shape) != rank:
            shape = (None,) * rank
        numbers = [Size(axes[i - rank]) if i - rank in axes else s for i, s in enumerate(shape)]
        return tuple(Size(1, (f"{node.name}.{i}",)) if s is None else self._short(s) for i, s in enumerate(numbers))

    def _short(self, size: Size) -> Size:
        """A long product under one name, or products of products would grow without end."""
        if len(size.unknowns) <= LONG:
            return size
        return Size(1, (self.names.setdefault(size, f"size {len(self.names)}"),))

    def of(self, node: Any) -> Shape | None:
        return self.shapes.get(node) if isinstance(node, Node) else None

    def reshaped(self, x: Shape, call: Call) -> Shape | None:
        """Shape after a call that only reads the same values in another shape; None for any other call."""
        args, rank = call.args, len(x)
        if call.op == "reshape":
            return self._sizes(args["sizes"], product(x))
        if call.op == "like":
            return self.of(args["other"])
        if call.op == "flatten":
            first, last = (_index(args[n], rank) for n in ("start_dim", "end_dim"))
            if first is None or last is None:
                return None
            return (*x[:first], product(x[first : last + 1]), *x[last + 1 :])
        axis = _index(args.get("dim"), rank + (call.op == "unsqueeze"))
        if call.op == "unflatten" and axis is not None:
            inner = self._sizes(args["sizes"], x[axis])
            return None if inner is None else (*x[:axis], *inner, *x[axis + 1 :])
        if call.op == "unsqueeze" and axis is not None:
            return (*x[:axis], ONE, *x[axis:])
        if call.op == "squeeze":
            dims = ints_of(args["dim"])
            axes = [None] if dims is None else [_index(d, rank) for d in dims]
            if None in axes or any(x[a].unknowns for a in axes if a is not None):
                return None
            return tuple(s for i, s in enumerate(x) if i not in axes or s != ONE)
        return None

    def _sizes(self, sizes: Any, total: Size) -> Shape | None:
        """The sizes a view is given; -1 is what is left of `total`."""
        if isinstance(sizes, Node):
            sizes = self._known(sizes)
            if isinstance(sizes, Size):
                sizes = (sizes,)
        if not isinstance(sizes, (tuple, list)):
            return None
        known = [None if s == -1 else self._value(s) for s in sizes]
        if known.count(None) > 1:
            return None
        rest = product([s for s in known if s is not None])
        left = self._quotient(total, rest)
        return tuple(left if s is None else s for s in known)

    def _value(self, value: Any) -> Size:
        if isinstance(value, (Size, int)):
            return value if isinstance(value, Size) else Size(value)
        found = self._known(value)
        return found if isinstance(found, Size) else Size(1, (str(value),))

    def _quotient(self, size: Size, divisor: Size) -> Size:
        """The quotient rounded down: equal questions have equal answers, and a short name."""
        name = self.names.setdefault((size, divisor), f"size {len(self.names)}")
        return size.over(divisor) or Size(1, (name,))

    def _known(self, value: Any) -> Any:
        return self.values.get(value) if isinstance(value, Node) else None

    def _shape(self, node: Node, call: Call, rank: int) -> Sequence[Size | None] | None:
        if call.op in ("add", "sub", "mul", "div"):
            return self._broadcast([call.args[n] for n in ("input", "other")], rank)
        if call.op == "cat":
            return self._concatenated(call, rank)
        x = self.of(call.args.get("input"))
        if x is None:
            return self._sizes(call.args["sizes"], Size(1, (node.name,))) if call.op == "reshape" else None
        if call.op in _SAME:
            return x
        if call.op in ("linear", "mm"):
            return (*x[:-1], None)
        if call.op in ("permute", "transpose"):
            order = order_of(call, rank)
            return None if order is None else tuple(x[i] for i in order)
        if call.op in ("conv", "conv_transpose"):
            front, spatial = rank - (call.spatial or 0), call.spatial or 0
            return (*x[: front - 1], None, *(x[front:] if _keeps_size(call) else (None,) * spatial))
        if call.op in ("avg_pool", "adaptive_avg_pool", "interpolate"):
            front = 2 if call.spatial is None else rank - call.spatial
            return (*x[:front], *(None,) * (rank - front))
        if call.op == "average" and (dims := ints_of(call.args["dim"])) and isinstance(call.args["keepdim"], bool):
            gone = {_index(d, len(x)) for d in dims}
            return tuple(ONE if i in gone else s for i, s in enumerate(x) if call.args["keepdim"] or i not in gone)
        if call.op == "getitem":
            cuts = call.args["index"]
            if (picked := pick(cuts)) is not None:
                axis = _index(picked.axis, rank)
                return None if axis is None else (*x[:axis], None, *x[axis + 1 :])
            if not isinstance(cuts, tuple) or not all(isinstance(c, slice) for c in cuts) or len(cuts) > rank:
                return None
            return (*(s if c == slice(None) else None for s, c in zip(x, cuts, strict=False)), *x[len(cuts) :])
        return self.reshaped(x, call)

    def _concatenated(self, call: Call, rank: int) -> list[Size | None] | None:
        """Sizes of any of the tensors, which agree but along one axis."""
        tensors, axis = call.args["tensors"], _index(call.args["dim"], rank)
        known = [s for t in tensors if (s := self.of(t)) is not None] if isinstance(tensors, (tuple, list)) else []
        if not known or axis is None:
            return None
        return [None if i == axis else s for i, s in enumerate(known[0])]

    def _broadcast(self, operands: list[Any], rank: int) -> list[Size | None] | None:
        """Sizes on which all operands agree; a number or an axis of length 1 leaves it to the others."""
        known = [self.of(o) if isinstance(o, Node) else tuple(map(Size, getattr(o, "shape", ()))) for o in operands]
        if None in known:
            return None
        axes: list[Size | None] = []
        for axis in range(-rank, 0):
            found = {s[axis] for s in known if s is not None and -axis <= len(s)} - {ONE}
            axes.append(None if len(found) > 1 else found.pop() if found else ONE)
        return axes

    def _asked(self, node: Node) -> Any:
        """What a node that asks for sizes, or computes with them, gives; None where that is not known."""
        args: Any = node.args
        if node.target is getattr or plain(node.target) in SIZE:
            shape = self.of(args[0] if args else None)
            dims = () if node.target is getattr else (*args[1:], *node.kwargs.values())  # x.size(dim=0)
            return _item(shape, dims[0]) if shape is not None and dims else shape
        parts = [self._known(a) if isinstance(a, Node) else a for a in args]
        shapes = [p for p in parts if isinstance(p, (tuple, list)) and not isinstance(p, Size)]
        if node.target is operator.getitem:
            return _item(parts[0], args[1]) if parts[0] in shapes else None
        if node.target is operator.add:
            return tuple(self._value(s) for p in shapes for s in p) if len(shapes) == len(parts) else None
        if not all(isinstance(p, (int, Size)) for p in parts):
            return None
        a, b = (self._value(p) for p in parts)
        return a * b if node.target is operator.mul else self._quotient(a, b)


def order_of(call: Call, rank: int) -> tuple[int, ...] | None:
    """Where each axis of a permuted tensor comes from."""
    if call.op == "permute":
        order = [_index(d, rank) for d in ints_of(call.args["sizes"]) or ()]
    else:
        a, b = _index(call.args["dim0"], rank), _index(call.args["dim1"], rank)
        swapped = {a: b, b: a}
        order = [] if None in swapped else [swapped.get(i, i) for i in range(rank)]
    return tuple(i for i in order if i is not None) if len(order) == rank and None not in order else None


def _item(sizes: Shape, index: Any) -> Size | Shape | None:
    if isinstance(index, slice):
        return sizes[index] if fixed(index) else None
    where = _index(index, len(sizes))
    return None if where is None else sizes[where]


def _keeps_size(call: Call) -> bool:
    """Whether a convolution gives as many positions as it reads, whatever their number."""
    spatial, args = call.spatial or 0, call.args
    kernel = getattr(args["weight"], "shape", ())[2:]
    fields = [(v,) * spatial if isinstance(v := args[n], int) else v for n in ("stride", "padding", "dilation")]
    if call.op != "conv" or len(kernel) != spatial or not all(ints_of(f) and len(f) == spatial for f in fields):
        return False
    return all(s == 1 and 2 * p == d * (k - 1) for k, s, p, d in zip(kernel, *fields, strict=True))


def _index(dim: Any, rank: int) -> int | None:
    """`dim` counted from the front."""
    return dim % rank if isinstance(dim, int) and -rank <= dim < rank else None
