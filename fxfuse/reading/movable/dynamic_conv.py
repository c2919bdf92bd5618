"""Convolutions whose kernels are mixed anew for every sample, and the factors after them.

A dynamic convolution multiplies attention [B, K] by a bank [K, N*M] into one kernel of M numbers for each output
channel of each sample, and runs all samples as one convolution of B times the groups (Chen et al. 2020,
CondConv by Yang et al. 2019). Its output is linear in the bank, so a factor a channel goes to the columns of
that channel in the bank, and with the shift to the bias, which is mixed alike.

What is proved here, from sizes that are equal for every input: output channel n of the tensor that the factor
reads is row n of every sample's kernels. In row-major order that row is columns n*M to (n+1)*M of the product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

from torch.fx import Node

from fxfuse.algebra.operator import Operator
from fxfuse.facts.sizes import ONE, Size, order_of, product
from fxfuse.ops.call import Call
from fxfuse.ops.movement import RESHAPES
from fxfuse.reading.affine import Affine
from fxfuse.reading.movable.factor_after_join import SplitFactors, factors_after
from fxfuse.reading.nodes import Nodes
from fxfuse.reading.runs import after, before


@dataclass(frozen=True)
class Dynamic:
    """One such convolution: its last node, the products that give its kernels and its bias, and what it gives.

    Its output is `out`, of `channels` channels for each sample, of which every one has `each` numbers in its kernels.
    """

    conv: Node
    out: Node
    channels: int
    each: int
    kernels: Node
    bias: Node | None


@dataclass(frozen=True)
class DynamicConvs:
    """The dynamic convolutions of a graph; `steps` are its unary nodes, those that commute with factors included."""

    nodes: Nodes
    steps: Mapping[Node, Affine]

    def split_factors(self) -> dict[Node, SplitFactors]:
        """By the first of them: factors after a dynamic convolution, as shares of its bank and of its bias."""
        found = {}
        for dynamic in self.all:
            if factors := self._factors(dynamic):
                ops = [self.nodes.affine[f].op for f in factors]
                shares = {dynamic.kernels: tuple(repeated(o, dynamic.channels, dynamic.each) for o in ops)}
                if dynamic.bias is not None:
                    shares[dynamic.bias] = tuple(repeated(o, dynamic.channels, 1, o.bias) for o in ops)
                found[factors[0]] = SplitFactors(tuple(factors), shares)
        return found

    def unbiased(self) -> Iterator[Dynamic]:
        """Those without a bias, where what follows has a shift."""
        for dynamic in self.all:
            if dynamic.bias is None and not self._factors(dynamic) and self._factors(dynamic, shifts=True):
                yield dynamic

    @cached_property
    def all(self) -> list[Dynamic]:
        """Every dynamic convolution of the graph."""
        found = [self._read(node, call) for node, call in self.nodes.calls.items() if call.op == "conv"]
        return [d for d in found if d is not None]

    def _read(self, conv: Node, call: Call) -> Dynamic | None:
        """The dynamic convolution that runs in `conv`; None where any of it is something else."""
        weight, bias, dims = call.args["weight"], call.args["bias"], self.nodes.dims
        kernels = self._mixed(weight, conv) if isinstance(weight, Node) else None
        shape, rows = dims.of(conv), dims.of(weight) if isinstance(weight, Node) else None
        if kernels is None or rows is None or shape is None:
            return None
        out, channels = self._by_sample(conv, (shape[0], rows[0], *shape[2:]))
        if out is None or not channels:
            return None
        each, rest = divmod(self.nodes.affine[kernels].op.out_channels, channels)
        if rest or product(rows[1:]) != Size(each):
            return None
        if bias is not None:
            bias = self._mixed(bias, conv) if isinstance(bias, Node) else None
            if bias is None or self.nodes.affine[bias].op.out_channels != channels:
                return None
        return Dynamic(conv, out, channels, each, kernels, bias)

    def _mixed(self, node: Node, reader: Node) -> Node | None:
        """The product with a constant bank behind reshapes that nobody else reads."""
        for here, step in before(node, reader, self.steps, self.nodes.readers):
            if step.op.weighted and step.op.spatial == 0:
                return here
            call = self.nodes.shapings.get(here)
            if call is None or call.op not in RESHAPES:
                break
        return None

    def _by_sample(self, conv: Node, shape: tuple[Size, ...]) -> tuple[Node | None, int]:
        """The reshape after `conv` in which the channels of each sample are axis 1, and their number."""
        swapped = False
        for node, _ in after(conv, self.steps, self.nodes.readers):
            call = self.nodes.shapings.get(node)
            if call is not None and call.op in ("permute", "transpose") and not swapped and shape[0] == ONE:
                swapped = order_of(call, len(shape)) == (1, 0, *range(2, len(shape)))
                if swapped:
                    continue
                break
            found = self.nodes.dims.of(node)
            if call is None or call.op not in RESHAPES or found is None or len(found) < 3:
                break
            if found[2:] != shape[2:] and product(found[:2]) != product(shape[:2]):  # either, as the whole is equal
                break
            return node, 0 if found[1].unknowns else found[1].factor
        return None, 0

    def _factors(self, dynamic: Dynamic, shifts: bool = False) -> list[Node]:
        """The factors after a dynamic convolution, each read by the next alone, that it could take with `shifts`."""

        def fits(node: Node) -> bool:
            op = self.nodes.affine[node].op
            lost = op.bias and dynamic.bias is None and not shifts
            return not lost and (op.spatial is None or op.out_channels == dynamic.channels)

        return list(takewhile(fits, factors_after(dynamic.out, self.nodes)))


def repeated(op: Operator, channels: int, each: int, shift: bool = False) -> Operator:
    """A factor a channel as one for each of the `each` numbers in a row that make a channel, with or without shift."""
    spatial, times = (None, 1) if op.spatial is None else (0, each)
    consts = (("start", 0), ("each", times))
    return op.on_layout(spatial, channels * each, law="repeated", operands=(op,), consts=consts, bias=shift)
