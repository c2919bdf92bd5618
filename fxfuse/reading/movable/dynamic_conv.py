"""Convolutions whose kernels are mixed anew for every sample, and the factors after them.

A dynamic convolution multiplies attention [B, K] by a bank [K, N*M] into one kernel of M numbers for each output
channel of each sample, and runs all samples as one convolution of B times the groups (Chen et al. 2020,
CondConv by Yang et al. 2019). Its output is linear in the bank, so a factor a channel goes to the columns of
that channel in the bank, and with the shift to the bias, which is mixed alike.

What is proved here, from sizes that are equal for every input: output channel n of the tensor that the factor
reads is row n of every sample's kernels. In row-major order that row is columns n*M to (n+1)*M of the product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from fxfuse.algebra.operator import Operator
from fxfuse.facts.sizes import ONE, Dims, Size, order_of, product
from fxfuse.ops.call import Call
from fxfuse.ops.movement import RESHAPES
from fxfuse.reading.affine import Affine
from fxfuse.reading.movable.factor_ways import Division, factors_after

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Dynamic:
    """One such convolution: its last node, and the products that give its kernels and its bias."""

    conv: Node
    out: Node
    channels: int
    kernels: Node
    bias: Node | None


@dataclass(frozen=True)
class Finder:
    """Reads dynamic convolutions; `readers` are those of a node's data."""

    calls: Mapping[Node, Call]
    shapings: Mapping[Node, Call]
    affine: Mapping[Node, Affine]
    dims: Dims
    readers: Callable[[Node], list[Node]]

    def divisions(self) -> dict[Node, Division]:
        """By the first of them: factors after a dynamic convolution, as portions of its bank and of its bias."""
        found = {}
        for dynamic in self.all:
            if factors := self._factors(dynamic):
                ops = [self.affine[f].op for f in factors]
                portions = {dynamic.kernels: tuple(spread(o, dynamic.channels, self._each(dynamic)) for o in ops)}
                if dynamic.bias is not None:
                    portions[dynamic.bias] = tuple(spread(o, dynamic.channels, 1, o.bias) for o in ops)
                found[factors[0]] = Division(tuple(factors), portions)
        return found

    def unbiased(self) -> list[Dynamic]:
        """Those without a bias, where what follows has a shift."""
        bare = [d for d in self.all if d.bias is None and not self._factors(d)]
        return [d for d in bare if self._factors(d, shifts=True)]

    @cached_property
    def all(self) -> list[Dynamic]:
        """Every dynamic convolution of the graph."""
        found = [self.read(node, call) for node, call in self.calls.items()]
        return [d for d in found if d is not None]

    def read(self, conv: Node, call: Call) -> Dynamic | None:
        """The dynamic convolution that runs in `conv`; None where any of it is something else."""
        shape = self.dims.of(conv)
        if call.op != "conv" or not isinstance(call.args["weight"], Node) or shape is None:
            return None
        kernels, bias = self._mixed(call.args["weight"], conv), call.args["bias"]
        rows = self.dims.of(call.args["weight"])
        if kernels is None or rows is None:
            return None
        out, channels = self._apart(conv, (shape[0], rows[0], *shape[2:]))
        if out is None or not channels:
            return None
        if product(rows[1:]) != Size(self.affine[kernels].op.out_channels // channels):
            return None
        if self.affine[kernels].op.out_channels % channels:
            return None
        if bias is not None:
            bias = self._mixed(bias, conv) if isinstance(bias, Node) else None
            if bias is None or self.affine[bias].op.out_channels != channels:
                return None
        return Dynamic(conv, out, channels, kernels, bias)

    def _each(self, dynamic: Dynamic) -> int:
        return self.affine[dynamic.kernels].op.out_channels // dynamic.channels

    def _mixed(self, node: Node, reader: Node) -> Node | None:
        """The product with a constant bank behind reshapes that nobody else reads."""
        while self.readers(node) == [reader]:
            affine, call = self.affine.get(node), self.shapings.get(node)
            if affine is not None and affine.kind == "unary" and affine.op.weighted and affine.op.spatial == 0:
                return node
            if call is None or call.op not in RESHAPES or not isinstance(call.args["input"], Node):
                return None
            reader, node = node, call.args["input"]
        return None

    def _apart(self, conv: Node, shape: tuple[Size, ...]) -> tuple[Node | None, int]:
        """The reshape after `conv` in which the channels of each sample are axis 1, and their number."""
        node, swapped = conv, False
        while len(following := self.readers(node)) == 1:
            node = following[0]
            call = self.shapings.get(node)
            if call is None:
                return None, 0
            if call.op in ("permute", "transpose") and not swapped and shape[0] == ONE:
                order = order_of(call, len(shape))
                swapped = order == (1, 0, *range(2, len(shape)))
                if not swapped:
                    return None, 0
                continue
            after = self.dims.of(node)
            if call.op not in RESHAPES or after is None or len(after) < 3:
                return None, 0
            if after[2:] != shape[2:] and product(after[:2]) != product(shape[:2]):  # either, as the whole is equal
                return None, 0
            return node, 0 if after[1].unknowns else after[1].factor
        return None, 0

    def _factors(self, dynamic: Dynamic, shifts: bool = False) -> list[Node]:
        """The factors after a dynamic convolution, each read by the next alone, that it could take with `shifts`."""

        def fits(node: Node) -> bool:
            op = self.affine[node].op
            lost = op.bias and dynamic.bias is None and not shifts
            return not lost and (op.spatial is None or op.out_channels == dynamic.channels)

        return list(takewhile(fits, factors_after(dynamic.out, self.affine, self.readers)))


def spread(op: Operator, channels: int, each: int, shift: bool = False) -> Operator:
    """A factor a channel as one for each of the `each` numbers in a row that make a channel, with or without shift."""
    if op.spatial is None:
        return replace(op, law="spread", operands=(op,), consts=(("each", None),), bias=shift)
    width = channels * each
    row: dict[str, Any] = {
        "spatial": 0,
        "kernel": (),
        "stride": (),
        "dilation": (),
        "padding": (),
        "output_padding": (),
    }
    row |= {"in_channels": width, "out_channels": width, "groups": width, "bias": shift}
    return replace(op, law="spread", operands=(op,), consts=(("each", each),), **row)
